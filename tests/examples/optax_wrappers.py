"""RM-LoRA inside optax's wrappers; each function runs one and returns its updates and state."""

import jax
import jax.numpy as jnp
import optax

import rmlora_jax as rm

params = {
    "fc": {"lora_a": jnp.ones((6, 4)), "lora_b": jnp.ones((4, 5))},
    "head": {"kernel": jnp.ones((5, 3))},
}
gradients = jax.tree.map(jnp.ones_like, params)
mask = rm.mask_gradients(keep=2, draw="exact", start_step=0)


def run(tx, steps, **extra):
    """The updates of each step and the last state, for the same gradient in every step."""
    state, history = tx.init(params), []
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(gradients, state, params, **extra)
        history.append(updates)
    return history, state


def multi_steps():
    """Gradient accumulation goes around the mask, which then counts optimizer steps."""
    tx = optax.MultiSteps(optax.chain(mask, optax.sgd(1.0)), every_k_schedule=2)
    return run(tx, 4)


def masked():
    """Only the factors are trained, regularised and masked; the head stays."""
    trained = {"fc": True, "head": False}
    rest = {"fc": False, "head": True}
    tx = optax.chain(
        optax.masked(optax.chain(rm.add_orthogonality(0.1), mask, optax.sgd(1.0)), trained),
        optax.masked(optax.set_to_zero(), rest),
    )
    return run(tx, 2)


def lora_plus():
    """LoRA+: sixteen times the learning rate for B. The mask stands before the groups."""

    def group(path, _):
        return "b" if path[-1].key == "lora_b" else "rest"

    groups = jax.tree_util.tree_map_with_path(group, params)
    rates = {"rest": optax.sgd(1e-3), "b": optax.sgd(16e-3)}
    return run(optax.chain(mask, optax.multi_transform(rates, groups)), 2)


def injected():
    """Learning rate and keep as hyper-parameters in the state: read, log or set them there."""
    rate = optax.linear_schedule(1e-2, 0.0, 10)
    tx = optax.inject_hyperparams(rm.rm_lora)(rate, keep=0.5, penalty=0.0, start_step=0)
    state = tx.init(params)
    update = jax.jit(tx.update)
    history = []
    for keep in (1.0, 0.5, 0.0):
        state.hyperparams["keep"] = jnp.float32(keep)
        _, state = update(gradients, state, params)
        history.append((state.hyperparams["learning_rate"], rm.kept_fraction(state)))
    return history, state


def without_params():
    """The mask needs gradients only."""
    return mask.update(gradients, mask.init(params))


def extra_arguments():
    """Extra arguments reach the transformations that want them: here the loss, for a plateau."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = optax.chain(rm.lazily_masked(optax.sgd(1.0), 2, draw="exact", start_step=0), plateau)
    return run(tx, 3, value=1.0)


def main():
    examples = (multi_steps, masked, lora_plus, injected, without_params, extra_arguments)
    return {example.__name__: example() for example in examples}


if __name__ == "__main__":
    for name, (_, state) in main().items():
        print(f"{name}: the last step kept {float(rm.kept_fraction(state)):.0%} of the factors")
