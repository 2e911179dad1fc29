"""The loss of packed rows against that of examples one by one, by a plain formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmlora_jax as rm
from rmlora_jax.data.packing import filled, pack
from rmlora_jax.data.tokens import Tokens
from rmlora_jax.hub.published import PUBLISHED
from rmlora_jax.models import Decoder, DecoderConfig
from rmlora_jax.tasks import targets
from rmlora_jax.tasks.sft_feed import Split, attention_flops
from rmlora_jax.tasks.task import Outputs, measured
from rmlora_jax.train.setup import token_flops

LENGTH = 24
LENGTHS = np.array([9, 5, 17, 3, 12, 24, 2, 7])
CONFIG = DecoderConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=24,
)  # fmt: skip


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    offsets = np.cumsum([0, *LENGTHS])
    wanted = rng.random(offsets[-1]) < 0.6
    wanted[offsets[1:] - 1] = True
    return Tokens(rng.integers(0, 50, offsets[-1]).astype(np.int32), wanted, offsets)


@pytest.fixture(scope="module")
def model():
    """An adapted decoder with B that is not 0, its trainable and its frozen parameters."""
    base = Decoder(CONFIG, 50)
    lora = rm.LoRA(rank=2, alpha=4, target=r"layers/.*|embed|head")
    adapted = rm.adapt(base, lora)
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = base.init(jax.random.key(0), tokens)["params"]
    params = rm.attach(jax.random.key(1), adapted, params, tokens)
    noise = jax.random.key(2)
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(noise, x.shape), params)
    return adapted, *rm.split(params, lora)


def batch_of(examples, rows, length=LENGTH):
    return jax.tree.map(jnp.asarray, filled(examples, rows, length, pad_id=0))


def mean_loss(model, batch, packed=True):
    """Mean over targets as a step has it, the counts and the gradients."""
    adapted, trainable, frozen = model
    inputs, labels = targets.shifted(batch, packed)

    def total(trainable):
        call = functools.partial(adapted.apply, {"params": rm.join(trainable, frozen)}, *inputs)
        total, weight, counts = targets.objective().loss(call, labels)
        assert weight is not None
        return total / weight, (weight, counts)

    return jax.jit(jax.value_and_grad(total, has_aux=True))(trainable)


@pytest.fixture(scope="module")
def one_by_one(model, examples):
    """Sum of losses, right tokens and targets of each example, from the logits of it alone."""
    adapted, trainable, frozen = model
    params, found = rm.join(trainable, frozen), []
    tokens = np.zeros((len(LENGTHS), LENGTH), np.int32)  # what is behind a token does not matter
    for row, start, n in zip(tokens, examples.offsets, LENGTHS, strict=False):
        row[:n] = examples.ids[start : start + n]
    logits = np.asarray(jax.jit(adapted.apply)({"params": params}, tokens), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, (start, n) in enumerate(zip(examples.offsets, LENGTHS, strict=False)):
        wanted = np.asarray(examples.types[start + 1 : start + n], bool)
        own, following = np.arange(n - 1), tokens[i, 1:n]
        right = logits[i, own].argmax(-1) == following
        found.append((-log_p[i, own, following][wanted].sum(), right[wanted].sum(), wanted.sum()))
    return np.array(found)


def test_packed_rows_have_the_loss_and_gradients_of_examples_one_by_one(
    model, examples, one_by_one
):
    rows = pack(LENGTHS, LENGTH, seed=3)
    assert len(rows) < len(LENGTHS) - 2
    packed = batch_of(examples, [rows[i] for i in range(len(rows))])
    (loss, (weight, counts)), grads = mean_loss(model, packed)
    losses, right, of = one_by_one.T
    assert weight == of.sum() and counts["token_accuracy"] == right.sum()
    np.testing.assert_allclose(loss, losses.sum() / of.sum(), rtol=1e-6)
    assert counts["tokens"] == LENGTHS.sum() and counts["places"] == len(rows) * LENGTH

    single = batch_of(examples, [[i] for i in range(len(LENGTHS))])
    (other, _), alone = mean_loss(model, single, packed=False)
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    for path, x in jax.tree.leaves_with_path(grads):
        y = functools.reduce(lambda tree, key: tree[key.key], path, alone)
        norm = np.linalg.norm(y)
        assert norm > 1e-4, path
        assert np.linalg.norm(x - y) <= 1e-5 * norm, path


def test_an_evaluation_counts_each_target_once(model, examples, one_by_one):
    adapted, trainable, frozen = model
    rows = pack(LENGTHS, LENGTH, seed=0)
    inputs, labels = targets.shifted(batch_of(examples, [rows[i] for i in range(len(rows))]))
    call = functools.partial(adapted.apply, {"params": rm.join(trainable, frozen)}, *inputs)
    rows_of = jax.jit(lambda: targets.objective().predict(call, labels))
    found = {k: np.asarray(x) for k, x in rows_of().items()}
    losses, right, of = one_by_one.T
    for i in range(len(rows)):
        assert found["weight"][i] == of[rows[i]].sum()
        np.testing.assert_allclose(found["loss"][i], losses[rows[i]].sum(), rtol=1e-5)
    sums = {"token_accuracy": found["token_accuracy"]}
    outputs = Outputs(np.arange(len(rows)), None, None, found["loss"], found["weight"], sums)
    figures = measured(outputs, targets.METRICS)
    assert list(figures) == ["loss", "token_accuracy", "perplexity"]
    np.testing.assert_allclose(figures["loss"], losses.sum() / of.sum(), rtol=1e-6)
    np.testing.assert_allclose(figures["perplexity"], np.exp(losses.sum() / of.sum()), rtol=1e-5)
    assert figures["token_accuracy"] == right.sum() / of.sum()
    assert outputs.finite.all()
    lost = outputs._replace(losses=np.where(np.arange(len(rows)) == 1, np.nan, outputs.losses))
    assert lost.finite.tolist() == [i != 1 for i in range(len(rows))]
    assert np.isnan(measured(lost, ("loss",))["loss"])


def test_nothing_is_predicted_across_examples_or_from_padding():
    batch = {
        "tokens": jnp.array([[3, 4, 5, 6, 0, 0]]),
        "wanted": jnp.array([[1, 1, 1, 1, 1, 0]], bool),
        "segments": jnp.array([[1, 1, 2, 2, 0, 0]]),
        "positions": jnp.array([[0, 1, 0, 1, 0, 0]]),
    }
    (_, following, weights, *more), (labels, lengths) = targets.shifted(batch)
    assert weights.tolist() == [[1, 0, 1, 0, 0, 0]] and following[0, 0] == 4
    assert lengths.tolist() == [4] and labels is weights and len(more) == 2
    assert len(targets.shifted(batch, packed=False)[0]) == 3


def test_the_work_of_a_token_is_counted():
    # Llama 3.1 8B, rank 16, texts of 4,096 tokens: about 34 GFLOP a token.
    c = DecoderConfig.from_hf(PUBLISHED["meta-llama/Llama-3.1-8B-Instruct"])
    one = Tokens(np.zeros(4096, np.int32), np.ones(4096, np.uint8), np.array([0, 4096]))
    attention = attention_flops(c, Split(one, np.array([0]), None))
    assert attention == 32 * 4 * 4096 * 4097 / 2
    model = Decoder(c, c.vocab_size)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    frozen = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    weights = 8_030_261_248 - 128_256 * 4096 - 65 * 4096  # neither embedding nor norms
    assert token_flops({}, frozen) == 4 * weights
    assert 33e9 < token_flops({}, frozen) + 3 * attention < 34e9
    # A window of two keys, texts of 3 and 1 tokens: 1 + 2 + 2 and 1 keys in each of two layers.
    small = DecoderConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2,
                          sliding_window=2, layer_types=("sliding_attention", "full_attention"))
    two = Tokens(np.zeros(4, np.int32), np.ones(4, np.uint8), np.array([0, 3, 4]))
    keys = (1 + 2 + 2 + 1) + (1 + 2 + 3 + 1)
    assert attention_flops(small, Split(two, np.array([0, 1]), None)) == 4 * 8 * keys / 4
