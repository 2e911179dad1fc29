"""PEFT's ``adapter_config.json``, what its patterns mean, and PyTorch's names of the modules."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax.adapt import DESCRIPTIONS
from rmlora_jax.adapt.lora import LoRA
from rmlora_jax.errors import UserError
from rmlora_jax.hub.pretrained import Pretrained
from rmlora_jax.hub.source import read_json
from rmlora_jax.models.family import flat_params

CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."  # what PEFT puts in front of the names of modules

# What changes the forward pass in a way that factors and saved modules do not tell.
UNSUPPORTED = (
    *("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "use_bdlora", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config"),
    *("kasa_config", "monteclora_config"),
)
LARGEST_RANK = 2**16


class PeftConfig(NamedTuple):
    """The fields of an ``adapter_config.json`` that say what its tensors mean.

    Attributes:
      base: ``base_model_name_or_path``, None where it is not said.
      r: rank of the modules that no pattern matches.
      alpha: numerator of their scale.
      rs: whether the scale is alpha / sqrt(r).
      dropout: on the input of the factors, in training.
      targets: names of the adapted modules, or their endings; None where a pattern tells them.
      saved: names of modules that are kept as a whole, or their endings.
      rank_pattern, alpha_pattern: regular expression of a module's name or its ending -> value;
        the first that matches wins.
      description: the class that describes the adapter's form, such as ``LoRA``.
    """

    base: str | None
    r: int
    alpha: float
    rs: bool
    dropout: float
    targets: tuple[str, ...] | None
    saved: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    description: type[LoRA]

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
      UserError: there is none, it is damaged, or it describes another kind of adapter.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.exists():
        raise UserError(f"{folder} has no {CONFIG_FILE}; is it an adapter's folder?")
    raw = read_json(path)

    def wrong(field: str, allowed: str) -> UserError:
        return UserError(f"{path}: {field} is {_short(raw.get(field))}; it must be {allowed}")

    if raw.get("peft_type") != "LORA":
        raise wrong("peft_type", "'LORA': no other kind can be read")
    description = _description(raw)
    known = description.form.peft_fields
    used = [field for field in UNSUPPORTED if raw.get(field) and field not in known]
    if used:
        raise UserError(
            f"{path}: {used[0]} is {_short(raw[used[0]])}, which is more than low-rank factors; "
            "merge that adapter into its base where PyTorch is, and load the merged model"
        )
    if raw.get("bias", "none") != "none":
        raise wrong("bias", "'none': trained biases are not read; list their modules in "
                            "modules_to_save")
    r, alpha, dropout = raw.get("r", 8), raw.get("lora_alpha", 8), raw.get("lora_dropout", 0.0)
    if not _rank(r):
        raise wrong("r", "a whole number from 1 to 65536")
    if not _positive(alpha):
        raise wrong("lora_alpha", "a number above 0")
    if not (_number(dropout) and 0 <= dropout < 1):
        raise wrong("lora_dropout", "a number in [0, 1)")
    if not isinstance(raw.get("use_rslora", False), bool):
        raise wrong("use_rslora", "true or false")
    for field, fits in (("rank_pattern", _rank), ("alpha_pattern", _positive)):
        found = raw.get(field) or {}
        if not isinstance(found, dict) or not all(fits(value) for value in found.values()):
            raise wrong(field, "an object of names and numbers")
        if unsafe := [name for name in found if not is_simple(name)]:
            raise UserError(f"{path}: {field} has {_short(unsafe[0])}, which is no simple pattern; "
                            "write the modules' names out")
    targets, saved = raw.get("target_modules"), raw.get("modules_to_save") or []
    if not (targets is None or isinstance(targets, str) or _names(targets)):
        raise wrong("target_modules", "a list of names or one pattern")
    if not _names(saved):
        raise wrong("modules_to_save", "a list of names")
    base = raw.get("base_model_name_or_path")
    if not (base is None or isinstance(base, str)):
        raise wrong("base_model_name_or_path", "a name or null")
    partly = raw.get("layers_to_transform") is not None or raw.get("exclude_modules")
    return PeftConfig(
        base=base or None,
        r=r,
        alpha=alpha,
        rs=raw.get("use_rslora", False),
        dropout=float(dropout),
        targets=tuple(targets) if isinstance(targets, list) and not partly else None,
        saved=tuple(saved),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        description=description,
    )


def _description(raw: Mapping[str, Any]) -> type[LoRA]:
    """The description of the form that the fields of a config tell; plain LoRA has none."""
    for description in DESCRIPTIONS:
        fields = description.form.peft_fields
        if fields and all(raw.get(name) == value for name, value in fields.items()):
            return description
    return LoRA


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
    chosen, known = set(chosen), set(known)
    found, left = [], set(chosen)
    for name in sorted(chosen):
        if name not in left:
            continue
        parts = name.split(".")
        starts = [i for i in range(len(parts) - 1, -1, -1) if i == 0 or not parts[i].isdigit()]
        candidates = (".".join(parts[i:]) for i in starts)
        best = next(c for c in candidates if _matched(c, known) <= chosen)
        found.append(best)
        left -= _matched(best, known)
    return sorted(found)


def _matched(ending: str, names: set[str]) -> set[str]:
    return {name for name in names if ends_with(name, ending)}


def is_simple(pattern: str) -> bool:
    """Whether matching a regular expression from a file takes a time that need not be feared.

    A repeated group can take exponentially long; so it is refused, and so are many repetitions.

    >>> is_simple(r"layers\\.(0|1)\\..*\\.fc1"), is_simple("(a+)+$")
    (True, False)
    """
    if len(pattern) > 500 or re.search(r"\)\s*[*+?{]", pattern) or len(
        re.findall(r"[*+{]", pattern)
    ) > 3:
        return False
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _first_match(patterns: Mapping[str, Any], module: str, default):
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 2**63  # a larger one may be no float
    return type(value) is float and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_RANK


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _short(value: Any) -> str:
    return repr(value)[:80]


class Names:
    """PyTorch's names of a model's modules in one spelling.

    Attributes:
      entries: path of each parameter that the model has -> its line in the family's table.
      modules: the modules that hold them, and all that those are in.
    """

    def __init__(self, base: Pretrained, old_names: bool):
        self.base, self.which = base, 0 if old_names else -1
        shapes = {path: np.shape(x) for path, x in flat_params(base.params).items()}
        self.entries = {e.path: e for e in base.family.table if e.path in shapes}
        self.layers = max((shapes[p][0] for p, e in self.entries.items() if e.stacked), default=1)
        self.modules = {
            module
            for path in self.entries
            for name in self.of_layers(self.module(path))
            for module in _upwards(name)
        }

    def module(self, path: str) -> str:
        """The module of a parameter; "vit.layers.{}.mlp.fc1" where it is of every layer."""
        return self.entries[path].names[self.which].rpartition(".")[0]

    def of_layers(self, module: str) -> list[str]:
        """The names that "{}" stands for."""
        if "{}" not in module:
            return [module]
        return [module.format(layer) for layer in range(self.layers)]

    def root(self, path: str) -> str:
        """The module to keep if this parameter is trained: of what is new for the task, the
        uppermost (RoBERTa's "classifier" has two linear layers), else its own."""
        module, prefix = self.module(path), self.base.family.prefix
        if any(re.fullmatch(pattern, path) for pattern in self.base.family.new):
            inside = module.removeprefix(prefix)
            return module[: len(module) - len(inside)] + inside.partition(".")[0]
        return module

    def below(self, root: str) -> list[str]:
        """Paths of the parameters of a module and of all modules in it."""
        return [path for path in self.entries if root in _upwards(self.module(path))]


def _upwards(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
