"""What the command is told: its flags, their defaults, and what is wrong with them."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import jax

from rmlora_jax.adapt.lora import EXECUTIONS
from rmlora_jax.bench.models import MODELS, MODULES, Entry, find_model
from rmlora_jax.bench.variants import USUAL, VARIANTS
from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.models.attention import IMPLEMENTATIONS
from rmlora_jax.models.blocks import REMAT
from rmlora_jax.train.terminal import format_table

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


@dataclasses.dataclass(frozen=True)
class Options:
    """One call of the command, its defaults filled in.

    Attributes: the flags of the same names; ``unroll`` is a number of layers, ``sweep`` is "" where
    nothing is swept and ``values`` are then empty.
    """

    model: str
    batch: int
    image_size: int | None
    length: int | None
    rank: int
    modules: str
    dtype: str
    base_dtype: str
    unroll: int
    remat: str
    execution: str
    attention: str
    repeats: int
    steps: int | None
    variants: tuple[str, ...]
    peft: bool
    profile: bool
    sweep: str
    values: tuple
    out: str

    def of(self, variant: str) -> tuple[str, "Options"]:
        """The method of one of ``variants``, such as ``"lora:unroll=1"``, and its own options."""
        method, own = _parsed(variant, self.entry.config.num_hidden_layers)
        return method, dataclasses.replace(self, **own)

    @property
    def entry(self) -> Entry:
        return find_model(self.model, self.image_size, self.length)


class _Parser(argparse.ArgumentParser):
    """Its mistakes are ours to print."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n--help lists the flags")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m rmlora_jax.bench",
        description="Times one training step of each method on the first device.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument
    flag("--model", default="vit-base", help=", ".join(MODELS))
    flag("--batch", type=int, help="examples a step; None: the model's own")
    flag("--image_size", type=int, help="pixels, for images")
    flag("--length", type=int, help="tokens, for texts")
    flag("--rank", type=int, default=4, help="of the adapters")
    flag("--modules", default="all", help=f"what is adapted: {', '.join(MODULES)}")
    flag("--dtype", help="of the computation; None: bfloat16, on a CPU float32")
    flag("--base_dtype", help="in which the frozen weights are held; None: as --dtype")
    flag("--unroll", default="all", help="layers a turn of the scan, or all")
    flag("--remat", default="none", help=", ".join(REMAT))
    flag("--execution", default="auto", help=", ".join(EXECUTIONS))
    flag("--attention", default="auto", help=", ".join(IMPLEMENTATIONS))
    flag("--repeats", type=int, default=10, help="turns of all variants")
    flag("--steps", type=int, help="of a stretch; None: as many as take 0.2 s")
    flag("--variants", help=f"any of {','.join(VARIANTS)}, each with flags of its own behind a "
                            f"colon, as in lora:execution=merged:unroll=1 ({', '.join(OWN)}); "
                            f"None: {','.join(USUAL)}, in a sweep {','.join(SWEEP_VARIANTS)}")
    flag("--peft", action="store_true", help="time PyTorch's PEFT beside them")
    flag("--profile", action="store_true", help="also list the kernels that a step consists of")
    flag("--sweep", default="", help=f"one of {', '.join(SWEEPS)}: a plot of the cost against it")
    flag("--values", help="of the sweep, with commas between")
    flag("--out", help="folder of the results; None: a new one under runs/")
    return parser


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line.

    Raises:
      UserError: a flag or a value that does not exist or does not fit.
    """
    given, unknown = _parser().parse_known_args(arguments)
    if unknown:
        flags = [f"--{name}" for name in vars(given)]
        word = unknown[0].partition("=")[0]
        raise UserError(
            f"there is no argument {word}{did_you_mean(word, flags)}\n--help lists the flags"
        )
    entry = find_model(given.model, given.image_size, given.length)
    for name, known in (("modules", MODULES), ("remat", REMAT), ("execution", EXECUTIONS),
                        ("attention", IMPLEMENTATIONS)):
        _among(f"--{name}", getattr(given, name), known)
    dtype = given.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    for name, value in (("--dtype", dtype), ("--base_dtype", given.base_dtype or dtype)):
        _among(name, value, DTYPES)
    if given.sweep:
        _among("--sweep", given.sweep, SWEEPS)
    elif given.values is not None:
        raise UserError("--values belong to a sweep; type --sweep=rank, or leave them out")
    for name in ("peft", "profile"):
        if given.sweep and getattr(given, name):
            raise UserError(f"--{name} does not go with --sweep; leave one of them out")
    fields = vars(given) | {
        "batch": entry.batch if given.batch is None else given.batch,
        "length": entry.length,
        "dtype": dtype,
        "base_dtype": given.base_dtype or dtype,
        "unroll": _unroll(given.unroll, entry.config.num_hidden_layers),
        "variants": _variants(given.variants, given.sweep, entry.config.num_hidden_layers),
        "values": _values(given.sweep, given.values, given.model, entry),
        "out": given.out or _folder(given),
    }
    options = Options(**fields)
    for name in ("batch", "rank", "repeats", "steps"):
        _at_least_one(f"--{name}", getattr(options, name))
    return options


def check_folder(out: str) -> None:
    """Raises a UserError where the results could not be written, before anything is timed."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror}; type another folder") from None


def header(options: Options) -> str:
    """The table that the command begins with."""
    devices = jax.devices()
    others = f", the first of {len(devices)}" if len(devices) > 1 else ""
    dtypes = options.dtype
    if options.base_dtype != options.dtype:
        dtypes += f", base in {options.base_dtype}"
    swept = ", ".join(map(str, options.values))
    return format_table("rmlora_jax.bench", [
        ("device", devices[0].device_kind + others),
        ("model", options.model),
        ("batch", options.batch),
        ("rank", f"{options.rank}, on {options.modules}"),
        ("dtype", dtypes),
        ("layers", f"unroll {options.unroll}, remat {options.remat}"),
        (options.sweep or "sweep", swept or None),
        ("variants", ", ".join(options.variants) + (", PEFT" if options.peft else "")),
        ("out", options.out),
    ])


def _among(flag: str, value: str, known) -> None:
    if value not in known:
        raise UserError(
            f"{flag}={value} is none of {', '.join(known)}{did_you_mean(value, known)}"
        )


def _at_least_one(flag: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"{flag}={value} must be a whole number of at least 1")


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
    if sweep == "length":
        if entry.length is None:
            raise UserError(
                f"{model} reads images, which have no length to sweep; type another --model, or "
                "--sweep=batch"
            )
        longest = entry.config.longest
        if text is None:
            return tuple(v for v in SWEEPS[sweep] if longest is None or v <= longest)
    if text is None:
        return SWEEPS[sweep]
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


def _folder(given) -> str:
    kind = f"_{given.sweep}" if given.sweep else ""
    return str(Path("runs", f"{datetime.now():%Y-%m-%d_%H-%M-%S}_bench_{given.model}{kind}"))
