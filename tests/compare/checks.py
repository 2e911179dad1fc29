"""What rows ask of an adapted model: a check that does not hold raises ``Failed``."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from .libraries import Case, Failed, Fitted


def require(holds, reason: str):
    if not holds:
        raise Failed(reason)


def randomised(fitted: Fitted, size=0.3, seed=2):
    """The parameters with random factors: B = 0 hides everything."""
    values = dict(fitted.values)
    for i, path in enumerate(sorted(fitted.factors)):
        key = jax.random.fold_in(jax.random.key(seed), i)
        values[path] = (size * jax.random.normal(key, values[path].shape)).astype(
            values[path].dtype
        )
    return values


def all_adapted(fitted: Fitted):
    """Every weight that the row names has factors."""
    wanted = [path for path in fitted.base.values if re.fullmatch(fitted.case.weights, path)]
    require(wanted, "the row names no weight")
    missing = [path for path in wanted if path not in fitted.pairs]
    require(not missing, f"no factors for {', '.join(missing)}")


def same_at_initialisation(fitted: Fitted, *args, **kwargs):
    """Both jitted: the output is the base's bit for bit, and of its dtype."""
    args = args or fitted.case.args
    base, host = fitted.base, fitted.host
    expected = jax.jit(lambda v: base.run(v, *args, **kwargs))(base.values)
    found = jax.jit(lambda v: host.run(v, *args, **kwargs))(fitted.values)
    require(found.dtype == expected.dtype, f"{found.dtype} output, the base's is {expected.dtype}")
    same = np.asarray(found).tobytes() == np.asarray(expected).tobytes()
    require(same, f"differs at initialisation by {difference(found, expected):.1e}")


def same_as_merged(fitted: Fitted, *args, tolerance=1e-5, **kwargs):
    """With random factors: the output is the base's on W + s A B; likewise the library's merge."""
    args = args or fitted.case.args
    base, host, values = fitted.base, fitted.host, randomised(fitted)
    run_base = jax.jit(lambda v: base.run(v, *args, **kwargs))
    expected = run_base(fitted.expected_values(values))
    found = jax.jit(lambda v: host.run(v, *args, **kwargs))(values)
    if fitted.case.or_delta is not None and difference(found, expected) > tolerance:
        case = dataclasses.replace(fitted.case, delta=fitted.case.or_delta)
        fitted = dataclasses.replace(fitted, case=case)
        expected = run_base(fitted.expected_values(values))
    require(found.shape == expected.shape, f"output of shape {found.shape}, not {expected.shape}")
    require(difference(expected, run_base(base.values)) > 1e-2, "the row's factors change nothing")
    off = difference(found, expected)
    require(off <= tolerance, f"differs from the merged model by {off:.1e}")
    if fitted.merge is not None:
        off = difference(run_base(fitted.merge(values)), expected)
        require(off <= tolerance, f"its merge differs by {off:.1e}")


def adapts(case: Case, library, framework, **options):
    """Factors on every weight; nothing changes at first; then it is the formula."""
    fitted = library.fit(case, framework, **options)
    all_adapted(fitted)
    same_at_initialisation(fitted)
    same_as_merged(fitted)


def gradients(fitted: Fitted, values, chosen, *args, **kwargs):
    """Of the sum of squares of the output, by the parameters at the paths ``chosen``."""
    args = args or fitted.case.args
    rest = {path: value for path, value in values.items() if path not in chosen}

    def loss(part):
        return jnp.sum(jnp.square(fitted.host.run({**rest, **part}, *args, **kwargs)))

    return jax.jit(jax.grad(loss))({path: values[path] for path in chosen})


def difference(found, expected) -> float:
    """The largest difference, relative to the largest expected value."""
    found, expected = (np.asarray(v, np.float64) for v in (found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def equations(jaxpr):
    """Every equation of a jaxpr, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"),
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
            elif hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)
