"""A whole training step of a decoder never holds the logits of all tokens."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import slow

import rmlora_jax as rm
from rmlora_jax.aot.counts import collectives
from rmlora_jax.models.decoder import Decoder, DecoderConfig
from rmlora_jax.models.losses import LOGITS
from rmlora_jax.parallel.mesh import all_devices, base_sharding, in_rows, spread
from rmlora_jax.train.step import Constants, State, make_train_step

ROWS, LENGTH, VOCABULARY, WIDTH = 64, 64, 50_000, 64
LOGITS_OF_ALL = ROWS * LENGTH * VOCABULARY


def compiled_step(tied: bool, lora: rm.LoRA, accumulate: int = 1, fsdp: int = 1):
    """The step of a decoder of two layers, compiled for one group of devices from shapes alone."""
    devices = all_devices(limit=fsdp, fsdp=fsdp)
    config = DecoderConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, tie_word_embeddings=tied,
    )  # fmt: skip
    model = rm.adapt(Decoder(config, VOCABULARY), lora)

    def apply(params, inputs, rngs, **options):
        return model.apply({"params": params}, *inputs, rngs=rngs, **options)

    def loss(call, labels):
        total, found = call(method="losses")
        return total, jnp.sum(labels), {"correct": jnp.sum(found["correct"], dtype=jnp.float32)}

    def prepare(key, positions, data, batch):
        batch = jax.tree.map(in_rows, batch) if fsdp > 1 else batch
        return (batch["tokens"], batch["targets"], batch["weights"]), batch["weights"]

    def shapes(key):
        tokens = jnp.zeros((1, 8), jnp.int32)
        trainable, frozen = rm.split(model.init(key, tokens)["params"], lora)
        return trainable, frozen, tx.init(trainable)

    tx = optax.adam(1e-3)
    trainable, frozen, opt_state = jax.eval_shape(shapes, jax.random.key(0))
    if fsdp > 1:
        frozen = jax.tree.map(lambda v: v.update(sharding=base_sharding(v.shape, devices)), frozen)
    number = jax.ShapeDtypeStruct((), jnp.uint32)
    integers = jax.ShapeDtypeStruct((ROWS * accumulate, LENGTH), jnp.int32)
    batch = {"tokens": integers, "targets": integers}
    batch["weights"] = jax.ShapeDtypeStruct(integers.shape, jnp.float32)
    state = State(jax.ShapeDtypeStruct((), jnp.int32), trainable, opt_state)
    step = make_train_step(apply, loss, tx, prepare, accumulate=accumulate)
    constants = Constants(frozen, {}, number, number)
    return spread(step, devices).lower(state, constants, batch).compile()


@pytest.mark.parametrize(
    "tied, lora, accumulate",
    [
        (True, rm.LoRA(4, target=".*(query|value|embed)"), 1),
        slow(False, rm.LoRA(4, target=".*(query|value)", train="head"), 1),
        slow(False, rm.LoRA(4, target=".*(query|head)", execution="merged"), 1),
        slow(True, rm.DoRA(4, target=".*(query|value|embed)"), 2),
    ],
    ids=["tied and adapted", "trained", "merged", "accumulated"],
)
def test_a_step_never_holds_the_logits_of_all_tokens(tied, lora, accumulate):
    """Of 4,096 tokens and 50,000 words all logits take 781 MiB, and a step that holds them needs
    2,430 MiB beside its arguments. A chunk has 640 tokens, and XLA's plan on a CPU three arrays of
    122 MiB: logits, their gradient, and one of both transposed."""
    step = compiled_step(tied, lora, accumulate)
    largest = max(
        np.prod([int(n) for n in dims.split(",")])
        for dims in re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", step.as_text())
    )
    assert LOGITS / 2 < largest <= LOGITS < LOGITS_OF_ALL / 6
    assert step.memory_analysis().temp_size_in_bytes < 4 * 4 * largest


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_split_over_devices_stays_split(tied):
    """They exchange the states of a chunk and their gradients, never the head's weight."""
    step = compiled_step(tied, rm.LoRA(4, target=".*(query|value)"), fsdp=2)
    found = collectives(step.as_text())
    gathered = [one.bytes for one in found if one.kind == "all-gather"]
    assert max(gathered) < VOCABULARY * WIDTH * 4 / 10
    # Half of a chunk's three arrays on each device, and some states beside them.
    assert step.memory_analysis().temp_size_in_bytes < 5 * 4 * LOGITS / 2
