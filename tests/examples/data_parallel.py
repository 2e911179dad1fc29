# Each step is awaited: many at once, on fake devices of one CPU, can starve each other.
"""RM-LoRA in a jax.pmap loop and in a jax.shard_map loop: average, then all draw the same mask."""

import jax
import jax.numpy as jnp
import optax

from rmlora_jax import mask_gradients, orthogonality

base, target = jax.random.normal(jax.random.key(0), (2, 8, 8)) / 4  # pretrained; what to learn
x = jax.random.normal(jax.random.key(1), (jax.device_count(), 8, 8))  # 8 a device
tx = optax.chain(mask_gradients(keep=0.5), optax.adam(1e-2))


def loss(p, x, y):
    return jnp.mean((x @ base + 2 * x @ p["lora_a"] @ p["lora_b"] - y) ** 2) + orthogonality(p) / 10


def step(params, state, batch):
    value, gradients = jax.lax.pmean(jax.value_and_grad(loss)(params, *batch), "data")
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


def main(steps=200, how="shard_map"):
    params = {"lora_a": jax.random.normal(jax.random.key(2), (8, 4)), "lora_b": jnp.zeros((4, 8))}
    specs = {"in_specs": (jax.P(), jax.P(), jax.P("data")), "out_specs": jax.P()}
    specs |= {"mesh": jax.sharding.Mesh(jax.devices(), "data"), "check_vma": False}
    state, pmapped = tx.init(params), jax.pmap(step, "data", in_axes=(None, None, 0), out_axes=None)
    train = pmapped if how == "pmap" else jax.jit(jax.shard_map(step, **specs))
    for _ in range(steps):
        params, state, value = jax.block_until_ready(train(params, state, (x, x @ target)))
    return params, value


if __name__ == "__main__":
    print("loss", main(how="pmap")[1], main(how="shard_map")[1])
