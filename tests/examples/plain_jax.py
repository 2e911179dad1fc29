"""RM-LoRA in a plain JAX loop: the factors are a dictionary, optax does the rest."""

import jax
import jax.numpy as jnp
import optax

import rmlora_jax as rm

base, target = jax.random.normal(jax.random.key(0), (2, 8, 8)) / 4  # pretrained; what to learn
x = jax.random.normal(jax.random.key(1), (64, 8))
batch = x, x @ target
tx = optax.chain(rm.mask_gradients(keep=0.5), optax.adam(1e-2))


def loss(params, x, y):
    out = x @ base + 2 * (x @ params["lora_a"]) @ params["lora_b"]
    return jnp.mean((out - y) ** 2) + 0.1 * rm.orthogonality(params)


@jax.jit
def step(params, state, batch):
    value, gradients = jax.value_and_grad(loss)(params, *batch)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


def main(steps=200):
    params = {"lora_a": jax.random.normal(jax.random.key(2), (8, 4)), "lora_b": jnp.zeros((4, 8))}
    state = tx.init(params)
    for _ in range(steps):
        params, state, value = step(params, state, batch)
    return params, value


if __name__ == "__main__":
    print("loss", main()[1])
