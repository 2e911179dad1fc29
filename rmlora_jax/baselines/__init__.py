"""The methods that RM-LoRA is compared with: AdaLoRA and SoRA."""

from rmlora_jax.baselines.adalora import (
    adalora,  # penalty, clip, AdamW and rank allocation in one chain
    allocate_rank,  # any optimizer, followed by AdaLoRA's rank allocation
    budget,  # how many triplets a step of AdaLoRA keeps
)
from rmlora_jax.baselines.description import (
    AdaLoRA,  # LoRA in the form of a singular value decomposition
    SoRA,  # LoRA with a gate on each rank direction
)
from rmlora_jax.baselines.diagonal import (
    find_diagonals,  # the modules with a diagonal between their factors
)
from rmlora_jax.baselines.fold import (
    to_lora,  # what they trained, as plain LoRA of the rank that is left
)
from rmlora_jax.baselines.sora import (
    sora,  # clip, AdamW and the proximal step of the gates
    surviving,  # how much of the diagonals is left, for logging
    surviving_parameters,  # how many parameters are left when closed directions are cut off
)

__all__ = [
    "AdaLoRA",
    "SoRA",
    "adalora",
    "allocate_rank",
    "budget",
    "find_diagonals",
    "sora",
    "surviving",
    "surviving_parameters",
    "to_lora",
]
