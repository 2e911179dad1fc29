"""AdaLoRA's whole training against a re-computation of the authors' algorithm in numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from rmlora_jax.optim.adalora import adalora, allocate_rank, budget
from rmlora_jax.optim.diagonals import find_diagonals
from rmlora_jax.optim.precision import in_float32

LAYERS, WIDTH, OUT = 3, 6, 5
SCALE, RATE, ORTHOGONAL, CLIP, DECAY, BETA1, BETA2 = 2.0, 0.03, 0.1, 0.4, 0.05, 0.8, 0.9
# T - t_f = 31 is no multiple of `every`; 7 of the 15 triplets of 4 modules are left.
PLAN = {"total_steps": 40, "target": 1.8, "initial_steps": 6, "final_steps": 9, "every": 4}
OPTIONS = PLAN | {"orthogonal": ORTHOGONAL, "clip": CLIP, "weight_decay": DECAY,
                  "beta1": BETA1, "beta2": BETA2}  # fmt: skip


def problem(seed=6):
    """Three stacked layers of rank 4, one of rank 3 and a head: (params, base, x, y), float64."""
    rng = np.random.default_rng(seed)

    def factors(inner, outer, rank, stack=()):
        return {
            "lora_a": rng.normal(size=(*stack, inner, rank)) * 0.4,
            "lora_b": rng.normal(size=(*stack, rank, outer)) * 0.4,
            "lora_e": np.zeros((*stack, rank)),
        }

    params = {
        "encoder": factors(WIDTH, WIDTH, 4, (LAYERS,)),
        "head": {"kernel": rng.normal(size=(OUT, 3)) * 0.5, "bias": np.zeros(3)},
        "out": factors(WIDTH, OUT, 3),
    }
    base = {
        "encoder": rng.normal(size=(LAYERS, WIDTH, WIDTH)) / np.sqrt(WIDTH),
        "out": rng.normal(size=(WIDTH, OUT)) / np.sqrt(WIDTH),
    }
    return params, base, rng.normal(size=(16, WIDTH)), rng.normal(size=(16, 3))


def to_jax(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def jax_loss(params, base, x, y):
    def layer(x, weight, a, b, e):
        return x @ weight + SCALE * ((x @ a) * e) @ b

    for i in range(LAYERS):
        factors = [params["encoder"][f"lora_{side}"][i] for side in "abe"]
        x = layer(x, base["encoder"][i], *factors)
    x = layer(x, base["out"], *[params["out"][f"lora_{side}"] for side in "abe"])
    return jnp.mean((x @ params["head"]["kernel"] + params["head"]["bias"] - y) ** 2)


# --- the authors' algorithm, a matrix at a time ------------------------------------------------


def as_modules(params):
    """{name: array} of all matrices; a layer of the stack is a module of its own."""
    flat = {f"{i}.{s}": params["encoder"][f"lora_{s}"][i] for i in range(LAYERS) for s in "abe"}
    flat |= {f"out.{s}": params["out"][f"lora_{s}"] for s in "abe"}
    return {k: v.copy() for k, v in (flat | params["head"]).items()}


MODULES = [*map(str, range(LAYERS)), "out"]


def numpy_gradient(p, base, x, y):
    """Back-propagation by hand."""
    weights = [*base["encoder"], base["out"]]
    deltas = [SCALE * p[f"{m}.a"] @ np.diag(p[f"{m}.e"]) @ p[f"{m}.b"] for m in MODULES]
    hidden = [x]
    for weight, delta in zip(weights, deltas, strict=True):
        hidden.append(hidden[-1] @ (weight + delta))
    d = hidden[-1] @ p["kernel"] + p["bias"] - y
    d = 2 * d / d.size
    g = {"kernel": hidden[-1].T @ d, "bias": d.sum(0)}
    d = d @ p["kernel"].T
    for i, m in reversed(list(enumerate(MODULES))):
        a, b, e = (p[f"{m}.{s}"] for s in "abe")
        whole = SCALE * hidden[i].T @ d  # the gradient of Delta W / s, times s
        g[f"{m}.a"] = whole @ b.T * e
        g[f"{m}.b"] = e[:, None] * (a.T @ whole)
        g[f"{m}.e"] = np.einsum("ki,kl,il->i", a, whole, b)
        d = d @ (weights[i] + deltas[i]).T
    return g


def numpy_run(rate, base, x, y, params):
    """The training; a list of records, one a step, and the smallest gap at a threshold."""
    p = as_modules(params)
    m, v, ibar, ubar = ({k: np.zeros_like(w) for k, w in p.items()} for _ in range(4))
    total = sum(p[f"{n}.e"].size for n in MODULES)
    target = int(PLAN["target"] * len(MODULES))
    kept = {n: np.ones(p[f"{n}.e"].size, bool) for n in MODULES}
    records, gaps = [], []
    for t in range(PLAN["total_steps"]):
        g = numpy_gradient(p, base, x, y)
        for n in MODULES:
            a, b, identity = p[f"{n}.a"], p[f"{n}.b"], np.eye(p[f"{n}.e"].size)
            error_a, error_b = a.T @ a - identity, b @ b.T - identity
            weight = 2 * ORTHOGONAL / (2 * len(MODULES))
            g[f"{n}.a"] = g[f"{n}.a"] + weight * a @ error_a / np.linalg.norm(error_a)
            g[f"{n}.b"] = g[f"{n}.b"] + weight * error_b @ b / np.linalg.norm(error_b)
        norm = np.sqrt(sum((w**2).sum() for w in g.values()))
        g = {k: w * min(1, CLIP / norm) for k, w in g.items()}
        for k in p:
            m[k] = 0.9 * m[k] + 0.1 * g[k]
            v[k] = 0.999 * v[k] + 0.001 * g[k] ** 2
            step = m[k] / (1 - 0.9 ** (t + 1)) / (np.sqrt(v[k] / (1 - 0.999 ** (t + 1))) + 1e-8)
            p[k] = p[k] - rate * (1 - t / 50) * (step + DECAY * p[k])
        # From here on RankAllocator.update_and_mask.
        if t < PLAN["total_steps"] - PLAN["final_steps"]:
            for k in p:
                now = abs(p[k] * g[k])
                ibar[k] = BETA1 * ibar[k] + (1 - BETA1) * now
                ubar[k] = BETA2 * ubar[k] + (1 - BETA2) * abs(now - ibar[k])
        if t <= PLAN["initial_steps"]:
            allowed, masks = total, False
        elif t > PLAN["total_steps"] - PLAN["final_steps"]:
            allowed, masks = target, True
        else:
            span = PLAN["total_steps"] - PLAN["final_steps"] - PLAN["initial_steps"]
            coefficient = 1 - (t - PLAN["initial_steps"]) / span
            allowed = int(target + (total - target) * coefficient**3)
            masks = t % PLAN["every"] == 0
        if masks:
            score = {
                n: ibar[f"{n}.e"] * ubar[f"{n}.e"]
                + (ibar[f"{n}.a"] * ubar[f"{n}.a"]).mean(0)
                + (ibar[f"{n}.b"] * ubar[f"{n}.b"]).mean(1)
                for n in MODULES
            }
            ascending = np.sort(np.concatenate(list(score.values())))
            threshold = ascending[total - allowed - 1]
            gaps.append(ascending[total - allowed] / threshold - 1)
            for n in MODULES:
                kept[n] = score[n] > threshold
                p[f"{n}.e"] = np.where(score[n] <= threshold, 0.0, p[f"{n}.e"])
        records.append((p.copy(), ibar.copy(), ubar.copy(), kept.copy(), allowed, masks, norm))
    return records, min(gaps)


# --- the same, with the library ---------------------------------------------------------------


def jax_run(rate, base, x, y, params, axis=None):
    """The training as one scan; what there is after each step, stacked."""
    tx = adalora(lambda t: rate * (1 - t / 50), **OPTIONS)

    def loss(*arguments):
        value = jax_loss(*arguments)
        return value if axis is None else jax.lax.pmean(value, axis)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, base, x, y), state, params)
        params = optax.apply_updates(params, updates)
        found = {k: optax.tree.get(state, k) for k in ("sensitivity", "uncertainty", "kept")}
        return (params, state), (params, *found.values(), optax.tree.get(state, "budget"))

    return jax.lax.scan(step, (params, tx.init(params)), length=PLAN["total_steps"])[1]


def assert_same(found, records):
    for t, (params, ibar, ubar, kept, allowed, *_) in enumerate(records):
        now = jax.tree.map(lambda leaf, t=t: np.asarray(leaf[t]), found)
        assert now[4] == allowed
        for tree, wanted, atol in zip(now, (params, ibar, ubar), (2e-5, 2e-8, 2e-8), strict=False):
            tree = tree if tree is now[0] else tree | {"head": {}}
            for name, value in as_modules(tree).items():
                np.testing.assert_allclose(value, wanted[name], rtol=2e-3, atol=atol, err_msg=name)
        for i, n in enumerate(MODULES):
            e, k = (now[j]["out" if n == "out" else "encoder"]["lora_e"] for j in (0, 3))
            e, k = (e, k) if n == "out" else (e[i], k[i])
            np.testing.assert_array_equal(k, kept[n])
            np.testing.assert_array_equal(e == 0, params[f"{n}.e"] == 0)


def test_the_problem_tries_everything():
    """Clipped and whole gradients, budgets between the ends, triplets that come back."""
    params, *data = problem()
    records, gap = numpy_run(RATE, *data, params)
    assert gap > 0.01  # float32 cannot change the order of scores at a threshold
    norms = [record[-1] for record in records]
    assert max(norms) > CLIP > min(norms)
    assert len({record[4] for record in records}) > 4 and records[-1][4] == 7
    masks = [np.concatenate(list(record[3].values())) for record in records]
    assert any((later & ~earlier).any() for earlier, later in itertools.pairwise(masks))
    assert masks[-1].sum() == 7 and [t for t in range(40) if records[t][5]] == [
        8, 12, 16, 20, 24, 28, 32, 33, 34, 35, 36, 37, 38, 39
    ]  # fmt: skip
    kept = records[-1][3]
    assert len({int(kept[n].sum()) for n in MODULES}) > 1  # modules differ in rank


def test_training_under_jit_against_numpy():
    params, *data = problem()
    found = jax.jit(jax_run)(RATE, *to_jax((*data, params)))
    assert_same(found, numpy_run(RATE, *data, params)[0])
    # What is masked is exactly 0 after every step of the final phase.
    e = np.concatenate([np.ravel(found[0][m]["lora_e"][-1]) for m in ("encoder", "out")])
    assert (e != 0).sum() == 7


def test_three_learning_rates_under_vmap_against_numpy():
    params, *data = problem()
    rates = [RATE, RATE / 2, RATE * 1.5]
    runs = jax.jit(jax.vmap(jax_run, (0, None, None, None, None)))
    found = runs(jnp.array(rates), *to_jax((*data, params)))
    for i, rate in enumerate(rates):
        records, gap = numpy_run(rate, *data, params)
        assert gap > 0.01
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], found), records)


def on_four_devices(run):
    """``run(rate, base, x, y, params, axis=...)`` with x and y spread over four devices."""
    row = np.array(jax.devices()[:4])
    mesh = jax.sharding.Mesh(row, ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P(), P(), P("data"), P("data"), P())
    spread = functools.partial(run, axis="data")
    return jax.jit(jax.shard_map(spread, mesh=mesh, in_specs=specs, out_specs=P()))


def test_training_on_four_devices_against_numpy():
    assert jax.device_count() >= 4
    params, *data = problem()
    found = on_four_devices(jax_run)(RATE, *to_jax((*data, params)))
    assert_same(found, numpy_run(RATE, *data, params)[0])


def test_training_goes_on_after_a_checkpoint(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    params, *data = to_jax(problem())
    tx = adalora(RATE, **OPTIONS)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(jax_loss)(params, *data), state, params)
        return optax.apply_updates(params, updates), state

    here = (params, tx.init(params))
    for t in range(PLAN["total_steps"]):
        if t == 18:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "state", here)
                checkpointer.wait_until_finished()
                there = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda h=here: h))
            assert jax.tree.structure(there) == jax.tree.structure(here)
            jax.tree.map(np.testing.assert_array_equal, here, there)
        here = step(*here)
        if t >= 18:
            there = step(*there)
    jax.tree.map(np.testing.assert_array_equal, here, there)


# --- parts ------------------------------------------------------------------------------------


def test_budget_is_that_of_the_authors_for_any_kind_of_step():
    def theirs(step, initial, target, total, warmup, final):
        if step <= warmup:
            return initial
        if step > total - final:
            return target
        coefficient = 1 - (step - warmup) / (total - final - warmup)
        return int(target + (initial - target) * (coefficient**3))

    for plan in [(864, 576, 2000, 200, 700), (1007, 7, 1001, 0, 1), (144, 72, 300, 17, 0)]:
        names = ("initial", "target", "total_steps", "initial_steps", "final_steps")
        arguments = dict(zip(names, plan, strict=True))
        steps = np.arange(plan[2] + 20)
        wanted = [theirs(int(step), *plan) for step in steps]
        np.testing.assert_array_equal(budget(steps, **arguments), wanted)
        traced = jax.jit(lambda t, kw=arguments: budget(t, **kw))(jnp.asarray(steps))
        np.testing.assert_array_equal(traced, wanted)
        assert traced.dtype == jnp.int32 and isinstance(budget(3, **arguments), np.int32)


def tiny(e=(1.0, 1.0, 1.0), dtype=jnp.float32):
    leaves = {"lora_a": jnp.ones((2, 3)), "lora_b": jnp.ones((3, 2)), "lora_e": jnp.array(e)}
    return {"q": jax.tree.map(lambda leaf: leaf.astype(dtype), leaves)}


def test_ties_at_the_threshold_are_all_masked():
    tx = allocate_rank(optax.sgd(0.0), total_steps=4, target=2, initial_steps=0, final_steps=2,
                       every=1)  # fmt: skip
    params = tiny(e=(1.0, 2.0, 1.0))
    state = tx.init(params)
    np.testing.assert_array_equal(state.kept["q"]["lora_e"], [True] * 3)
    for _ in range(2):
        updates, state = tx.update(tiny(), state, params)
    np.testing.assert_array_equal(state.kept["q"]["lora_e"], [False, True, False])
    np.testing.assert_array_equal(updates["q"]["lora_e"], [-1, 0, -1])
    assert int(state.budget) == 2  # fewer than allowed are left


def test_step_in_bfloat16_is_exactly_zero_and_its_state_float32():
    tx = adalora(0.1, total_steps=4, target=1, initial_steps=0, final_steps=2, every=1)
    params = tiny(e=(0.1, 0.7, 0.3), dtype=jnp.bfloat16)
    gradients = tiny(e=(0.3, 0.2, 0.1))
    state = tx.init(params)
    for _ in range(4):
        updates, state = jax.jit(tx.update)(gradients, state, params)
        params = optax.apply_updates(params, updates)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((updates, params))} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32", "bool"}
    assert (params["q"]["lora_e"] != 0).sum() == 1


def test_state_is_float32_under_x64_too():
    with jax.enable_x64(True):
        params = to_jax(problem()[0], jnp.float64)
        tx = adalora(0.1, **OPTIONS)
        before = tx.init(params)
        updates, after = jax.jit(tx.update)(params, before, params)
        assert updates["out"]["lora_e"].dtype == jnp.float64
        assert optax.tree.get(after, "sensitivity")["out"]["lora_a"].dtype == jnp.float32
        dtypes = [[leaf.dtype for leaf in jax.tree.leaves(state)] for state in (before, after)]
        assert dtypes[0] == dtypes[1]


def test_hyperparameters_may_be_traced_or_schedules():
    params = to_jax(problem()[0])

    def run(value):
        tx = adalora(value, **OPTIONS | {"orthogonal": value, "weight_decay": value})
        return tx.update(params, tx.init(params), params)[0]

    wanted = jax.jit(lambda: run(0.03))()
    for found in (jax.jit(lambda: run(lambda step: 0.03))(), jax.jit(run)(0.03)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


def test_state_lies_along_the_parameters():
    """What optax and checkpoints of sharded runs rely on."""
    params = to_jax(problem()[0])
    tx = adalora(0.1, **OPTIONS)
    state = optax.tree_map_params(tx, lambda leaf: leaf + 1, tx.init(params))
    assert float(optax.tree.get(state, "sensitivity")["out"]["lora_a"][0, 0]) == 1


def test_names_of_diagonals():
    def leaves(prefix):
        shapes = {"a": (2, 3), "b": (3, 4), "e": (3,)}
        return {prefix + side: jnp.ones(shape) for side, shape in shapes.items()}

    tree = {"m": leaves("w_lora_"), "n": {"lora": leaves("")}} | leaves("lora_")
    tree["params"] = {"o": leaves("lora_")}
    found = find_diagonals(tree)
    assert [d.module for d in found] == ["", "m/w", "n", "o"]
    for d in found:
        assert (d.e, d.cost, d.layers, d.rank) == (d.b.index + 1, 6, 1, 3)
    wide = {"lora_a": jnp.ones((4, 8, 2)), "lora_b": jnp.ones((2, 5)), "lora_e": jnp.ones(2)}
    assert [(d.layers, d.cost) for d in find_diagonals(wide)] == [(1, 37)]


@pytest.mark.parametrize("arguments, words", [
    ({"total_steps": 15}, ["total_steps=15", "6 + 9"]),
    ({"total_steps": 0}, ["total_steps=0", "at least 1"]),
    ({"initial_steps": -1}, ["initial_steps=-1", "at least 0"]),
    ({"final_steps": -1}, ["final_steps=-1", "at least 0"]),
    ({"every": 0}, ["every=0", "at least 1"]),
    ({"every": 32}, ["every=32", "steps 7 to 31", "lower every"]),
    ({"every": 40, "final_steps": 0}, ["every=40", "steps 7 to 39"]),
    ({"target": 0}, ["target=0", "above 0"]),
    ({"beta1": 1.0}, ["beta1=1.0"]),
    ({"beta2": 0.0}, ["beta2=0.0"]),
])  # fmt: skip
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as error:
        allocate_rank(optax.sgd(1.0), **PLAN | arguments)
    for word in words:
        assert word in str(error.value)
    with pytest.raises(ValueError):
        adalora(1.0, **OPTIONS | arguments)


@pytest.mark.parametrize("name", ["total_steps", "initial_steps", "final_steps", "every"])
def test_bad_types_are_named(name):
    for value in (7.5, True):
        with pytest.raises(TypeError, match=f"{name}={value}"):
            allocate_rank(optax.sgd(1.0), **PLAN | {name: value})


@pytest.mark.parametrize("arguments, words", [
    ({"target": 3.75}, ["target=3.75", "15 of the 15", "4 modules", "3.75;"]),
    ({"target": 0.2}, ["target=0.2", "0 of the 15", "at least 1"]),
    ({"final_steps": 1}, ["final_steps=1", "every=4", "target of 7", "at least 2"]),
    ({"final_steps": 0}, ["final_steps=0", "at least 2"]),
    ({"total_steps": 8, "final_steps": 0, "every": 7}, ["final_steps=0", "at least 2"]),
])  # fmt: skip
def test_schedules_that_miss_their_target_are_named_at_init(arguments, words):
    tx = allocate_rank(optax.sgd(1.0), **PLAN | arguments)
    with pytest.raises(ValueError) as error:
        tx.init(to_jax(problem()[0]))
    for word in words:
        assert word in str(error.value)


def test_schedules_that_end_on_an_allocation_are_allowed():
    params = to_jax(problem()[0])
    for arguments in ({"total_steps": 41, "final_steps": 1}, {"total_steps": 41, "final_steps": 0}):
        allocate_rank(optax.sgd(1.0), **PLAN | arguments).init(params)


def test_errors_of_the_tree():
    tx = adalora(0.1, **OPTIONS)
    whole = to_jax(problem()[0])
    for side in "abe":
        tree = whole | {"out": {k: v for k, v in whole["out"].items() if k != f"lora_{side}"}}
        with pytest.raises(ValueError, match=f"has no 'out/lora_{side}' beside it.*description"):
            tx.init(tree)
    with pytest.raises(ValueError, match=r"'out/lora_e' has shape \(1, 3\).*rank\) = \(3,\)"):
        tx.init(whole | {"out": whole["out"] | {"lora_e": jnp.ones((1, 3))}})
    with pytest.raises(ValueError, match="no LoRA factors"):
        tx.init({"head": whole["head"]})
    for each in (tx, allocate_rank(optax.sgd(1.0), **PLAN), in_float32(optax.sgd(1.0))):
        with pytest.raises(ValueError, match=r"tx.update\(updates, state, params\)"):
            each.update(whole, each.init(whole))
