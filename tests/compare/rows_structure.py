"""Rows of the table: structure of the model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from . import models as m
from .checks import (
    adapts,
    all_adapted,
    difference,
    gradients,
    randomised,
    require,
    same_as_merged,
    same_at_initialisation,
)
from .libraries import Case
from .rows import Row

NET = Case(m.LinenNet, m.NNXNet, (m.X,))
NET_LINEN = Case(m.LinenNet, None, (m.X,))
NET_NNX = Case(None, m.NNXNet, (m.X,))


def rows():
    def row(name, case, check=adapts):
        return Row("Structure", name, case, check)

    def model(linen, nnx_, **fields):
        return Case(linen, nnx_, (m.X,), **fields)

    again = nn.remat(m.LinenBlock)
    return [
        row("blocks in a loop", model(m.LinenLooped, m.NNXLooped)),
        row(
            "nn.remat / nnx.remat",
            model(lambda: m.LinenLooped(again), lambda: m.NNXLooped(remat=True)),
        ),
        row("nn.scan / nnx.scan over stacked blocks", model(m.LinenScanned, m.NNXScanned, stack=1)),
        row("nn.vmap / nnx.vmap", model(m.LinenMapped, m.NNXMapped, stack=1)),
        row(
            "scan of remat",
            model(lambda: m.LinenScanned(again), lambda: m.NNXScanned(remat=True), stack=1),
        ),
        row("a module called twice: one adapter, gradients add", _twice(), _gradients_add),
        row("setup-style module", NET_LINEN),
        row("compact module", Case(m.LinenTwice, None, (m.X,))),
        row("a method other than `__call__`", NET, _other_method),
        row("BatchNorm", model(m.LinenNormed, m.NNXNormed, weights="fc/kernel"), _normed),
        row(
            "`mutable` passes through",
            model(m.LinenNormed, None, weights="fc/kernel"),
            _mutable,
        ),
        row("nnx.split / nnx.merge", NET_NNX, _split_and_merge),
        row(
            "a Llama-style decoder fine-tunes (grouped queries, rotary, scan of remat)",
            Case(None, m.NNXDecoder, (m.IDS,), weights="layers/.*kernel", stack=1),
            _fine_tunes,
        ),
    ]


def _twice():
    return Case(m.LinenTwice, m.NNXTwice, (m.X,))


def _gradients_add(case, library, framework):
    adapts(case, library, framework)
    fitted = library.fit(case, framework)
    require(len(fitted.factors) == 2, f"{len(fitted.factors)} factors for one layer")
    values = randomised(fitted)
    found = gradients(fitted, values, fitted.factors)

    # The chain rule through the merged weight, which is used twice.
    def loss(factors):
        merged = fitted.expected_values({**values, **factors})
        return jnp.sum(jnp.square(fitted.base.run(merged, *case.args)))

    expected = jax.grad(loss)({path: values[path] for path in fitted.factors})
    for path in fitted.factors:
        off = difference(found[path], expected[path])
        require(off < 1e-4, f"the gradient of a factor is off by {off:.1e}")


def _other_method(case, library, framework):
    fitted = library.fit(case, framework, method="encode", target="body")
    require(list(fitted.pairs) == ["body/kernel"], f"factors for {list(fitted.pairs)}")
    same_at_initialisation(fitted, method="encode")
    same_as_merged(fitted, method="encode")


def _normed(case, library, framework):
    fitted = library.fit(case, framework, target="fc")
    all_adapted(fitted)
    same_at_initialisation(fitted)
    same_as_merged(fitted)


def _mutable(case, library, framework):
    fitted = library.fit(case, framework, target="fc")
    values = randomised(fitted)
    how = {"train": True, "mutable": ["batch_stats"]}
    _, found = fitted.host.run(values, *case.args, **how)
    _, expected = fitted.base.run(fitted.expected_values(values), *case.args, **how)
    found, expected = (np.asarray(v["batch_stats"]["norm"]["mean"]) for v in (found, expected))
    require(difference(found, expected) < 1e-5, "other running statistics than the merged model")
    require(np.abs(found).max() > 0, "the running statistics did not move")


def _split_and_merge(case, library, framework):
    fitted = library.fit(case, framework)
    values = randomised(fitted)
    module = fitted.host.with_values(values) if hasattr(fitted.host, "with_values") else None
    if module is None:  # by hand: the split is that of the base
        same_as_merged(fitted)
        return
    graph, factors, rest = nnx.split(module, nnx.LoRAParam, ...)
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(factors)}
    require(paths == set(fitted.factors), f"nnx.LoRAParam selects {sorted(paths)}")
    found = nnx.merge(graph, factors, rest)(*case.args)
    expected = fitted.base.run(fitted.expected_values(values), *case.args)
    require(difference(found, expected) < 1e-5, "another output after split and merge")


def _fine_tunes(case, library, framework):
    fitted = library.fit(case, framework, target="layers/.*")
    all_adapted(fitted)
    same_at_initialisation(fitted)
    same_as_merged(fitted)
    trained = {path: fitted.values[path] for path in fitted.factors}
    rest = {path: v for path, v in fitted.values.items() if path not in trained}
    labels = jnp.roll(case.args[0], -1, axis=1)

    def loss(trained):
        logits = fitted.host.run({**rest, **trained}, *case.args)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimiser = optax.adam(0.03)

    @jax.jit
    def step(trained, state):
        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(trained, updates), state, value

    state, first = optimiser.init(trained), float(loss(trained))
    for _ in range(40):
        trained, state, value = step(trained, state)
    require(value < 0.5 * first, f"the loss went from {first:.2f} to {float(value):.2f} only")
