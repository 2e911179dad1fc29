"""Which parameters weight decay moves: all but biases and norms, as in transformers' Trainer."""

import re
from typing import Any

from rmlora_jax.optim.factors import flatten, map_leaves

# By name, not by axes: in a stack of layers a bias has two. The first line is the Trainer's own
# (`Trainer.get_decay_parameter_names`), which also leaves out every torch.nn.LayerNorm; the others
# find those, and other norms, where they are named otherwise: `norm1`, `ln_f`, Flax's `scale`.
STILL = re.compile(
    r"bias|layernorm|rmsnorm|norms?(?:_?\d+)?(?:/|$)"
    r"|(?:^|[/_])(?:ln|bn|gn|rms)(?:_?\d+)?(?:/|$)|(?:^|/)ln_\w+(?:/|$)"
    r"|(?:^|/)scale$"
)


def decayed(params: Any) -> Any:
    """``params`` with True for each leaf that weight decay moves, False for biases and norms.

    Pass it as ``weight_decay_mask`` of :func:`rmlora_jax.rm_lora`, or as ``mask`` of
    :func:`optax.adamw`. Low-rank factors, their diagonals and DoRA's magnitudes decay, and so do
    embeddings and class tokens: the Trainer moves them too.

    >>> decayed({"q": {"kernel": 1.0, "lora_a": 1.0, "bias": 1.0}, "norm1": {"scale": 1.0}})
    {'norm1': {'scale': False}, 'q': {'bias': False, 'kernel': True, 'lora_a': True}}
    """
    _, _, paths = flatten(params)
    return map_leaves(lambda i, _: STILL.search(paths[i].lower()) is None, params)
