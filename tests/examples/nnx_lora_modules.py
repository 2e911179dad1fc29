"""RM-LoRA on a model that is built from flax.nnx's own LoRA modules."""

import jax
import jax.numpy as jnp
from flax import nnx

import rmlora_jax as rm

x, y = jax.random.normal(jax.random.key(0), (2, 32, 8))
tx = rm.rm_lora(1e-2, penalty=0.0, keep=0.5, placement="after")


class Model(nnx.Module):
    def __init__(self, rngs):
        self.fc1 = nnx.LoRALinear(8, 16, lora_rank=4, rngs=rngs)
        self.fc2 = nnx.LoRA(16, 4, 8, base_module=nnx.Linear(16, 8, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.relu(self.fc1(x)))


def main(steps=100):
    model = Model(nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            penalty = rm.orthogonality(nnx.state(model, nnx.LoRAParam))
            return jnp.mean((model(x) - y) ** 2) + 0.1 * penalty

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)
        return value

    for _ in range(steps):
        value = step(model, optimizer)
    return model, value


if __name__ == "__main__":
    print("loss", main()[1])
