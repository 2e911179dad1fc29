"""RM-LoRA on an Equinox model: eqx.partition leaves None where a leaf is not trained."""

import equinox as eqx
import jax
import jax.numpy as jnp

import rmlora_jax as rm

x, y = jax.random.normal(jax.random.key(0), (2, 32, 8))
tx = rm.rm_lora(1e-2, penalty=0.1, keep=0.5, placement="after")


class LoRALinear(eqx.Module):
    linear: eqx.nn.Linear
    lora_a: jax.Array
    lora_b: jax.Array

    def __init__(self, linear, rank, key):
        self.linear = linear
        self.lora_a = jax.random.normal(key, (linear.in_features, rank)) / rank
        self.lora_b = jnp.zeros((rank, linear.out_features))

    def __call__(self, x, key=None):
        return self.linear(x) + 2 * (x @ self.lora_a) @ self.lora_b


def adapted(model, rank, key):
    """``model`` with factors beside each of its linear layers."""
    keys = jax.random.split(key, len(model.layers))
    layers = tuple(LoRALinear(layer, rank, k) for layer, k in zip(model.layers, keys, strict=True))
    return eqx.tree_at(lambda model: model.layers, model, layers)


def is_factor(path, _):
    return getattr(path[-1], "name", "") in ("lora_a", "lora_b")


def main(steps=100):
    model = adapted(eqx.nn.MLP(8, 8, 16, 1, key=jax.random.key(1)), 4, jax.random.key(2))
    wanted = jax.tree_util.tree_map_with_path(is_factor, model)
    trainable, frozen = eqx.partition(model, wanted)
    state = tx.init(trainable)

    @eqx.filter_jit
    def step(trainable, state):
        def loss(trainable):
            return jnp.mean((jax.vmap(eqx.combine(trainable, frozen))(x) - y) ** 2)

        value, gradients = eqx.filter_value_and_grad(loss)(trainable)
        updates, state = tx.update(gradients, state, trainable)
        return eqx.apply_updates(trainable, updates), state, value

    for _ in range(steps):
        trainable, state, value = step(trainable, state)
    return eqx.combine(trainable, frozen), value


if __name__ == "__main__":
    print("loss", main()[1])
