"""Cross-entropy in chunks against numpy and against optax on all logits at once."""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from marks import slow

import rmlora_jax as rm
from rmlora_jax.aot.counts import flops
from rmlora_jax.models.losses import LOGITS, chunked_cross_entropy

VOCABULARY, WIDTH, ROWS, LENGTH = 37, 8, 4, 11


class Model(nn.Module):
    """An embedding, a layer and a head; ``chunk`` 0 is optax on all logits."""

    chunk: int | None = 8  # two tokens of each row: the last chunk is half padding
    tied: bool = False
    bias: bool = False
    cap: float | None = None
    vocabulary: int = VOCABULARY
    width: int = WIDTH
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, targets, weights):
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="embed")
        x = nn.Dense(self.width, dtype=self.dtype, name="body")(jnp.tanh(embed(tokens)))
        dense = nn.Dense(self.vocabulary, use_bias=self.bias, dtype=self.dtype, name="head")
        head = embed if self.tied else dense

        def logits(head, x):
            z = (head.attend if self.tied else head)(x).astype(jnp.float32)
            return z if self.cap is None else self.cap * jnp.tanh(z / self.cap)

        if self.chunk == 0:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits(head, x), targets)
            return jnp.sum(losses * weights), {"loss": losses}
        return chunked_cross_entropy(logits, head, x, targets, weights, chunk=self.chunk)


class Head(nn.Module):
    """A head alone, on given hidden states."""

    chunk: int | None = 8
    vocabulary: int = VOCABULARY
    bias: bool = True
    cap: float | None = None

    @nn.compact
    def __call__(self, x, targets, weights):
        def logits(head, x):
            z = head(x)
            return z if self.cap is None else self.cap * jnp.tanh(z / self.cap)

        head = nn.Dense(self.vocabulary, use_bias=self.bias, name="head")
        return chunked_cross_entropy(logits, head, x, targets, weights, chunk=self.chunk)


def batch(rows=ROWS, length=LENGTH, vocabulary=VOCABULARY, seed=0):
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, vocabulary, (2, rows, length)).astype(np.int32)
    weights = rng.uniform(0.5, 2, (rows, length)) * (rng.uniform(size=(rows, length)) > 0.3)
    return tokens, targets, weights.astype(np.float32)


def drawn(model, *inputs, seed=1):
    """Parameters N(0, 0.4^2), factors B among them."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda v: rng.normal(0, 0.4, v.shape).astype(np.float32), shapes)


def close(found, wanted, tolerance=1e-6):
    """Leaf by leaf, relative to the norm of the leaf."""
    for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        other = np.asarray(other, np.float64)
        assert np.linalg.norm(own - other) <= tolerance * np.linalg.norm(other)


def in_numpy(x, kernel, bias, targets, weights, cap):
    """Total, losses, hits and the gradients of x, kernel and bias, by hand in float64."""
    x, kernel, bias = (np.asarray(v, np.float64) for v in (x, kernel, bias))
    z = cap * np.tanh((x @ kernel + bias) / cap)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    hot = np.eye(kernel.shape[1])[targets]
    losses = -np.log((p * hot).sum(-1)) * (weights > 0)
    dz = weights[..., None] * (p - hot) * (1 - (z / cap) ** 2)
    hits = (z.argmax(-1) == targets) & (weights > 0)
    gradients = dz @ kernel.T, np.einsum("bnd,bnv->dv", x, dz), dz.sum((0, 1))
    return (weights * losses).sum(), losses, hits, gradients


@pytest.mark.parametrize("chunk", [1, 8, slow(20), 1000, slow(None)])
def test_values_and_gradients_are_those_of_a_formula_in_numpy(chunk):
    model, (_, targets, weights) = Head(chunk, cap=2.0), batch()
    x = np.random.default_rng(3).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    params = drawn(model, x, targets, weights)
    params["head"]["kernel"] *= 2  # so that the cap acts
    targets[0, :6] = np.argmax(x[0, :6] @ params["head"]["kernel"] + params["head"]["bias"], -1)

    def total(params, x):
        return model.apply({"params": params}, x, targets, weights)

    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (value, found), (own, dx) = run(params, x)
    kernel, bias = params["head"]["kernel"], params["head"]["bias"]
    wanted, losses, hits, gradients = in_numpy(x, kernel, bias, targets, weights, 2.0)
    assert 2 <= hits.sum() < (weights > 0).sum() < weights.size
    assert value.dtype == found["loss"].dtype == jnp.float32
    close((value, found["loss"], dx, own["head"]["kernel"], own["head"]["bias"]),
          (wanted, losses, *gradients))  # fmt: skip
    np.testing.assert_array_equal(found["correct"], hits)


FORMS = {
    "trained": ({"bias": True}, None),
    "tied": ({"tied": True, "cap": 3.0}, None),
    "factored": ({"bias": True, "cap": 3.0}, rm.LoRA(2, alpha_pattern=((".*head", 7.0),))),
    "merged": ({"bias": True}, rm.LoRA(2, execution="merged", alpha_pattern=((".*head", 7.0),))),
    "factored, tied": ({"tied": True}, rm.LoRA(2, target="embed|body")),
    "merged, tied": ({"tied": True}, rm.LoRA(2, target="embed", execution="merged")),
    "DoRA": ({"bias": True}, rm.DoRA(2)),
    "DoRA, merged": ({"bias": True}, rm.DoRA(2, execution="merged")),
    "DoRA, tied": ({"tied": True}, rm.DoRA(2)),
    "AdaLoRA": ({}, rm.AdaLoRA(2)),
    "AdaLoRA, tied, merged": ({"tied": True}, rm.AdaLoRA(2, execution="merged")),
    "SoRA": ({}, rm.SoRA(2)),
}
QUICK = ("factored", "merged", "factored, tied")


@pytest.mark.parametrize("name", [n if n in QUICK else slow(n) for n in FORMS])
def test_every_form_has_the_gradients_of_all_logits_at_once(name):
    """Differentiated outside of jit: JAX traces the gradient's rules when ``adapt`` has ended."""
    fields, lora = FORMS[name]
    inputs = batch()
    model, plain = Model(**fields), Model(**fields, chunk=0)
    if lora is not None:
        model, plain = rm.adapt(model, lora), rm.adapt(plain, lora)
    params = drawn(model, *inputs)

    @jax.jit
    def totals(params):
        return tuple(m.apply({"params": params}, *inputs)[0] for m in (model, plain))

    (found, wanted), pull = jax.vjp(totals, params)
    close(found, wanted)
    # Two float32 programs, each a few roundings from the truth.
    close(pull((1.0, 0.0)), pull((0.0, 1.0)))


@pytest.fixture(scope="module")
def adapted():
    """(total of the model, total of optax), each of (trainable, *inputs), and the trainable."""
    lora, inputs = rm.LoRA(2, train="body"), batch()
    model, plain = (rm.adapt(Model(chunk=chunk, bias=True), lora) for chunk in (8, 0))
    trainable, frozen = rm.split(drawn(model, *inputs), lora)

    def total_of(model):
        def total(trainable, *inputs):
            return model.apply({"params": rm.join(trainable, frozen)}, *inputs)[0]

        return total

    return total_of(model), total_of(plain), trainable


def in_micro_batches(total):
    def accumulated(trainable, *inputs):
        halves = [x.reshape(2, -1, *x.shape[1:]) for x in inputs]

        def add(sums, half):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(total)(trainable, *half)), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), trainable))
        return jax.lax.scan(add, zeros, halves)[0]

    return accumulated


def over_devices(checked):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def made(total):
        def step(*args):
            value, gradients = jax.value_and_grad(total)(*args)
            # Checked, JAX itself adds up the gradients of what all devices share.
            sums = value if checked else (value, gradients)
            sums = jax.lax.psum(sums, "data")
            return (sums, gradients) if checked else sums

        specs = (whole, rows, rows, rows)
        return jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=checked)

    return made


@pytest.mark.parametrize(
    "transformed",
    [
        lambda total: jax.value_and_grad(jax.checkpoint(total)),
        in_micro_batches,
        over_devices(False),
        over_devices(True),
    ],
    ids=["remat", "scan", "shard_map", "checked shard_map"],
)
def test_transformations_change_nothing(adapted, transformed):
    total, plain, trainable = adapted
    found = jax.jit(transformed(total))(trainable, *batch())
    close(found, jax.jit(jax.value_and_grad(plain))(trainable, *batch()))


@pytest.mark.parametrize("outer", ["vmap of grad", slow("grad of vmap")])
def test_many_adapters_at_once(adapted, outer):
    total, plain, trainable = adapted
    several = jax.tree.map(lambda v: jnp.stack([v, 2 * v, -v]), trainable)

    def run(total):
        if outer == "vmap of grad":
            return jax.vmap(jax.grad(lambda own: total(own, *batch())))(several)
        return jax.grad(lambda s: jax.vmap(lambda own: total(own, *batch()))(s).sum())(several)

    close(*jax.jit(lambda: (run(total), run(plain)))())


def test_what_logits_closes_over_has_its_gradient():
    class Scaled(nn.Module):
        chunk: int

        @nn.compact
        def __call__(self, x, targets, weights):
            scale = self.param("scale", nn.initializers.constant(1.5), (VOCABULARY,))
            head = nn.Dense(VOCABULARY, name="head")
            if not self.chunk:
                z = scale * head(x)
                losses = optax.softmax_cross_entropy_with_integer_labels(z, targets)
                return jnp.sum(weights * losses)
            f = lambda head, x: scale * head(x)  # noqa: E731
            return chunked_cross_entropy(f, head, x, targets, weights, chunk=self.chunk)[0]

    _, *rest = batch()
    x = jax.random.normal(jax.random.key(5), (ROWS, LENGTH, WIDTH))
    params = Scaled(8).init(jax.random.key(0), x, *rest)
    found, wanted = (jax.jit(jax.grad(Scaled(c).apply))(params, x, *rest) for c in (8, 0))
    close(found, wanted)


# What it costs

BIG = {"rows": 2, "length": 512, "vocabulary": 2048, "width": 32}
PRODUCT = 2 * BIG["rows"] * BIG["length"] * BIG["vocabulary"] * BIG["width"]  # flops


def costly(of: str, chunk: int | None = 64):
    """A compiled and a traced program of the loss of a head, differentiated by ``of``."""
    model = Head(chunk, vocabulary=BIG["vocabulary"], bias=False)
    shape = BIG["rows"], BIG["length"]
    x, weights = jnp.zeros((*shape, BIG["width"])), jnp.ones(shape)
    targets = jnp.zeros(shape, jnp.int32)
    params = {"head": {"kernel": jnp.zeros((BIG["width"], BIG["vocabulary"]))}}

    def total(params, x, targets, weights):
        return model.apply({"params": params}, x, targets, weights)[0]

    wanted = {"": (), "x": 1, "kernel": 0, "both": (0, 1)}[of]
    function = total if of == "" else jax.grad(total, wanted)
    traced = jax.jit(function).trace(params, x, targets, weights)
    return traced, traced.lower().compile()


@pytest.mark.parametrize("of, products", [("", 1), ("x", 2), ("kernel", 2), ("both", 3)])
def test_products_with_the_weight_of_the_head(of, products):
    """A frozen head costs two; a test of the compiled program is beside this one."""
    traced, compiled = costly(of)
    assert flops(traced) == products * PRODUCT
    # XLA counts the body of the loop over 16 chunks once, and some element by element.
    own = compiled.cost_analysis()["flops"] * 16
    assert products * PRODUCT < own < (products + 0.7) * PRODUCT


@pytest.mark.parametrize("of", ["x", "both"])
def test_logits_of_all_tokens_never_exist(of):
    """The largest array of the program has the logits of a chunk, and few of them exist at once."""
    _, compiled = costly(of)
    sizes = [
        np.prod([int(n) for n in dims.split(",")])
        for dims in re.findall(r"\b(?:f32|pred|s32)\[([\d,]+)\]", compiled.as_text())
    ]
    assert max(sizes) == 64 * BIG["vocabulary"]
    whole = BIG["rows"] * BIG["length"] * BIG["vocabulary"] * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 3  # a chunk has a sixteenth


def test_a_chunk_has_as_many_tokens_as_fill_its_logits():
    text = str(costly("x", chunk=None)[0].jaxpr)
    assert BIG["rows"] * BIG["length"] * BIG["vocabulary"] < LOGITS
    assert "length=1\n" in text


# Numbers that are not finite, and bfloat16


def at(value, place, weight=1.0, target=0):
    """Total, losses, hits and the gradient of z, whose token 1 has the logit ``value``."""
    z = np.zeros((1, 3, 5), np.float32)
    z[0, 1, place] = value
    targets, weights = np.array([[0, target, 1]]), np.array([[1, weight, 1]], np.float32)

    class Given(nn.Module):
        @nn.compact
        def __call__(self, z):
            head = nn.Dense(1, name="head")  # not used
            return chunked_cross_entropy(lambda head, z: z, head, z, targets, weights, chunk=2)

    run = jax.jit(jax.value_and_grad(lambda z: Given().apply({"params": {}}, z), has_aux=True))
    (total, found), gradient = run(z)
    loss, correct = np.asarray(found["loss"][0]), np.asarray(found["correct"][0])
    return float(total), loss, correct, np.asarray(gradient[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_give_such_losses(value):
    for place in (0, 3):
        total, losses, correct, gradient = at(value, place)
        assert not np.isfinite(total) and not correct[1]
        np.testing.assert_array_equal(np.isfinite(losses), [True, False, True])
        assert np.isnan(gradient[1]).any() and np.isfinite(gradient[[0, 2]]).all()


def test_an_impossible_target_has_an_infinite_loss_and_an_impossible_other_none():
    total, losses, *_ = at(-np.inf, 0)
    assert total == losses[1] == np.inf
    _, losses, _, gradient = at(-np.inf, 3)
    np.testing.assert_allclose(losses, np.log([5, 4, 5]), rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("target", [-1, 5, -100, 2**31 - 1])
def test_a_target_outside_of_the_vocabulary_counts_as_nan_or_not_at_all(target):
    total, losses, _, gradient = at(0, 0, target=target)
    assert np.isnan(total) and np.isnan(losses[1]) and np.isnan(gradient[1]).all()
    total, losses, correct, gradient = at(0, 0, target=target, weight=0.0)
    np.testing.assert_array_equal(correct, [True, False, False])  # the first of equals is 0
    np.testing.assert_allclose(losses, [np.log(5), 0, np.log(5)], rtol=1e-6)
    assert total == losses.sum() and (gradient[1] == 0).all()


def test_bfloat16_states_have_float32_sums():
    """With a kernel of 0 the total is 3,000 log V; bfloat16 would stop near 256 log V."""
    model = dataclasses.replace(Model(chunk=8, dtype=jnp.bfloat16), width=4)
    tokens, targets, weights = (np.ones((2, 1500), dtype) for dtype in (int, int, np.float32))
    params = model.init(jax.random.key(0), tokens, targets, weights)["params"]
    params = jax.tree.map(lambda v: v.astype(jnp.bfloat16), params)
    params["head"]["kernel"] *= 0

    def total(params):
        return model.apply({"params": params}, tokens, targets, weights)[0]

    value, gradients = jax.jit(jax.value_and_grad(total))(params)
    np.testing.assert_allclose(value, 3000 * np.log(VOCABULARY), rtol=1e-6)
    own = gradients["head"]["kernel"]
    assert own.dtype == jnp.bfloat16
    # Every token adds x (1/V - hit): the sum is exact to one rounding of a chunk's, and one more.
    x = np.tanh(np.asarray(params["embed"]["embedding"][1], np.float32))
    x = x @ np.asarray(params["body"]["kernel"], np.float32)
    wanted = 3000 * np.outer(x, 1 / VOCABULARY - np.eye(VOCABULARY)[1])
    np.testing.assert_allclose(np.asarray(own, np.float32), wanted, rtol=0.03)


def test_dropout_on_the_way_into_the_heads_factors_differs_between_chunks():
    lora, inputs = rm.LoRA(2, target="head", dropout=0.5), batch()
    tokens = np.zeros_like(inputs[0])
    model = rm.adapt(Model(), lora)
    params = drawn(model, tokens, *inputs[1:])
    ones = tokens, np.zeros_like(tokens), np.ones_like(inputs[2])
    run = jax.jit(lambda key: model.apply({"params": params}, *ones, rngs={"dropout": key})[1])
    loss, again = (np.asarray(run(jax.random.key(2))["loss"]) for _ in range(2))
    np.testing.assert_array_equal(loss, again)
    # All tokens are equal and only dropout tells them apart: 2^8 masks, for 44 tokens.
    assert len(np.unique(loss.round(5))) > 30


# Misuse


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"weights": np.ones((ROWS, 3))}, ValueError, r"\(4, 3\) must have the shapes"),
        ({"targets": np.ones((ROWS, LENGTH))}, TypeError, "targets are float"),
        ({"chunk": 0}, ValueError, "chunk is 0"),
    ],
)
def test_misuse_is_named(change, error, words):
    ones = np.ones((ROWS, LENGTH))
    fields = {"targets": ones.astype(int), "weights": ones, "chunk": 4} | change
    model = Head(fields.pop("chunk"))
    with pytest.raises(error, match=words):
        model.init(jax.random.key(0), jnp.ones((ROWS, LENGTH, WIDTH)), *fields.values())
