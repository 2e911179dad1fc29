"""RM-LoRA on models that Qwix adapted: its leaves kernel_lora_a and kernel_lora_b as they are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import rmlora_jax as rm

provider = qwix.LoraProvider(module_path=".*", rank=4, alpha=8.0)
tx = rm.rm_lora(1e-2, penalty=0.1, keep=0.5, placement="after")
x, y = jax.random.normal(jax.random.key(0), (2, 16, 10, 8))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(12, (3,), name="conv")(x))  # factors (3, 8, 4) and (4, 12)
        x = nn.DenseGeneral((2, 5), name="heads")(x)  # (12, 4) and (4, 10)
        return nn.DenseGeneral(8, axis=(-2, -1), name="out")(x)  # (10, 4) and (4, 8)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        # Qwix keeps the axes of an Einsum: (8, 4) and (4, 2, 5), then (2, 5, 4) and (4, 8).
        self.heads = nnx.Einsum("btd,dnh->btnh", (8, 2, 5), rngs=rngs)
        self.out = nnx.Einsum("btnh,nhd->btd", (2, 5, 8), rngs=rngs)

    def __call__(self, x):
        return self.out(self.heads(x))


def main(steps=50):
    """Linen: Qwix puts the factors among the parameters; train them alone."""
    model = qwix.apply_lora_to_model(Linen(), provider)
    params = flatten_dict(model.init(jax.random.key(1), x)["params"], sep="/")
    factors = {path: leaf for path, leaf in params.items() if path.endswith(("lora_a", "lora_b"))}

    def loss(factors):
        out = model.apply({"params": unflatten_dict({**params, **factors}, sep="/")}, x)
        return jnp.mean((out - y) ** 2)

    @jax.jit
    def step(factors, state):
        value, gradients = jax.value_and_grad(loss)(factors)
        updates, state = tx.update(gradients, state, factors)
        return jax.tree.map(jnp.add, factors, updates), state, value

    state = tx.init(factors)
    for _ in range(steps):
        factors, state, value = step(factors, state)
    return factors, value


def nnx_main(steps=50):
    """NNX: the factors are nnx.LoRAParam, which nnx.Optimizer selects."""
    model = qwix.apply_lora_to_model(Nnx(nnx.Rngs(1)), provider, x, rngs=nnx.Rngs(2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(x) - y) ** 2)

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)
        return value

    for _ in range(steps):
        value = step(model, optimizer)
    return nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)), value


if __name__ == "__main__":
    print("loss with Linen", main()[1])
    print("loss with NNX", nnx_main()[1])
