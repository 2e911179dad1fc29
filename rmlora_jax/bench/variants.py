"""One training step of each method, and the floor below them, ready to be timed.

All have one signature: (state, frozen, batch) -> (state, output). ``state`` is donated; ``frozen``
is an argument and never changes; a batch is (inputs, labels).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import rmlora_jax as rm
from rmlora_jax.aot.counts import inner_programs
from rmlora_jax.bench.measure import Program
from rmlora_jax.bench.models import MODULES, Entry, tokens
from rmlora_jax.optim.precision import clip_by_norm
from rmlora_jax.parallel import memory

VARIANTS = ("floor", "head", "lora", "reg_only", "mask_only", "rm_lora", "adalora", "sora", "full")
USUAL = ("floor", "lora", "rm_lora", "adalora", "sora", "full")

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


def task_loss(logits, labels) -> jax.Array:
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


def compile_variant(variant: Variant, base: dict, batches: Sequence[tuple]) -> Program:
    """Compiles the step for these shapes.

    Each stretch begins with a new state and a step that is not timed, so that the states of several
    variants are never on the device together. It goes through ``batches`` in a circle, and ends
    when the last state and output are there.
    """
    start, frozen = jax.jit(variant.start), variant.frozen(base)
    state = jax.eval_shape(start, base, batches[0][0])
    began = time.perf_counter()
    traced = jax.jit(variant.step, donate_argnums=0).trace(state, frozen, batches[0])
    program = traced.lower().compile()
    seconds = time.perf_counter() - began

    def stretch(steps: int) -> float:
        state = start(base, batches[0][0])
        state, out = jax.block_until_ready(program(state, frozen, batches[-1]))
        began = time.perf_counter()
        for i in range(steps):
            state, out = program(state, frozen, batches[i % len(batches)])
        jax.block_until_ready((state, out))
        return time.perf_counter() - began

    facts = {
        "framework": "jax",
        "compile_seconds": seconds,
        "execution": execution_of(traced.jaxpr, variant.lora, frozen),
        "trained_parameters": 0 if variant.lora is None else _count(state[0]),
        **_memory(program),
    }
    return Program(variant.name, stretch, facts)


def _count(trainable) -> int:
    return sum(x.size for x in jax.tree.leaves(trainable))


def _memory(program) -> dict[str, Any]:
    """What XLA plans, in bytes: ``memory_bytes`` and its parts; nothing where it does not tell."""
    plan = memory.planned(program)
    if not plan:
        return {}
    parts = {"arguments" if kind == "argument" else kind: size for kind, size in plan.items()}
    return {"memory_bytes": memory.needed(program), "memory_parts": parts}


def execution_of(jaxpr, lora: rm.LoRA | None, frozen: dict) -> str | None:
    """"merged" where W + s A B is formed for any adapted weight, else "factored".

    Args:
      jaxpr: the step's, as ``jax.jit(step).trace(...).jaxpr`` has it.
      lora: what the step adapts; None, or a description without targets, for one without factors.
      frozen: the base, arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      None for a step without factors.
    """
    if lora is None or lora.target is None:
        return None
    # A weight has no axis of the rank's size; stacks of so many biases, and what the penalty
    # multiplies, have one.
    shapes = {leaf.shape[-2:] for leaf in jax.tree.leaves(frozen)}
    weights = {shape for shape in shapes if len(shape) == 2 and lora.rank not in shape}
    merges = any(_forms_weight(e, lora.rank, weights) for e in _equations(jaxpr.jaxpr))
    return "merged" if merges else "factored"


def _forms_weight(equation, rank: int, weights: set) -> bool:
    """Whether an equation is A @ B, of one layer or of a stack of layers, in the shape of W.

    The last axis of one meets the last but one of the other: x^T g, the gradient of a weight, which
    has the same shapes where the batch is as large as the rank, contracts the same axis of both.
    """
    if equation.primitive.name != "dot_general":
        return False
    left, right = (v.aval.shape for v in equation.invars)
    (of_left, of_right), (stacked, _) = equation.params["dimension_numbers"]
    out = equation.outvars[0].aval.shape
    return (
        [left[i] for i in of_left] == [rank]
        and {len(left) - of_left[0], len(right) - of_right[0]} == {1, 2}
        and out[-2:] in weights
        and len(out) == 2 + len(stacked)
        and len(right) == 2 + len(stacked)
    )


def _equations(jaxpr) -> Iterator:
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_programs(equation.params):
            yield from _equations(inner)
