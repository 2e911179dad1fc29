"""RM-LoRA in JAX: low-rank adapters with orthogonal factors and randomly masked gradients."""

from rmlora_jax.adapt import adapt  # a Flax module -> the same module with low-rank factors
from rmlora_jax.baselines import (
    AdaLoRA,  # LoRA in the form of a singular value decomposition, whose budget moves
    SoRA,  # LoRA with a gate on each rank direction
    adalora,  # penalty, clip, AdamW and the allocation of ranks in one chain
    sora,  # clip, AdamW and the proximal step of the gates in one chain
    to_lora,  # what the two trained, as plain LoRA of the rank that is left
)
from rmlora_jax.combine import (
    align_adapters,  # adapters of one structure: one compiled program serves them all
    combine_adapters,  # one adapter out of several of the same base
)
from rmlora_jax.intrinsic import (
    intrinsic_dimension,  # the spectrum of each Delta W, from its factors
    trajectory_dimension,  # the spectrum of what training explored
)
from rmlora_jax.lora import (
    Layer,  # how a layer of your own class uses its weight
    LoRA,  # what is adapted, how, and what else is trained
)
from rmlora_jax.masking import (
    kept_fraction,  # how much of the factors the last mask let through
    lazily_masked,  # an optimizer that leaves hidden directions wholly untouched
    mask_gradients,  # an optax transformation: a random part of the factors moves at each step
    step_masks,  # the masks of a step, for logging
)
from rmlora_jax.orthogonality import (
    add_orthogonality,  # the penalty's gradient as an optax transformation
    orthogonality,  # the penalty
)
from rmlora_jax.ranks import (
    pad_rank,  # a higher rank, the same updates
    reduce_rank,  # the best approximation of the updates by a lower rank
)
from rmlora_jax.rm_lora import authors_exact, rm_lora  # penalty, clip, mask and AdamW in one chain
from rmlora_jax.tree import (
    attach,  # factors for a base that is loaded
    join,  # trainable, frozen -> params
    merge,  # params with factors -> params of the unadapted model
    split,  # params -> trainable, frozen
)


def __getattr__(name):  # the two need more than jax, flax and optax, and are found when asked for
    if name in ("load_peft", "save_peft"):
        from rmlora_jax import hub

        return getattr(hub, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "AdaLoRA",
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
]
