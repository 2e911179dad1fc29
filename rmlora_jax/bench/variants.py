"""One training step of each method, and the floor below them, ready to be timed.

All have one signature: (state, frozen, batch) -> (state, output). ``state`` is donated; ``frozen``
is an argument and never changes; a batch is (inputs, labels).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import rmlora_jax as rm
from rmlora_jax.aot.counts import flops
from rmlora_jax.bench.measure import Program
from rmlora_jax.bench.models import (
    MODULES,
    Entry,
    build,
    random_batches,
    random_params,
    tokens,
)
from rmlora_jax.optim.factors import ADAPTED
from rmlora_jax.optim.precision import clip_by_norm
from rmlora_jax.parallel import memory

VARIANTS = ("floor", "head", "lora", "reg_only", "mask_only", "rm_lora", "adalora", "sora", "full")
USUAL = ("floor", "lora", "rm_lora", "adalora", "sora", "full")

HEAD = r"head|pooler"
HALVES = {"rm_lora": (0.1, 0.5), "reg_only": (0.1, 1.0), "mask_only": (0.0, 0.5)}  # penalty, keep
LEARNING_RATE = 1e-3


class Variant(NamedTuple):
    """A step that can be timed; ``start`` and ``step`` are to be compiled."""

    name: str  # one of VARIANTS
    start: Callable[[dict, jax.Array], Any]  # base parameters, inputs -> state in new buffers
    frozen: Callable[[dict], dict]  # base parameters -> those that the step does not change
    step: Callable[[Any, dict, tuple], tuple[Any, Any]]  # as said above
    lora: rm.LoRA | None  # what is trained; None for the floor


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
    return _trained(name, model, *_method(name, rank, MODULES[modules], execution))


def task_loss(logits, labels) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _floor(model: nn.Module, entry: Entry) -> Variant:
    """What any method that trains in the first layer must compute on a frozen model: the loss, and
    its gradient with respect to the input of the encoder. Nothing is trained.

    The gradient, (B, N, D), is that of a 0 that a Flax interceptor adds to the output of ``embed``.
    The state is the sum of the losses so far: a step must wait for the one before it.
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
        return rm.LoRA(rank, **fields), rm.rm_lora(
            LEARNING_RATE, penalty=penalty, keep=keep, factors=ADAPTED
        )
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


def step_flops(entry: Entry, batch: int, name: str, rank: int = 4, modules: str = "all") -> int:
    """Floating-point operations of one step, a multiplication and an addition being 2.

    What the method needs, not what a program does: products with the factors are thin, nothing is
    computed again in the backward pass, and a gradient goes no further back than to the lowest
    layer that trains. Only the matrix products of the model are counted, as
    `rmlora_jax.aot.counts.flops` does.

    >>> from rmlora_jax.bench.models import MODELS
    >>> [step_flops(MODELS["tiny"], 8, name) for name in ("floor", "lora", "full")]
    [4489216, 5323776, 6853632]
    """
    model = build(entry, dtype=jnp.float32, base_dtype=jnp.float32, unroll=1, remat="none",
                  attention="xla")
    # The penalties of other methods are products, too: their steps need what LoRA's needs.
    plain = name if name in ("floor", "head", "full") else "lora"
    variant = make_variant(plain, model, entry, rank=rank, modules=modules, execution="factored")
    base = jax.eval_shape(lambda: random_params(model, entry))
    (example,) = jax.eval_shape(lambda: random_batches(entry, batch, 1, model.dtype))
    state = jax.eval_shape(variant.start, base, example[0])
    frozen = jax.eval_shape(variant.frozen, base)
    with jax.disable_jit():  # a scan is a loop: its first layer may need fewer gradients
        return flops(jax.jit(variant.step).trace(state, frozen, example))


def compile_variant(variant: Variant, base: dict, batches: Sequence[tuple]) -> Program:
    """Compiles the step for these shapes.

    A stretch makes its own state, so that only one variant's state is on the device at a time, and
    takes one step that is not timed. It cycles through ``batches`` and ends when the last state and
    output are ready.
    """
    start, frozen = jax.jit(variant.start), variant.frozen(base)
    state = jax.eval_shape(start, base, batches[0][0])
    began = time.perf_counter()
    program = jax.jit(variant.step, donate_argnums=0).lower(state, frozen, batches[0]).compile()
    seconds = time.perf_counter() - began

    def stretch(steps: int) -> float:
        state = start(base, batches[0][0])
        state, out = jax.block_until_ready(program(state, frozen, batches[-1]))
        began = time.perf_counter()
        for i in range(steps):
            state, out = program(state, frozen, batches[i % len(batches)])
        jax.block_until_ready((state, out))
        return time.perf_counter() - began

    lora, execution = variant.lora, None
    if lora is not None and lora.target is not None:
        execution = "merged" if lora.execution == "merged" else "factored"
    trained = [] if lora is None else jax.tree.leaves(state[0])
    facts = {
        "framework": "jax",
        "compile_seconds": seconds,
        "execution": execution,
        "trained_parameters": sum(x.size for x in trained),
    }
    if plan := memory.planned(program):
        facts["memory_bytes"] = memory.needed(program)
        facts["memory_parts"] = {"arguments": plan.pop("argument"), **plan}
    return Program(variant.name, stretch, facts)
