"""The mask on parameters that are no LoRA factors: regular expressions in `factors` name them.

Whether random masks help beyond LoRA is a question that the RM-LoRA paper leaves open. These lines
show how to ask it, not what the answer is.
"""

import jax
import jax.numpy as jnp
import optax

import rmlora_jax as rm

layer = {
    "attention": {"kernel": jnp.ones((2, 8, 8)), "bias": jnp.ones((2, 8))},
    "prefix": jnp.ones((2, 5, 8)),  # five vectors, put before the keys and values
    "bottleneck": {"down": {"kernel": jnp.ones((2, 8, 4))}, "up": {"kernel": jnp.ones((2, 4, 8))}},
}
params = {"layers": layer, "head": {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}}  # two layers

masks = {
    # Part of full fine-tuning: half the entries of the attention weights, at each step others.
    "attention": rm.mask_gradients(0.5, unit="element", factors=r"layers/attention/kernel"),
    # All of full fine-tuning but the head.
    "layers": rm.mask_gradients(0.5, unit="element", factors=r"layers/.*"),
    # Prefix vectors: a coin for each layer's prefix as a whole.
    "prefix": rm.mask_gradients(0.5, unit="matrix", factors=r".*/prefix"),
    # Bottleneck adapters have a rank axis, between down and up: their directions can be drawn.
    "bottleneck": rm.mask_gradients(2, draw="exact", factors=(r"down/kernel", r"up/kernel")),
    # BitFit trains biases only; a coin for each entry. The head's bias is not named: it moves.
    "bitfit": rm.mask_gradients(0.5, unit="element", factors=r"layers/.*/bias"),
}


def main(steps=2):
    """What one unit of gradient moves in the last of ``steps`` steps, for each mask."""
    moved = {}
    for name, mask in masks.items():
        tx = optax.chain(mask, optax.sgd(1.0))
        state = tx.init(params)
        for _ in range(steps):  # the first update is whole: start_step=1
            updates, state = tx.update(params, state)
        moved[name] = jax.tree.map(jnp.negative, updates)
    return moved


if __name__ == "__main__":
    for name, updates in main().items():
        shares = jax.tree.map(lambda u: round(float(u.mean()), 2), updates)
        print(name, shares)
