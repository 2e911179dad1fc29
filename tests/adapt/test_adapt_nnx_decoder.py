"""A Llama-like NNX decoder is fine-tuned end to end: scanned, rematerialised, tied, RM-LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.adapted_nnx import arrays, call
from fixtures.decoder import Config, Decoder, generate
from flax import nnx

import rmlora_jax as rm

C = Config()
LORA = rm.LoRA(rank=4, alpha=16, target=r"blocks/.*|embed", train=r".*norm\d?", dropout=0.05)


def sequences(key, count=16, length=12):
    """Each token is the one before plus 3, modulo the vocabulary."""
    start = jax.random.randint(key, (count, 1), 0, C.vocabulary)
    return (start + 3 * jnp.arange(length)) % C.vocabulary


def next_token_loss(model, ids):
    logits = model(ids[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


@pytest.fixture(scope="module")
def trained():
    base = Decoder(C, nnx.Rngs(0))
    before, ids = arrays(base), sequences(jax.random.key(9))
    outputs = call(base, ids), generate(base, ids[:2, :4], 5)
    model = rm.adapt(base, LORA, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, rm.rm_lora(2e-2, penalty=0.01, keep=0.5), wrt=LORA.trainable)

    @nnx.jit
    def step(model, optimizer, ids):
        wrt = nnx.DiffState(0, LORA.trainable)
        loss, grads = nnx.value_and_grad(next_token_loss, argnums=wrt)(model, ids)
        optimizer.update(model, grads)
        return loss

    start = arrays(model)
    model.train()
    losses = [float(step(model, optimizer, sequences(jax.random.key(i)))) for i in range(60)]
    model.eval()
    return base, before, outputs, model, start, losses, ids


def test_every_layer_of_the_blocks_and_the_embedding_is_adapted(trained):
    model = trained[3]
    factors = {p.rpartition("/")[0] for p in arrays(model, nnx.LoRAParam)}
    layers = [f"attention/{n}" for n in ("query", "key", "value", "out")]
    layers += [f"mlp/{n}" for n in ("gate", "up", "down")]
    assert factors == {"embed", *(f"blocks/{layer}" for layer in layers)}
    assert model.blocks.attention.query.lora_a.shape == (2, 1, 32, 4)  # interleaved, so marked
    assert model.blocks.attention.out.lora_a.shape == (2, 32, 4)


def test_the_loss_falls_below_a_quarter(trained):
    losses = trained[5]
    assert losses[0] > 2.5
    assert np.mean(losses[-10:]) < 0.25 * losses[0]


def test_only_factors_and_what_train_matches_moved(trained):
    _, before, _, model, start, _, _ = trained
    after = arrays(model)
    moved = {p for p, v in after.items() if np.any(np.asarray(v) != np.asarray(start[p]))}
    norms = {p for p in after if p.endswith("/scale")}
    assert len(norms) == 3
    assert moved == norms | set(arrays(model, nnx.LoRAParam))
    for path, value in before.items():
        if path not in norms:
            np.testing.assert_array_equal(after[path], value)


def test_the_base_given_to_adapt_is_as_it_was(trained):
    base, before, (logits, tokens), model, _, _, ids = trained
    for path, value in arrays(base).items():
        np.testing.assert_array_equal(value, before[path])
    np.testing.assert_array_equal(call(base, ids), logits)
    np.testing.assert_array_equal(generate(base, ids[:2, :4], 5), tokens)
    assert np.abs(call(model, ids) - logits).max() > 1


def test_the_merged_decoder_has_the_same_logits(trained):
    base, _, _, model, _, _, ids = trained
    merged = rm.merge(model, LORA)
    assert nnx.graphdef(merged) == nnx.graphdef(base)
    expected = call(model, ids)
    found = call(merged, ids)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(generate(merged, ids[:2, :4], 5), generate(model, ids[:2, :4], 5))
