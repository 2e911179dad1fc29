"""RM-LoRA in a Flax NNX loop: adapt a model, hand its nnx.LoRAParam to nnx.Optimizer."""

import jax
import jax.numpy as jnp
from flax import nnx

import rmlora_jax as rm

x, y = jax.random.normal(jax.random.key(0), (2, 32, 8))
lora = rm.LoRA(rank=4, alpha=8, target=r"body/layers/.*")


class Model(nnx.Module):
    def __init__(self, rngs):
        fc1, fc2 = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.body = nnx.Sequential(fc1, nnx.relu, fc2)
        self.head = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.head(self.body(x))


@nnx.jit
def step(model, optimizer):
    def loss(model):
        penalty = rm.orthogonality(nnx.state(model, nnx.LoRAParam))
        return jnp.mean((model(x) - y) ** 2) + 0.1 * penalty

    value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, gradients)
    return value


def main(steps=100):
    base = Model(nnx.Rngs(1))
    model = rm.adapt(base, lora, rngs=nnx.Rngs(2))
    tx = rm.rm_lora(1e-2, penalty=0.0, keep=0.5, placement="after")  # the loss has the penalty
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    for _ in range(steps):
        value = step(model, optimizer)
    return base, model, value


if __name__ == "__main__":
    print("loss", main()[2])
