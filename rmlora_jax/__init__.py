"""RM-LoRA in JAX: low-rank adapters with orthogonal factors and randomly masked gradients."""

import importlib
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rmlora_jax.from_python import load as load
    from rmlora_jax.from_python import load_config as load_config
    from rmlora_jax.from_python import train as train
    from rmlora_jax.hub import load_peft as load_peft
    from rmlora_jax.hub import save_peft as save_peft
    from rmlora_jax.public import *

__version__ = "0.1.0"

# They need more than jax, flax and optax, and are imported one by one.
FURTHER = {
    "load": "rmlora_jax.from_python",
    "load_config": "rmlora_jax.from_python",
    "load_peft": "rmlora_jax.hub",
    "save_peft": "rmlora_jax.hub",
    "train": "rmlora_jax.from_python",
}

__all__ = [
    "AdaLoRA",
    "DoRA",
    "Layer",
    "LoRA",
    "SoRA",
    "adalora",
    "adapt",
    "add_orthogonality",
    "align_adapters",
    "attach",
    "authors_exact",
    "combine_adapters",
    "decayed",
    "intrinsic_dimension",
    "join",
    "kept_fraction",
    "lazily_masked",
    "mask_gradients",
    "merge",
    "orthogonality",
    "pad_rank",
    "reduce_rank",
    "rm_lora",
    "sora",
    "split",
    "step_masks",
    "to_lora",
    "trajectory_dimension",
    "unadapted",
]


def __getattr__(name):
    """Imports jax once a name is asked for: ``rmlora --help`` answers without it."""
    if name in FURTHER:
        return getattr(importlib.import_module(FURTHER[name]), name)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = importlib.import_module("rmlora_jax.public")
    globals().update((public_name, getattr(public, public_name)) for public_name in __all__)
    return globals()[name]


def __dir__():
    return sorted({*globals(), *__all__, *FURTHER})


class _Package(types.ModuleType):
    """``rmlora_jax.adapt`` and ``rmlora_jax.train`` are functions, also after the import of the
    rooms of these names."""

    def __setattr__(self, name, value):
        if name not in ("adapt", "train") or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
