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
from rmlora_jax.hub.source import CONFIG as MODEL_CONFIG
from rmlora_jax.hub.source import REVISION, join_revision
from rmlora_jax.hub.tied import tied_head
from rmlora_jax.models.family import flat_params

CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."  # what PEFT puts in front of the names of modules

# Fields that do not change what a classifier computes: how factors were begun, trained and split
# over devices. Any other field that is not in `FIELDS` must be null, false or empty.
INERT = {
    *("inference_mode", "peft_version", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of init_lora_weights
    *("megatron_core", "qalora_group_size"),  # of megatron_config, of use_qalora
}
# Values of init_lora_weights that leave the base as it was, and those that take out of it what can
# be computed again from the base alone.
PLAIN_INITS, MOVING_INITS = ("gaussian", "eva", "orthogonal", "mica"), ("pissa", "olora")
# PEFT's task_type -> what the names of transformers' classes end in; "" for any classifier.
TASKS = {
    "SEQ_CLS": "",
    "FEATURE_EXTRACTION": "",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "ConditionalGeneration",
}
LARGEST_RANK = 2**16
ALL_LINEAR = "all-linear"  # as target_modules: every linear layer but the head


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_RANK


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _is_init(value: Any) -> bool:
    if isinstance(value, str):
        return value.lower() in (*PLAIN_INITS, *MOVING_INITS)
    return value is None or isinstance(value, bool)


def _are_layers(value: Any) -> bool:
    layers = value if isinstance(value, list) else [value]
    return value is None or all(type(x) is int and 0 <= x <= LARGEST_RANK for x in layers)


def _are_modules(value: Any) -> bool:
    return value is None or isinstance(value, str) or is_names(value)


def _are_rows(value: Any) -> bool:
    """Whether a value numbers rows, once each."""
    return (isinstance(value, list) and all(type(x) is int and 0 <= x < 2**24 for x in value)
            and len(set(value)) == len(value))


def _are_tokens(value: Any) -> bool:
    by_name = isinstance(value, dict) and all(map(_are_rows, value.values()))
    return value is None or _are_rows(value) or by_name


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


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
    "target_modules": (None, _are_modules, "a list of names or one pattern"),
    "exclude_modules": ([], _are_modules, "a list of names or one pattern"),
    "layers_to_transform": (None, _are_layers, "a number or a list of numbers"),
    "layers_pattern": ([], _are_modules, "a list of names or one name"),
    "modules_to_save": ([], is_names, "a list of names"),
    "base_model_name_or_path": (None, lambda x: x is None or isinstance(x, str), "a name or null"),
    "revision": (None, lambda x: x is None or (isinstance(x, str) and bool(REVISION.fullmatch(x))),
                 "a branch, a tag, a commit or null"),
    "init_lora_weights": (
        True, _is_init,
        f"true, false, {', '.join((*PLAIN_INITS, *MOVING_INITS))}: another's base cannot be made "
        "again; write it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion"
        "=...)"),
    "task_type": (None, lambda x: x is None or (isinstance(x, str) and x in TASKS),
                  f"{', '.join(TASKS)} or null"),
    "auto_mapping": ({}, lambda x: isinstance(x, dict), "an object or null"),
    "ensure_weight_tying": (False, lambda x: isinstance(x, bool), "true or false"),
    "trainable_token_indices": (
        None, _are_tokens, "a list of different tokens, or an object of names and such lists"),
}


class PeftConfig(NamedTuple):
    """The fields of an ``adapter_config.json`` that say what its tensors mean."""

    base: str | None  # ``base_model_name_or_path``
    revision: str | None  # of the base on the hub
    task: str  # what the class of its model is for, such as "TokenClassification", or ""
    init: str | None  # "pissa" or "olora", where they took a part out of the base
    r: int  # rank of the modules that no pattern matches
    alpha: float  # numerator of their scale
    rs: bool  # whether the scale is alpha / sqrt(r)
    dropout: float  # on the input of the factors, in training
    # Modules or their endings, or one pattern for the whole name, that are adapted (None: not
    # said), and that are not.
    targets: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str
    layers: tuple[int, ...] | None  # numbers of the layers that are adapted; None: all
    layers_pattern: tuple[str, ...]  # what stands before such a number
    saved: tuple[str, ...]  # modules that are kept as a whole, or their endings
    # Module or its ending -> the rows that are trained of its weight. "": of the embedding.
    tokens: Mapping[str, tuple[int, ...]]
    tied: bool  # whether the head is to stay the embedding, where it is
    # Regular expression of a module's name or its ending -> value; the first that matches wins.
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    description: type[LoRA]  # the class that describes the adapter's form

    def keeps(self, module: str) -> bool:
        """Whether a module is kept as a whole, or lies inside one that is."""
        return any(f".{root}." in f".{module}." for root in self.saved)

    def adapts(self, module: str) -> bool:
        """Whether PEFT gives factors to the linear layer, convolution or embedding of this name."""
        whole = self.keeps(module)
        if whole or _names(self.excluded, module) or not _names(self.targets or (), module):
            return False
        if not self.layers or isinstance(self.targets, str) or module in (self.targets or ()):
            return True
        starts = [rf"(?:|.*?\.){one}" for one in self.layers_pattern] or [r".*?\.[^.]*"]
        found = (re.match(rf"{start}\.(\d+)\.", module) for start in starts)
        number = next(filter(None, found), None)
        return number is not None and int(number[1]) in self.layers

    def rows_of(self, module: str) -> tuple[int, ...]:
        """The rows of the weight of the module of this name that are trained."""
        found = (rows for name, rows in self.tokens.items() if not name or ends_with(module, name))
        return next(found, ())

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
    for field, value in raw.items():
        if field in (*FIELDS, *INERT, *description.form.peft_fields) or _says_nothing(value):
            continue
        raise UserError(
            f"{path}: {field} is {_short(value)}, which is more than low-rank factors; "
            "merge that adapter into its base in PyTorch, and load the merged model"
        )
    patterns = {name: values[name] for name in ("rank_pattern", "alpha_pattern", "layers_pattern")}
    patterns |= {name: [x] for name in ("target_modules", "exclude_modules")
                 if isinstance(x := values[name], str)}
    for field, names in patterns.items():
        if unsafe := [name for name in _tuple(names) if not is_simple(name)]:
            raise UserError(f"{path}: {field} has {_short(unsafe[0])}, which is not a simple "
                            "pattern; write the modules' names out")
    made_for = values["auto_mapping"].get("base_model_class")
    targets, init, layers = (values[x] for x in ("target_modules", "init_lora_weights",
                                                 "layers_to_transform"))
    tokens = values["trainable_token_indices"] or {}
    return PeftConfig(
        base=values["base_model_name_or_path"] or None,
        revision=values["revision"],
        task=TASKS.get(values["task_type"], "") or str(made_for or "").partition("For")[2][:80],
        init=str(init).lower() if str(init).lower() in MOVING_INITS else None,
        r=values["r"],
        alpha=values["lora_alpha"],
        rs=values["use_rslora"],
        dropout=float(values["lora_dropout"]),
        targets=tuple(targets) if isinstance(targets, list) else targets,
        excluded=x if isinstance(x := values["exclude_modules"], str) else tuple(x),
        layers=(layers,) if isinstance(layers, int) else tuple(layers or ()) or None,
        layers_pattern=_tuple(values["layers_pattern"]),
        saved=tuple(values["modules_to_save"]),
        tokens={name: tuple(rows) for name, rows in
                (tokens if isinstance(tokens, dict) else {"": tokens}).items()},
        tied=values["ensure_weight_tying"],
        rank_pattern=values["rank_pattern"],
        alpha_pattern=values["alpha_pattern"],
        description=description,
    )


def find_base(folder: Path, config: PeftConfig) -> str:
    """What `load_pretrained` is to load as the base of the adapter in ``folder``.

    A relative path is looked for in the working folder, as PEFT does, then in the adapter's own
    folder and beside it. Any other name is the hub's, with the ``revision`` that the adapter names.

    Raises:
      UserError: the adapter does not say what its base is.
    """
    if config.base is None:
        raise UserError(f"{folder / CONFIG_FILE} does not say its base_model_name_or_path; add it")
    own = Path(config.base).expanduser()
    if own.is_dir():
        return config.base
    for place in (folder.absolute(), folder.absolute().parent):
        if (place / own / MODEL_CONFIG).is_file():
            return str(place / own)
    return join_revision(config.base, config.revision)


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


def _names(modules: tuple[str, ...] | str, module: str) -> bool:
    """Whether a list of modules or endings, or a pattern for the whole name, names a module."""
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(ends_with(module, ending) for ending in modules)


def _tuple(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def matches(pattern: str, module: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` is meant for a module."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _first_match(patterns: Mapping[str, Any], module: str, default):
    return next((x for pattern, x in patterns.items() if matches(pattern, module)), default)


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
        # The module of a head that is the embedding, which is a module of its own in PyTorch.
        head = tied_head(base)
        self.tied = head.names[self.which].rpartition(".")[0] if head else None
        # The modules that hold the parameters, and all that those are in.
        roots = [*map(self.module, self.entries), *([self.tied] if self.tied else [])]
        self.modules = {
            module
            for root in roots
            for name in self.of_layers(root)
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
