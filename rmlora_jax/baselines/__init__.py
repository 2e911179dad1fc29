"""The baselines of the paper: AdaLoRA and SoRA."""

from rmlora_jax.baselines.description import AdaLoRA, SoRA
from rmlora_jax.baselines.fold import to_lora

__all__ = ["AdaLoRA", "SoRA", "to_lora"]
