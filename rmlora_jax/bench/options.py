"""The flags of the command, their defaults, and what is wrong with them."""

import argparse
import dataclasses
import os
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from rmlora_jax import called
from rmlora_jax.adapt.lora import EXECUTIONS
from rmlora_jax.bench.models import MODELS, MODULES, Entry, find_model
from rmlora_jax.bench.variants import USUAL, VARIANTS
from rmlora_jax.config import field, leaves, not_allowed
from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.models.attention import IMPLEMENTATIONS
from rmlora_jax.models.blocks import REMAT

DTYPES = ("bfloat16", "float16", "float32")
SWEEPS = {
    "rank": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "batch": (1, 4, 16, 64, 256),
    "length": (32, 64, 128, 256, 512),
    "modules": tuple(MODULES),
}
OWN = ("unroll", "remat", "execution", "attention")  # flags that a variant can have for itself
SWEEP_VARIANTS = ("floor", "lora", "rm_lora")


@dataclasses.dataclass(frozen=True)
class Options:
    """One call of the command; `parse` fills in what a flag leaves open.

    ``unroll`` is then a number of layers, ``variants`` and ``values`` are tuples; ``sweep`` is ""
    where nothing is swept.
    """

    model: str = field("vit-base", ", ".join(MODELS))
    batch: int = field(None, "examples a step; None: the model's own", least=1)
    image_size: int | None = field(None, "pixels, for images")
    length: int | None = field(None, "tokens, for texts")
    rank: int = field(4, "of the adapters", least=1)
    modules: str = field(
        "all", f"what is adapted: {', '.join(MODULES)}", choices=tuple(MODULES)
    )
    dtype: str = field(None, "of the computation; None: bfloat16, on a CPU float32", choices=DTYPES)
    base_dtype: str = field(
        None, "in which the frozen weights are held; None: as --dtype", choices=DTYPES
    )
    unroll: Any = field("all", "layers a turn of the scan, or all")
    remat: str = field("none", ", ".join(REMAT), choices=tuple(REMAT))
    execution: str = field("auto", ", ".join(EXECUTIONS), choices=tuple(EXECUTIONS))
    attention: str = field("auto", ", ".join(IMPLEMENTATIONS), choices=tuple(IMPLEMENTATIONS))
    repeats: int = field(10, "turns of all variants", least=1)
    steps: int | None = field(None, "of a stretch; None: as many as take 0.2 s", least=1)
    variants: tuple[str, ...] = field(
        None, f"any of {','.join(VARIANTS)}, each with flags of its own behind a colon, as in "
              f"lora:execution=merged:unroll=1 ({', '.join(OWN)}); None: {','.join(USUAL)}, in a "
              f"sweep {','.join(SWEEP_VARIANTS)}"
    )
    peft: bool = field(False, "time PyTorch's PEFT beside them")
    profile: bool = field(False, "also list the kernels that a step consists of")
    sweep: str = field(
        None, f"one of {', '.join(SWEEPS)}: a plot of the cost against it", choices=tuple(SWEEPS)
    )
    values: tuple = field(None, "of the sweep, with commas between")
    out: str = field(None, "folder of the results; None: a new one under runs/")

    def of(self, variant: str) -> tuple[str, "Options"]:
        """The method of one of ``variants``, such as ``"lora:unroll=1"``, and its own options."""
        method, own = _parsed(variant, self.entry.config.num_hidden_layers)
        return method, dataclasses.replace(self, **own)

    @property
    def entry(self) -> Entry:
        return find_model(self.model, self.image_size, self.length)


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line.

    Raises:
      UserError: a flag or a value that does not exist or does not fit.
    """
    parser = argparse.ArgumentParser(
        prog=called.bench(),
        description="Times one training step of each method on the first device.",
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, leaf in leaves(Options).items():
        takes: dict[str, Any] = {"default": leaf.default, "help": leaf.spec.help}
        takes |= {"action": "store_true"} if leaf.kind is bool else {}
        takes |= {"type": int} if leaf.kind is int else {}
        parser.add_argument(f"--{name}", **takes)
    try:
        given, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}\n--help lists the flags") from None
    if unknown:
        flags = [f"--{name}" for name in vars(given)]
        word = unknown[0].partition("=")[0]
        raise UserError(
            f"there is no argument {word}{did_you_mean(word, flags)}\n--help lists the flags"
        )
    entry = find_model(given.model, given.image_size, given.length)
    _check(**vars(given))
    if given.values is not None and not given.sweep:
        raise UserError("--values belong to a sweep; type --sweep=rank, or leave them out")
    for name in ("peft", "profile"):
        if given.sweep and getattr(given, name):
            raise UserError(f"--{name} does not go with --sweep; leave one of them out")
    name = (f"{datetime.now():%Y-%m-%d_%H-%M-%S}", "bench", given.model, given.sweep)
    dtype = given.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    fields = vars(given) | {
        "batch": entry.batch if given.batch is None else given.batch,
        "length": entry.length,
        "dtype": dtype,
        "base_dtype": given.base_dtype or dtype,
        "unroll": _unroll(given.unroll, entry.config.num_hidden_layers),
        "variants": _variants(given.variants, given.sweep, entry.config.num_hidden_layers),
        "sweep": given.sweep or "",
        "values": _values(given.sweep, given.values, given.model, entry),
        "out": os.path.expanduser(given.out or str(Path("runs", "_".join(filter(None, name))))),
    }
    return Options(**fields)


def check_folder(out: str) -> None:
    """Raises a UserError where the results could not be written, before anything is timed."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror}; type another folder") from None


def _check(**values: Any) -> None:
    """Raises a UserError with a line for each flag whose value is not allowed."""
    if wrong := not_allowed(Options(**values)):
        raise UserError("\n".join(line.replace("config.", "--", 1) for line in wrong.values()))


def _among(flag: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise UserError(
            f"{flag}={value} must be one of {', '.join(known)}{did_you_mean(value, known)}"
        )


def _unroll(text: str, layers: int) -> int:
    if text == "all":
        return layers
    if not text.isdecimal() or not 1 <= int(text) <= layers:
        raise UserError(
            f"--unroll={text} must be all, or a number of layers from 1 to {layers}"
        )
    return int(text)


def _variants(text: str | None, sweep: str, layers: int) -> tuple[str, ...]:
    if text is None:
        return SWEEP_VARIANTS if sweep else USUAL
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        _parsed(name, layers)
    if sweep and "floor" not in names:
        raise UserError(f"--sweep compares with the floor; type --variants=floor,{text}")
    return names


def _parsed(variant: str, layers: int) -> tuple[str, dict[str, str | int]]:
    """The method of a variant, and the flags that it has for itself."""
    method, *settings = variant.split(":")
    _among("--variants", method, VARIANTS)
    own: dict[str, str | int] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        _among("--variants: own flag", name, OWN)
        own[name] = _unroll(value, layers) if name == "unroll" else value
    _check(**own)
    return method, own


def _values(sweep: str, text: str | None, model: str, entry: Entry) -> tuple:
    """What a sweep goes through."""
    if not sweep:
        return ()
    if sweep == "length" and entry.length is None:
        raise UserError(
            f"{model} reads images, which have no length to sweep; type another --model, or "
            "--sweep=batch"
        )
    if text is None:
        longest = entry.config.longest if sweep == "length" else None
        return tuple(v for v in SWEEPS[sweep] if longest is None or v <= longest)
    values = tuple(dict.fromkeys(value.strip() for value in text.split(",")))
    if sweep == "modules":
        for value in values:
            _among("--values", value, MODULES)
        return values
    if not all(value.isdecimal() and int(value) for value in values):
        raise UserError(f"--values={text} must be whole numbers of at least 1, with commas between")
    if sweep == "length":
        for value in values:
            find_model(model, length=int(value))
    return tuple(map(int, values))
