"""PEFT's ``adapter_config.json``, what its patterns mean, and PyTorch's names of the modules."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax.adapt import DESCRIPTIONS
from rmlora_jax.adapt.lora import LoRA
from rmlora_jax.config import is_names, is_number, regex_problem
from rmlora_jax.errors import UserError
from rmlora_jax.files import read_object
from rmlora_jax.hub.pretrained import Pretrained
from rmlora_jax.models.family import flat_params

CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."  # what PEFT puts in front of the names of modules

# Fields that change the forward pass in ways that factors and saved modules do not show.
UNSUPPORTED = (
    *("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "use_bdlora", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config"),
    *("kasa_config", "monteclora_config"),
)
LARGEST_RANK = 2**16


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_RANK


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _maps_to(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


# Field -> its default, whether a value is allowed, and what is allowed. A value that is false
# stands for an empty default.
FIELDS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "peft_type": (None, lambda x: x == "LORA", "'LORA': no other kind can be read"),
    "bias": ("none", lambda x: x == "none",
             "'none': trained biases are not read; list their modules in modules_to_save"),
    "r": (8, _is_rank, f"a whole number from 1 to {LARGEST_RANK}"),
    "lora_alpha": (8, _is_positive, "a number above 0"),
    "lora_dropout": (0.0, lambda x: is_number(x) and 0 <= x < 1, "a number in [0, 1)"),
    "use_rslora": (False, lambda x: isinstance(x, bool), "true or false"),
    "rank_pattern": ({}, _maps_to(_is_rank), "an object of names and numbers"),
    "alpha_pattern": ({}, _maps_to(_is_positive), "an object of names and numbers"),
    "target_modules": (None, lambda x: x is None or isinstance(x, str) or is_names(x),
                       "a list of names or one pattern"),
    "modules_to_save": ([], is_names, "a list of names"),
    "base_model_name_or_path": (None, lambda x: x is None or isinstance(x, str), "a name or null"),
}


class PeftConfig(NamedTuple):
    """The fields of an ``adapter_config.json`` that say what its tensors mean."""

    base: str | None  # ``base_model_name_or_path``
    r: int  # rank of the modules that no pattern matches
    alpha: float  # numerator of their scale
    rs: bool  # whether the scale is alpha / sqrt(r)
    dropout: float  # on the input of the factors, in training
    targets: tuple[str, ...] | None  # adapted modules, or their endings; None: a pattern tells them
    saved: tuple[str, ...]  # modules that are kept as a whole, or their endings
    # Regular expression of a module's name or its ending -> value; the first that matches wins.
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    description: type[LoRA]  # the class that describes the adapter's form

    def rank_of(self, module: str) -> int:
        """r of the module of this name."""
        return _first_match(self.rank_pattern, module, self.r)

    def scale_of(self, module: str, rank: int) -> float:
        """What multiplies A B in the module of this name and rank: alpha / r or alpha / sqrt(r)."""
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rs else rank)


def read_config(folder: Path) -> PeftConfig:
    """The configuration of the adapter in a folder.

    Raises:
      UserError: it is missing or damaged, or it describes another kind of adapter.
    """
    path = Path(folder) / CONFIG_FILE
    raw = read_object(path)
    values = {}
    for field, (default, fits, allowed) in FIELDS.items():
        value = raw.get(field, default)
        if not value and default in ({}, []):
            value = default
        values[field] = value
        if not fits(value):
            raise UserError(f"{path}: {field} is {_short(value)}; it must be {allowed}")
    told = (d for d in DESCRIPTIONS if d.form.peft_fields)
    description = next((d for d in told if d.form.peft_fields.items() <= raw.items()), LoRA)
    known = description.form.peft_fields
    used = [field for field in UNSUPPORTED if raw.get(field) and field not in known]
    if used:
        raise UserError(
            f"{path}: {used[0]} is {_short(raw[used[0]])}, which is more than low-rank factors; "
            "merge that adapter into its base in PyTorch, and load the merged model"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        if unsafe := [name for name in values[field] if not is_simple(name)]:
            raise UserError(f"{path}: {field} has {_short(unsafe[0])}, which is not a simple "
                            "pattern; write the modules' names out")
    targets = values["target_modules"]
    partly = raw.get("layers_to_transform") is not None or raw.get("exclude_modules")
    return PeftConfig(
        base=values["base_model_name_or_path"] or None,
        r=values["r"],
        alpha=values["lora_alpha"],
        rs=values["use_rslora"],
        dropout=float(values["lora_dropout"]),
        targets=tuple(targets) if isinstance(targets, list) and not partly else None,
        saved=tuple(values["modules_to_save"]),
        rank_pattern=values["rank_pattern"],
        alpha_pattern=values["alpha_pattern"],
        description=description,
    )


def ends_with(module: str, ending: str) -> bool:
    """Whether ``ending`` is a module's name, or the last components of it.

    >>> ends_with("vit.layers.0.mlp.fc1", "mlp.fc1"), ends_with("vit.layers.0.mlp.fc1", "c1")
    (True, False)
    """
    return module == ending or module.endswith(f".{ending}")


def endings(chosen: Iterable[str], known: Iterable[str]) -> list[str]:
    """The fewest endings that match exactly the ``chosen`` of the ``known`` names of modules.

    A layer's number is left out with what stands before it, where that matches no other module.

    >>> layers = [f"vit.layers.{i}.{m}" for i in range(2) for m in ("mlp.fc1", "mlp.fc2")]
    >>> endings(layers, layers), endings(layers[::2], layers), endings(layers[:1], layers)
    (['fc1', 'fc2'], ['fc1'], ['layers.0.mlp.fc1'])
    """
    chosen, found = set(chosen), []
    others = set(known) - chosen
    for name in sorted(chosen):
        if any(ends_with(name, ending) for ending in found):
            continue
        parts = name.split(".")
        starts = [i for i in range(len(parts) - 1, -1, -1) if i == 0 or not parts[i].isdigit()]
        candidates = (".".join(parts[i:]) for i in starts)
        found.append(next(c for c in candidates if not any(ends_with(x, c) for x in others)))
    return sorted(found)


def is_simple(pattern: str) -> bool:
    """Whether a regular expression from a file is sure to be matched in little time.

    A repeated group can take exponentially long, so it is refused, as are more than 3 repetitions.

    >>> is_simple(r"layers\\.(0|1)\\..*\\.fc1"), is_simple("(a+)+$")
    (True, False)
    """
    return (
        len(pattern) <= 500
        and not re.search(r"\)\s*[*+?{]", pattern)
        and len(re.findall(r"[*+{]", pattern)) <= 3
        and regex_problem(pattern) is None
    )


def _first_match(patterns: Mapping[str, Any], module: str, default):
    matches = (x for pattern, x in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(matches, default)


def _short(value: Any) -> str:
    return repr(value)[:80]


class Names:
    """PyTorch's names of a model's modules in one spelling."""

    def __init__(self, base: Pretrained, old_names: bool):
        self.base, self.which = base, 0 if old_names else -1
        shapes = {path: np.shape(x) for path, x in flat_params(base.params).items()}
        # Path of each parameter that the model has -> its line in the family's table.
        self.entries = {e.path: e for e in base.family.table if e.path in shapes}
        self.layers = max((shapes[p][0] for p, e in self.entries.items() if e.stacked), default=1)
        # The modules that hold them, and all that those are in.
        self.modules = {
            module
            for path in self.entries
            for name in self.of_layers(self.module(path))
            for module in itertools.accumulate(name.split("."), "{}.{}".format)
        }

    def module(self, path: str) -> str:
        """The module of a parameter, such as "vit.layers.{}.mlp.fc1" where each layer has one."""
        return self.entries[path].names[self.which].rpartition(".")[0]

    def of_layers(self, module: str) -> list[str]:
        """The names that "{}" stands for."""
        return [module.format(layer) for layer in range(self.layers if "{}" in module else 1)]

    def root(self, path: str) -> str:
        """The module to keep if this parameter is trained: the uppermost of what is new for the
        task (RoBERTa's "classifier" has two linear layers), else its own."""
        module, prefix = self.module(path), self.base.family.prefix
        if any(re.fullmatch(pattern, path) for pattern in self.base.family.new):
            inside = module.removeprefix(prefix)
            return module[: len(module) - len(inside)] + inside.partition(".")[0]
        return module

    def below(self, root: str) -> list[str]:
        """Paths of the parameters of a module and of all modules in it."""
        return [path for path in self.entries if f"{self.module(path)}.".startswith(f"{root}.")]
