"""Rows of the table: behaviour."""

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from . import models as m
from .checks import (
    all_adapted,
    difference,
    randomised,
    require,
    same_as_merged,
    same_at_initialisation,
)
from .hosts import NNX, Linen
from .libraries import Case, not_offered
from .rows import Row

NET = Case(m.LinenNet, m.NNXNet, (m.X,))
LAYER = Case(
    lambda: nn.Dense(256), lambda: nnx.Linear(512, 256, rngs=m.rngs()), (jnp.ones((2, 512)),)
)
NORMED = Case(m.LinenNormed, m.NNXNormed, (m.X,))


def rows():
    def row(name, check, case=NET):
        return Row("Behaviour", name, case, check)

    return [
        row("equal descriptions trace once", _traces_once),
        row("new factor values never retrace", _never_retraces),
        row("adapted modules pickle", _pickles),
        row("adapted modules deep-copy", _copies),
        row("alpha: the scale alpha / r", _alpha),
        row("rank by pattern", _rank_pattern),
        row("alpha by pattern", _alpha_pattern),
        row("layers left out by a rule", _exclude),
        row("leaves trained in full chosen by a rule", _train),
        row("several adapters on one base: switching", _switching),
        row("… and disabling", _disabling),
        row("A: kaiming, normal, gaussian, orthogonal", _inits, LAYER),
        row("PiSSA, with the base corrected", _pissa),
        row("a rule that matches nothing is an error with the nearest paths", _matches_nothing),
        row("1-D parameters are never adapted", _one_dimensional, NORMED),
        row("merging into parameters of the base", _merges),
        row("a batch whose examples use different adapters", _per_example),
        row(
            "models held by a class as `.module` and `.params`",
            _held,
            Case(m.LinenNet, None, (m.X,)),
        ),
    ]


def _traces_once(case, library, framework):
    base, traces = case.base(framework), []
    first, second = (library.fit(case, framework, base=base) for _ in range(2))

    def forward(static, values, x):
        traces.append(static)
        return first.host.call(static, values, x)

    jitted = jax.jit(forward, static_argnums=0)
    hashes = {hash(fitted.host.static) for fitted in (first, second)}
    require(len(hashes) == 1, "equal descriptions hash differently")
    for fitted in (first, second):
        jitted(fitted.host.static, fitted.values, *case.args)
    require(len(traces) == 1, f"traced {len(traces)} times")


def _never_retraces(case, library, framework):
    fitted, traces = library.fit(case, framework), []

    def forward(values, x):
        traces.append(1)
        return fitted.host.run(values, x)

    jitted = jax.jit(forward)
    outputs = [jitted(randomised(fitted, seed=seed), *case.args) for seed in (1, 2)]
    require((outputs[0] != outputs[1]).any(), "the factors change nothing")
    require(len(traces) == 1, f"traced {len(traces)} times")


def _same_after(case, library, framework, convert):
    fitted = library.fit(case, framework)
    module = getattr(fitted.host, "module", None)
    if module is None:  # by hand: the model is the base
        module, fitted = fitted.base.module, fitted.base
        host, values = fitted, fitted.values
    else:
        host, values = fitted.host, randomised(fitted)
    expected = host.run(values, *case.args)
    copied = convert(module)
    copied = NNX(copied) if isinstance(host, NNX) else Linen(copied, host.variables)
    require((copied.run(values, *case.args) == expected).all(), "the copy computes something else")


def _pickles(case, library, framework):
    _same_after(case, library, framework, lambda module: pickle.loads(pickle.dumps(module)))


def _copies(case, library, framework):
    _same_after(case, library, framework, copy.deepcopy)


def _alpha(case, library, framework):
    for alpha in (1.0, 20.0):
        fitted = library.fit(case, framework, alpha=alpha)
        require(fitted.scale("body/kernel") == alpha / 2, "another scale")
        same_as_merged(fitted)


def _rank_pattern(case, library, framework):
    fitted = library.fit(case, framework, rank_pattern=(("head", 3),))
    shapes = {path: fitted.values[a].shape[-1] for path, (a, _) in fitted.pairs.items()}
    require(shapes == {"body/kernel": 2, "head/kernel": 3}, f"ranks {shapes}")
    same_as_merged(fitted)


def _alpha_pattern(case, library, framework):
    fitted = library.fit(case, framework, alpha_pattern=(("head", 30.0),))
    all_adapted(fitted)
    require(fitted.scale("head/kernel") == 15, "another scale")
    same_as_merged(fitted)


def _exclude(case, library, framework):
    fitted = library.fit(case, framework, exclude="head")
    require(list(fitted.pairs) == ["body/kernel"], f"factors for {list(fitted.pairs)}")
    same_as_merged(fitted)


def _train(case, library, framework):
    fitted = library.fit(case, framework, target="body")
    found = library.chosen(fitted, "head")
    wanted = {*fitted.factors, "head/kernel", "head/bias"}
    require(found == wanted, f"chosen: {', '.join(sorted(found ^ wanted))}")


def _switching(case, library, framework):
    fitted, traces = library.fit(case, framework), []
    adapters = {
        name: {path: randomised(fitted, seed=seed)[path] for path in fitted.factors}
        for name, seed in (("en", 1), ("de", 2))
    }
    rest = {path: v for path, v in fitted.values.items() if path not in fitted.factors}

    @jax.jit
    def forward(factors, rest):
        traces.append(1)
        return fitted.host.run({**rest, **factors}, *case.args)

    for adapter in adapters.values():
        found = forward(adapter, rest)
        expected = fitted.base.run(fitted.expected_values({**rest, **adapter}), *case.args)
        require(difference(found, expected) < 1e-5, "another output than the merged model's")
    require(len(traces) == 1, "switching traces again")


def _disabling(case, library, framework):
    fitted = library.fit(case, framework)
    values = randomised(fitted)
    # The base, as it is left by adapting it, on the leaves that are its own.
    own = {path: values[fitted.locate(path)] for path in fitted.base.values}
    found = fitted.base.run(own, *case.args)
    expected = case.base(framework)
    require((found == expected.run(expected.values, *case.args)).all(), "the base has changed")


def _inits(case, library, framework):
    size_in, rank = 512, 4
    for init in ("kaiming", "normal", "gaussian", "orthogonal"):
        fitted = library.fit(case, framework, rank=rank, init=init)
        ((path_a, path_b),) = fitted.pairs.values()
        a, b = (np.asarray(fitted.values[path], np.float64) for path in (path_a, path_b))
        require(a.shape == (size_in, rank), f"A is {a.shape}")
        require(not b.any(), "B is not 0")
        std, bound = a.std(), np.abs(a).max()
        holds = {
            "kaiming": bound <= size_in**-0.5 and abs(std * (3 * size_in) ** 0.5 - 1) < 0.1,
            "normal": abs(std / 0.02 - 1) < 0.1,
            "gaussian": abs(std * rank - 1) < 0.1,
            "orthogonal": np.abs(a.T @ a - np.eye(rank)).max() < 1e-5,
        }
        require(holds[init], f"{init}: standard deviation {std:.3g}")


def _pissa(case, library, framework):
    fitted = library.fit(case, framework, init="pissa")
    a, b = (np.asarray(fitted.values[path]) for path in fitted.pairs["body/kernel"])
    u, s, vt = np.linalg.svd(np.asarray(fitted.base.values["body/kernel"]))
    principal = (u[:, :2] * s[:2]) @ vt[:2]
    found = fitted.scale("body/kernel") * a @ b
    require(np.abs(found - principal).max() < 1e-5, "A B is not the principal part")
    found = fitted.host.run(fitted.values, *case.args)
    expected = fitted.base.run(fitted.base.values, *case.args)
    require(difference(found, expected) < 1e-5, "the output changed")


def _matches_nothing(case, library, framework):
    try:
        fitted = library.fit(case, framework, target="bodi")
    except ValueError as error:
        require("body" in str(error), f"the error does not say what is near: {error}")
        return
    require(False, f"no error, {len(fitted.factors)} factors")


def _one_dimensional(case, library, framework):
    fitted = library.fit(case, framework)
    require(list(fitted.pairs) == ["fc/kernel"], f"factors for {list(fitted.pairs)}")
    same_at_initialisation(fitted)


def _merges(case, library, framework):
    fitted = library.fit(case, framework)
    if fitted.merge is None:
        not_offered("a merge")
    values = randomised(fitted)
    found, expected = fitted.merge(values), fitted.expected_values(values)
    require(found.keys() == expected.keys(), "not the parameters of the base")
    off = max(difference(found[path], expected[path]) for path in fitted.pairs)
    require(off < 1e-6, f"off by {off:.1e}")


def _per_example(case, library, framework):
    fitted = library.fit(case, framework)
    seeds, ids = (1, 2, 3), jnp.array([2, 0])
    sets = [randomised(fitted, seed=seed) for seed in seeds]
    stacked = {path: jnp.stack([s[path] for s in sets]) for path in fitted.factors}
    rest = {path: v for path, v in fitted.values.items() if path not in fitted.factors}
    (x,) = case.args

    @jax.jit
    def forward(stacked, rest, ids, x):
        gathered = jax.tree.map(lambda v: v[ids], stacked)
        return jax.vmap(lambda factors, x: fitted.host.run({**rest, **factors}, x))(gathered, x)

    found = forward(stacked, rest, ids, x)
    for i, index in enumerate(ids):
        merged = fitted.expected_values(sets[index])
        require(difference(found[i], fitted.base.run(merged, x[i])) < 1e-5, "wrong numbers")


def _held(case, library, framework):
    fitted = library.fit(case, framework)
    values = randomised(fitted)
    holder = m.Holder(fitted.base.module, fitted.base.variables["params"])
    expected = m.Holder(fitted.base.module, unflatten_dict(fitted.expected_values(values), sep="/"))
    if hasattr(library, "held"):
        holder = library.held(case, holder)
        require(flatten_dict(holder.params, sep="/").keys() == values.keys(), "other parameters")
        holder.params = unflatten_dict(values, sep="/")
    elif isinstance(fitted.host, Linen):
        holder.module, holder.params = fitted.host.module, unflatten_dict(values, sep="/")
    else:
        holder.params = unflatten_dict(fitted.host.merged(values), sep="/")
    require(difference(holder(*case.args), expected(*case.args)) < 1e-5, "another output")
