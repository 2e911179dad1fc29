"""Rows of new tokens, trained apart from the tables: the numbers of a model whose tables hold them,
and the gradients that whole tables would have in these rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from marks import slow

import rmlora_jax as rm
from rmlora_jax.models import Decoder, DecoderConfig
from rmlora_jax.models.new_tokens import rows_apart, rows_together, with_trained_rows

V, D = 23, 16
CASES = [(True, (20, 21, 22)), (False, (3, 20, 22)), slow(True, (3, 20, 22)), slow(False, (22,))]
NEXT = (20, 21, 22)  # the last tokens, as when a table has grown


def model_of(tied: bool, tokens=(), dtype=jnp.float32):
    config = DecoderConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, tie_word_embeddings=tied, embed_scale=2.0,
        final_logit_softcapping=5.0, initializer_range=0.3,
    )  # fmt: skip
    return Decoder(config, V, dtype=dtype, new_tokens=tokens)


@pytest.fixture(scope="module")
def ids():
    drawn = np.random.default_rng(0).integers(0, V, (2, 12)).astype(np.int32)
    drawn[:, 3:6] = NEXT
    return drawn


@functools.cache
def params_of(tied: bool):
    return model_of(tied).init(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]


def stale(params, tokens):
    """The same, with other values where the tables have the rows of these tokens."""
    new = rows_apart(jax.tree.map(lambda x: x + 7.0, params), tokens)["new_tokens"]
    return rows_together(params | {"new_tokens": new}, tokens)


@pytest.mark.parametrize("tied, tokens", CASES)
def test_the_tables_have_no_say_in_these_rows(tied, tokens, ids):
    """Logits, losses and cached steps are those of the plain model with the rows in its tables."""
    params = params_of(tied)
    apart = rows_apart(params, tokens)
    assert {k: v.shape for k, v in apart["new_tokens"].items()} == dict.fromkeys(
        ["embed", "head"][: 2 - tied], (len(tokens), D))
    again = rows_together(apart, tokens)
    for path, value in flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(flatten_dict(again, sep="/")[path], value)
    apart = stale(params, tokens) | {"new_tokens": apart["new_tokens"]}
    assert np.abs(apart["embed"]["embedding"] - params["embed"]["embedding"])[tokens,].min() > 6
    plain, own = model_of(tied), model_of(tied, tokens)
    wanted, found = (jax.jit(m.apply)({"params": p}, ids)
                     for m, p in ((plain, params), (own, apart)))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    bare = jax.jit(plain.apply)({"params": stale(params, tokens)}, ids)
    assert np.abs(np.asarray(bare) - np.asarray(wanted)).max() > 0.5


@pytest.mark.parametrize("tied, tokens", CASES)
def test_gradients_are_those_of_the_rows_of_whole_tables(tied, tokens, ids):
    """Through the chunked loss; the tables get a gradient of 0 in these rows."""
    params = params_of(tied)
    weights = np.ones(ids.shape, np.float32)

    def loss(model, params):
        return model.apply({"params": params}, ids, np.roll(ids, -1, 1), weights,
                           method="losses")[0]

    whole = jax.jit(jax.grad(functools.partial(loss, model_of(tied))))(params)
    found = jax.jit(jax.grad(functools.partial(loss, model_of(tied, tokens))))(
        rows_apart(params, tokens))
    index = np.array(tokens)
    np.testing.assert_allclose(
        found["new_tokens"]["embed"], whole["embed"]["embedding"][index], atol=2e-5)
    assert not np.asarray(found["embed"]["embedding"])[index].any()
    others = np.setdiff1d(np.arange(V), index)
    np.testing.assert_allclose(found["embed"]["embedding"][others],
                               whole["embed"]["embedding"][others], atol=2e-5)
    if not tied:
        np.testing.assert_allclose(
            found["new_tokens"]["head"], whole["head"]["kernel"].T[index], atol=2e-5)


def test_the_tables_are_no_part_of_the_gradient(ids):
    """Of a step with factors nothing as large as a table is differentiated or summed up: the
    backward pass has no product whose result is a table."""
    lora = with_trained_rows(rm.LoRA(rank=2, target="layers/.*"), NEXT)
    model = rm.adapt(model_of(True, NEXT), lora)
    apart = rows_apart(params_of(True), NEXT)
    params = rm.attach(jax.random.key(0), model, apart, jnp.asarray(ids))
    trainable, frozen = rm.split(params, lora)
    shapes = {k: np.shape(v) for k, v in flatten_dict(trainable, sep="/").items()}
    assert shapes["new_tokens/embed"] == (3, D) and (V, D) not in shapes.values()

    def loss(trainable):
        variables = {"params": rm.join(trainable, frozen)}
        return model.apply(variables, ids, ids, np.ones(ids.shape, np.float32),
                           method="losses")[0]

    made = jax.make_jaxpr(jax.grad(loss))(trainable)
    products = [e for e in _equations(made.jaxpr) if e.primitive.name == "dot_general"]
    results = [np.shape(v.aval) for e in products for v in e.outvars]
    assert (ids.shape[0], ids.shape[1], V) in results  # the logits
    assert not {(V, D), (D, V)} & set(results)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()),
                                     is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


@pytest.mark.parametrize("target", [".*", "layers/.*|head"])
def test_factors_of_a_table_are_refused(target):
    """PEFT refuses them with the same tokens, too."""
    with pytest.raises(ValueError, match=r"trained in (embed|head), which LoRA.target"):
        with_trained_rows(rm.LoRA(rank=2, target=target), NEXT)
    assert with_trained_rows(rm.LoRA(rank=2, target=target), ()).train is None
