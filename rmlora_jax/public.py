"""The public names of the core; `rmlora_jax` imports them when one of them is asked for."""

from rmlora_jax.adapt import adapt  # a Flax module -> the same module with low-rank factors
from rmlora_jax.adapt.combine import (
    align_adapters,  # adapters of one structure: one compiled program serves them all
    combine_adapters,  # one adapter out of several of the same base
)
from rmlora_jax.adapt.diagonal import AdaLoRA, SoRA
from rmlora_jax.adapt.dora import DoRA
from rmlora_jax.adapt.intrinsic import (
    intrinsic_dimension,  # the spectrum of each Delta W, from its factors
    trajectory_dimension,  # the spectrum of what training explored
)
from rmlora_jax.adapt.lora import (
    Layer,  # how a layer of your own class uses its weight
    LoRA,  # what is adapted, how, and what else is trained
)
from rmlora_jax.adapt.ranks import (
    pad_rank,  # a higher rank, the same updates
    reduce_rank,  # the best approximation of the updates by a lower rank
    to_lora,  # what AdaLoRA or SoRA trained, as plain LoRA
)
from rmlora_jax.adapt.tree import (
    attach,  # factors for a base that is loaded
    join,  # trainable, frozen -> params
    merge,  # params with factors -> params of the unadapted model
    split,  # params -> trainable, frozen
    unadapted,  # the matrices that an adapted model leaves as they are
)
from rmlora_jax.optim.adalora import adalora
from rmlora_jax.optim.decay import decayed  # which parameters weight decay moves
from rmlora_jax.optim.masking import (
    kept_fraction,  # how much of the factors the last mask let through
    lazily_masked,  # an optimizer that leaves hidden directions wholly untouched
    mask_gradients,  # an optax transformation: a random part of the factors moves at each step
    step_masks,  # the masks of a step, for logging
)
from rmlora_jax.optim.orthogonality import (
    add_orthogonality,  # the penalty's gradient as an optax transformation
    orthogonality,  # the penalty
)
from rmlora_jax.optim.rm_lora import (  # penalty, clip, mask and AdamW in one chain
    authors_exact,
    rm_lora,
)
from rmlora_jax.optim.sora import sora
