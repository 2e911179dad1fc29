"""SoRA's whole training against a re-computation in numpy, and the released optimizer's prox."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import slow
from test_adalora import (
    LAYERS,
    MODULES,
    as_modules,
    jax_loss,
    numpy_gradient,
    on_four_devices,
    to_jax,
)
from test_adalora import problem as problem_without_gates

from rmlora_jax.optim.sora import sora, surviving, surviving_parameters

STEPS, RATE, CLIP, DECAY, L1 = 40, 0.03, 0.3, 0.05, 2.0
SPARSITY = {"paper": 0.6, "authors_exact": 0.012}
VARIANTS = pytest.mark.parametrize("proximal", ["paper", slow("authors_exact")])
BOTH = pytest.mark.parametrize("proximal", ["paper", "authors_exact"])


def problem():
    """(params, base, x, y), with gates of N(0, 0.3^2)."""
    params, *data = problem_without_gates()
    rng = np.random.default_rng(1)
    for name in ("encoder", "out"):
        gates = params[name]["lora_e"]
        params[name]["lora_e"] = rng.normal(size=gates.shape) * 0.3
    return params, *data


def gate_rate(rate, t):
    return rate * (1 - t / 60) * 0.7


def numpy_prox(proximal, g, rate):
    """The lines of the paper and, one by one, those of the released code."""
    if proximal == "paper":
        xi = rate * SPARSITY[proximal]
        return np.sign(g) * np.maximum(abs(g) - xi, 0)
    xi, g = SPARSITY[proximal], g.copy()
    g[g > xi] -= xi
    g[g < -xi] += xi
    g[abs(g) < xi] = 0
    return g


def numpy_run(proximal, rate, base, x, y, params):
    """The parameters after each step, the norms, and how near a gate came to the threshold."""
    p = as_modules(params)
    m, v = ({k: np.zeros_like(w) for k, w in p.items()} for _ in range(2))
    gates = [f"{n}.e" for n in MODULES]
    count = sum(p[k].size for k in gates)
    records, norms = [], []
    for t in range(STEPS):
        g = numpy_gradient(p, base, x, y)
        for k in gates:
            g[k] = g[k] + L1 * np.sign(p[k]) / count
        norms.append(np.sqrt(sum((w**2).sum() for w in g.values())))
        g = {k: w * min(1, CLIP / norms[-1]) for k, w in g.items()}
        for k in p:
            m[k] = 0.9 * m[k] + 0.1 * g[k]
            v[k] = 0.999 * v[k] + 0.001 * g[k] ** 2
            first, second = 1 - 0.9 ** (t + 1), 1 - 0.999 ** (t + 1)
            if k not in gates:
                step = m[k] / first / (np.sqrt(v[k] / second) + 1e-8) + DECAY * p[k]
                p[k] = p[k] - rate * (1 - t / 50) * step
                continue
            if proximal == "paper":
                step = m[k] / first / (np.sqrt(v[k] / second) + 1e-6)
            else:  # transformers.AdamW
                step = np.sqrt(second) / first * m[k] / (np.sqrt(v[k]) + 1e-6)
            p[k] = numpy_prox(proximal, p[k] - gate_rate(rate, t) * step, gate_rate(rate, t))
        records.append(p.copy())
    return records, norms


def make(proximal, rate):
    return sora(lambda t: rate * (1 - t / 50), sparsity=SPARSITY[proximal], l1=L1, clip=CLIP,
                gate_learning_rate=functools.partial(gate_rate, rate), weight_decay=DECAY,
                proximal=proximal)  # fmt: skip


def jax_run(proximal, rate, base, x, y, params, axis=None):
    """The parameters after each step, stacked."""
    tx = make(proximal, rate)

    def loss(*arguments):
        value = jax_loss(*arguments)
        return value if axis is None else jax.lax.pmean(value, axis)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, base, x, y), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), length=STEPS)[1]


def assert_same(found, records):
    for t, wanted in enumerate(records):
        now = as_modules(jax.tree.map(lambda leaf, t=t: np.asarray(leaf[t]), found))
        for name, value in now.items():
            np.testing.assert_allclose(value, wanted[name], rtol=2e-3, atol=3e-5, err_msg=name)
            if name.endswith(".e"):
                np.testing.assert_array_equal(value == 0, wanted[name] == 0, err_msg=f"{name} {t}")


@BOTH
def test_training_under_jit_against_numpy(proximal):
    params, *data = problem()
    records, norms = numpy_run(proximal, RATE, *data, params)
    assert max(norms) > CLIP > min(norms)
    closed = np.array([[(p[f"{n}.e"] == 0).sum() for n in MODULES] for p in records]).sum(1)
    assert closed[0] < closed[-1] < 15 and len(set(closed)) > 3
    found = jax.jit(functools.partial(jax_run, proximal))(RATE, *to_jax((*data, params)))
    assert_same(found, records)


@VARIANTS
def test_three_learning_rates_under_vmap_against_numpy(proximal):
    params, *data = problem()
    rates = [RATE, RATE / 2, RATE * 1.5]
    runs = jax.jit(jax.vmap(functools.partial(jax_run, proximal), (0, None, None, None, None)))
    found = runs(jnp.array(rates), *to_jax((*data, params)))
    for i, rate in enumerate(rates):
        records, _ = numpy_run(proximal, rate, *data, params)
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], found), records)


@VARIANTS
def test_training_on_four_devices_against_numpy(proximal):
    params, *data = problem()
    run = on_four_devices(functools.partial(jax_run, proximal))
    found = run(RATE, *to_jax((*data, params)))
    assert_same(found, numpy_run(proximal, RATE, *data, params)[0])


@VARIANTS
def test_training_goes_on_after_a_checkpoint(tmp_path, proximal):
    ocp = pytest.importorskip("orbax.checkpoint")
    params, *data = to_jax(problem())
    tx = make(proximal, RATE)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(jax_loss)(params, *data), state, params)
        return optax.apply_updates(params, updates), state

    here = (params, tx.init(params))
    for t in range(12):
        if t == 6:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "state", here)
                checkpointer.wait_until_finished()
                there = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda h=here: h))
            assert jax.tree.structure(there) == jax.tree.structure(here)
            jax.tree.map(np.testing.assert_array_equal, here, there)
        here = step(*here)
        if t >= 6:
            there = step(*there)
    jax.tree.map(np.testing.assert_array_equal, here, there)


def gates(values, dtype=jnp.float32):
    values = jnp.asarray(values, dtype)
    r = values.shape[-1]
    return {"lora_a": jnp.ones((2, r), dtype), "lora_b": jnp.ones((r, 2), dtype), "lora_e": values}


def after_one_step(values, dtype=jnp.float32, **options):
    """Gates after a step without gradient: what the proximal step does alone."""
    params = gates(values, dtype)
    tx = sora(0.5, **options)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert updates["lora_e"].dtype == dtype
    return optax.apply_updates(params, updates)["lora_e"].tolist()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_where_gates_close(dtype):
    """xi = 0.25 in both; only the paper's keeps what is between xi and 2 xi."""
    values = [0.0, 0.125, -0.25, 0.25, 0.375, -0.375, 0.5, -0.5, 1.0, -1.0]
    paper = after_one_step(values, dtype, sparsity=0.5)
    assert paper == [0, 0, 0, 0, 0.125, -0.125, 0.25, -0.25, 0.75, -0.75]
    released = after_one_step(values, dtype, sparsity=0.25, proximal="authors_exact")
    # The released code leaves |g| = xi alone, and lands on xi from 2 xi.
    assert released == [0, 0, -0.25, 0.25, 0, 0, 0.25, -0.25, 0.75, -0.75]
    g = np.array(values)
    g[g > 0.25] -= 0.25
    g[g < -0.25] += 0.25
    g[abs(g) < 0.25] = 0
    assert released == g.tolist()


@VARIANTS
def test_no_sparsity_is_adamw(proximal):
    found = after_one_step([0.0, 0.25, -0.75], sparsity=0.0, proximal=proximal)
    assert found == [0.0, 0.25, -0.75]


@VARIANTS
def test_where_adam_adds_epsilon(proximal):
    """At gradients near epsilon, as those of the gates are while B is small."""
    params = gates([0.5])
    tx = sora(0.1, sparsity=0.0, clip=None, proximal=proximal)
    gradients = params | {"lora_e": jnp.array([1e-5])}
    updates, _ = tx.update(gradients, tx.init(params), params)
    eps = 1e-6 if proximal == "paper" else 1e-6 / np.sqrt(0.001)
    np.testing.assert_allclose(updates["lora_e"], -0.1 * 1e-5 / (1e-5 + eps), rtol=1e-3)


def test_updates_make_zero_exactly_in_any_dtype_of_the_gradients():
    params = gates(np.random.default_rng(0).normal(size=200) * 0.01)
    tx = sora(0.1, sparsity=10.0)
    gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    updates, state = tx.update(gradients, tx.init(params), params)
    assert not optax.apply_updates(params, updates)["lora_e"].any()
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}


@VARIANTS
def test_hyperparameters_may_be_traced_or_schedules(proximal):
    params = to_jax(problem()[0])

    def run(value):
        tx = sora(value, sparsity=value, gate_learning_rate=value, weight_decay=value,
                  proximal=proximal)  # fmt: skip
        return tx.update(params, tx.init(params), params)[0]

    wanted = jax.jit(lambda: run(0.03))()
    for found in (jax.jit(lambda: run(lambda step: 0.03))(), jax.jit(run)(0.03)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)
    with_l1 = jax.jit(lambda l1: sora(0.1, sparsity=0.0, l1=l1).init(params))(0.5)
    assert jax.tree.leaves(with_l1)


def test_gates_have_the_rate_of_all_unless_given():
    params = gates([0.7, -0.5])
    wanted = None
    for rate in (None, 0.1):
        tx = sora(0.1, sparsity=0.5, gate_learning_rate=rate)
        updates, _ = tx.update(params, tx.init(params), params)
        wanted = updates if wanted is None else wanted
        jax.tree.map(np.testing.assert_array_equal, updates, wanted)


@VARIANTS
def test_state_lies_along_the_parameters(proximal):
    params = to_jax(problem()[0])
    tx = make(proximal, 0.1)
    state = optax.tree_map_params(tx, lambda leaf: leaf + 1, tx.init(params))
    ones = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 1 and (leaf == 1).all()]
    assert len(ones) == 2 * len(jax.tree.leaves(params))


def test_figures_of_the_gates():
    params = to_jax(problem()[0])
    params["encoder"]["lora_e"] = params["encoder"]["lora_e"].at[0].set(0).at[1, 2].set(0)
    for figures in (surviving(params), jax.jit(surviving)(params)):
        assert {leaf.dtype.name for leaf in figures.values()} == {"float32"}
        np.testing.assert_allclose(figures["gate_sparsity"], 5 / 15, rtol=1e-6)
        assert float(figures["surviving_directions"]) == 10
    assert surviving_parameters(params) == 7 * (6 + 6) + 3 * (6 + 5)
    runs = jax.tree.map(lambda leaf: jnp.stack([leaf, jnp.ones_like(leaf)]), params)
    np.testing.assert_array_equal(jax.vmap(surviving)(runs)["surviving_directions"], [10, 15])
    assert LAYERS * 4 + 3 == 15


def test_errors():
    one_of = "proximal='exact' must be one of 'paper', 'authors_exact'"
    with pytest.raises(ValueError, match=one_of):
        sora(0.1, sparsity=0.1, proximal="exact")
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"sparsity={bad} must be at least 0"):
            sora(0.1, sparsity=bad)
    tx, params = sora(0.1, sparsity=0.1), gates([1.0, 2.0])
    with pytest.raises(ValueError, match="has no 'lora_e' beside it"):
        tx.init({k: v for k, v in params.items() if k != "lora_e"})
    with pytest.raises(ValueError, match=r"tx.update\(updates, state, params\)"):
        tx.update(params, tx.init(params))
    for figures in (surviving, surviving_parameters):
        with pytest.raises(ValueError, match="no LoRA factors"):
            figures({"head": jnp.ones(3)})
