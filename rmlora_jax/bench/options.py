"""What the command is told: its flags, their defaults, and what is wrong with them."""

import argparse
import dataclasses
import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from rmlora_jax.adapt.lora import EXECUTIONS
from rmlora_jax.bench.models import MODELS, MODULES, Entry, find_model
from rmlora_jax.bench.variants import USUAL, VARIANTS
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
# Flags that a variant can have for itself, and their values.
OWN = {"unroll": "all, or a number of layers", "remat": REMAT, "execution": EXECUTIONS,
       "attention": IMPLEMENTATIONS}
SWEEP_VARIANTS = ("floor", "lora", "rm_lora")


def flag(default: Any, help: str, known: Iterable[str] = (), **more: Any) -> Any:
    """A field of `Options` and its flag: the values it may have, and what else argparse takes."""
    metadata = {"known": known, "argument": {"default": default, "help": help} | more}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Options:
    """One call of the command; `parse` fills in what a flag leaves open.

    ``unroll`` is then a number of layers, ``variants`` and ``values`` are tuples; ``sweep`` is ""
    where nothing is swept.
    """

    model: str = flag("vit-base", ", ".join(MODELS))
    batch: int = flag(None, "examples a step; None: the model's own", type=int)
    image_size: int | None = flag(None, "pixels, for images", type=int)
    length: int | None = flag(None, "tokens, for texts", type=int)
    rank: int = flag(4, "of the adapters", type=int)
    modules: str = flag("all", f"what is adapted: {', '.join(MODULES)}", MODULES)
    dtype: str = flag(None, "of the computation; None: bfloat16, on a CPU float32", DTYPES)
    base_dtype: str = flag(None, "in which the frozen weights are held; None: as --dtype", DTYPES)
    unroll: int = flag("all", "layers a turn of the scan, or all")
    remat: str = flag("none", ", ".join(REMAT), REMAT)
    execution: str = flag("auto", ", ".join(EXECUTIONS), EXECUTIONS)
    attention: str = flag("auto", ", ".join(IMPLEMENTATIONS), IMPLEMENTATIONS)
    repeats: int = flag(10, "turns of all variants", type=int)
    steps: int | None = flag(None, "of a stretch; None: as many as take 0.2 s", type=int)
    variants: tuple[str, ...] = flag(
        None, f"any of {','.join(VARIANTS)}, each with flags of its own behind a colon, as in "
              f"lora:execution=merged:unroll=1 ({', '.join(OWN)}); None: {','.join(USUAL)}, in a "
              f"sweep {','.join(SWEEP_VARIANTS)}")
    peft: bool = flag(False, "time PyTorch's PEFT beside them", action="store_true")
    profile: bool = flag(False, "also list the kernels that a step consists of",
                         action="store_true")
    sweep: str = flag("", f"one of {', '.join(SWEEPS)}: a plot of the cost against it", SWEEPS)
    values: tuple = flag(None, "of the sweep, with commas between")
    out: str = flag(None, "folder of the results; None: a new one under runs/")

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
        prog="python -m rmlora_jax.bench",
        description="Times one training step of each method on the first device.",
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Options):
        parser.add_argument(f"--{field.name}", **field.metadata["argument"])
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
    for field in dataclasses.fields(Options):
        value = getattr(given, field.name)
        if value and field.metadata["known"]:
            _among(f"--{field.name}", value, field.metadata["known"])
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
        "values": _values(given.sweep, given.values, given.model, entry),
        "out": given.out or str(Path("runs", "_".join(filter(None, name)))),
    }
    options = Options(**fields)
    for name in ("batch", "rank", "repeats", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be a whole number of at least 1")
    return options


def check_folder(out: str) -> None:
    """Raises a UserError where the results could not be written, before anything is timed."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror}; type another folder") from None


def _among(flag: str, value: str, known) -> None:
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
    own = {}
    for setting in settings:
        field, _, value = setting.partition("=")
        _among("--variants: own flag", field, OWN)
        if field == "unroll":
            own[field] = _unroll(value, layers)
        else:
            _among(f"--variants={variant}: {field}", value, OWN[field])
            own[field] = value
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
