"""One training step of each method, and the floor below them, with one and the same signature.

    (state, frozen, batch) -> (state, output)

``state`` is donated; ``frozen`` is an argument and never changes; a batch is (inputs, labels).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import rmlora_jax as rm
from rmlora_jax.bench.models import Entry, tokens
from rmlora_jax.optim.precision import clip_by_norm

VARIANTS = ("floor", "head", "lora", "reg_only", "mask_only", "rm_lora", "adalora", "sora", "full")
USUAL = ("floor", "lora", "rm_lora", "adalora", "sora", "full")

# What --sweep=modules goes through: name -> target of the adapters.
MODULES = {
    "query+value": r"encoder/layers/attention/(query|value)",
    "attention": r"encoder/layers/attention/.*",
    "mlp": r"encoder/layers/mlp/.*",
    "all": r"encoder/layers/.*",
}
HEAD = r"head|pooler"
HALVES = {"rm_lora": (0.1, 0.5), "reg_only": (0.1, 1.0), "mask_only": (0.0, 0.5)}  # penalty, keep
LEARNING_RATE = 1e-3


class Variant(NamedTuple):
    """A step that can be timed.

    Attributes:
      name: one of ``VARIANTS``.
      start: (base parameters, inputs) -> the first state, in new buffers; to be compiled.
      frozen: base parameters -> those of them that the step reads and does not change.
      step: ``(state, frozen, batch) -> (state, output)``; to be compiled.
      lora: the description of what is trained; None for the floor.
    """

    name: str
    start: Callable[[dict, jax.Array], Any]
    frozen: Callable[[dict], dict]
    step: Callable[[Any, dict, tuple], tuple[Any, Any]]
    lora: rm.LoRA | None


def make_variant(
    name: str,
    model: nn.Module,
    entry: Entry,
    *,
    rank: int = 4,
    modules: str = "all",
    execution: str = "auto",
) -> Variant:
    """The variant ``name`` of a model; all that is trained, and its optimizer, is float32."""
    if name == "floor":
        return _floor(model, entry)
    lora, tx = _method(name, rank, MODULES[modules], execution)
    return _trained(name, model, lora, tx)


def task_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _floor(model: nn.Module, entry: Entry) -> Variant:
    """What any method that trains in the first layer must compute on a frozen model: the loss, and
    its gradient with respect to what enters the encoder.

    Nothing is trained. The gradient, (B, N, D), is taken with respect to a 0 that is added to the
    output of the module ``embed``, by an interceptor of Flax that sees this module alone; all else
    is the model's own code. The state is the sum of the losses so far, so that a step waits for the
    one before it as the other variants' steps do.
    """

    def step(total, base, batch):
        inputs, labels = batch
        zero = jnp.zeros((len(labels), tokens(entry), entry.config.hidden_size), model.dtype)

        def loss(shift):
            def add(following, args, kwargs, context):
                out = following(*args, **kwargs)
                is_embed = context.module.path == ("embed",) and context.method_name == "__call__"
                return out + shift if is_embed else out

            with nn.intercept_methods(add):
                logits = model.apply({"params": base}, inputs)
            return task_loss(logits, labels)

        value, gradient = jax.value_and_grad(loss)(zero)
        return total + value, gradient

    return Variant("floor", lambda base, inputs: jnp.zeros(()), lambda base: base, step, None)


def _method(name: str, rank: int, target: str, execution: str):
    """Description and optimizer: AdamW behind a clip, with what the method adds to them."""
    fields = {"alpha": 4 * rank, "target": target, "train": HEAD, "execution": execution}
    clipped = optax.chain(clip_by_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=0.0))
    if name == "lora":
        return rm.LoRA(rank, **fields), clipped
    if name in HALVES:
        penalty, keep = HALVES[name]
        return rm.LoRA(rank, **fields), rm.rm_lora(LEARNING_RATE, penalty=penalty, keep=keep)
    if name == "adalora":
        plan = {"total_steps": 1000, "initial_steps": 0, "final_steps": 100, "every": 10}
        return rm.AdaLoRA(rank, **fields), rm.adalora(LEARNING_RATE, target=rank / 2, **plan)
    if name == "sora":
        return rm.SoRA(rank, **fields), rm.sora(LEARNING_RATE, sparsity=0.1)
    return rm.LoRA(1, target=None, train=HEAD if name == "head" else ".*"), clipped


def _trained(name, model, lora: rm.LoRA, tx) -> Variant:
    adapted = rm.adapt(model, lora)
    rest = rm.LoRA(1, target=None, train=lora.train)

    def start(base, inputs):
        params = rm.attach(jax.random.key(2), adapted, base, inputs)
        trainable, _ = rm.split(params, lora)
        trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
        return trainable, tx.init(trainable)

    def step(state, frozen, batch):
        trainable, opt_state = state
        inputs, labels = batch

        def loss(trainable):
            logits = adapted.apply({"params": rm.join(trainable, frozen)}, inputs)
            return task_loss(logits, labels)

        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, opt_state = tx.update(gradients, opt_state, trainable)
        return (optax.apply_updates(trainable, updates), opt_state), value

    return Variant(name, start, lambda base: rm.split(base, rest)[1], step, lora)
