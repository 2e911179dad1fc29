"""AdaLoRA and SoRA as methods of the trainer: their schedules, what is left, resuming."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from marks import slow
from test_train_methods import changed, trained

import rmlora_jax as rm
from rmlora_jax import methods
from rmlora_jax.errors import UserError
from rmlora_jax.optim.adalora import allocate_rank, budget
from rmlora_jax.parallel.mesh import all_devices, shard
from rmlora_jax.sweep import train as sweep
from rmlora_jax.sweep.grid import check_config
from rmlora_jax.train import checkpoint, loop, setup
from rmlora_jax.train.config import resolve

MODULES = 12  # two layers of query, key, value, out, fc1 and fc2
COSTS = {"query": 64, "key": 64, "value": 64, "out": 64, "fc1": 96, "fc2": 96}  # in + out


@pytest.fixture
def gated(config):
    config.method, config.steps, config.eval_every = "adalora", 20, 10
    config.adalora.every, config.adalora.warmup, config.adalora.final = 2, 0.1, 0.4
    config.optimizer.learning_rate = 1e-2
    config.compilation_cache = ""
    return config


@pytest.mark.parametrize(("target", "kept"), [slow(0.0, 48), (3.5, 42)])
def test_adalora_follows_its_schedule(gated, target, kept):
    gated.adalora.target = target
    job, start, end, history = trained(gated, 20)
    assert isinstance(job.lora[0], rm.AdaLoRA) and job.lora[0].rank == 6
    scale = job.lora[0].scale_of("encoder/layers/mlp/fc1")
    assert scale == pytest.approx(16 / (6 + 1e-5), rel=1e-12)
    phases = {"total_steps": 20, "initial_steps": 2, "final_steps": 8}
    allowed = budget(np.arange(20), initial=6 * MODULES, target=kept, **phases)
    open_ = np.array([row["open_directions"] for row in history])  # before each update
    assert open_[0] == 0  # e starts as 0
    assert open_[1] == 6 * MODULES
    for step in (4, 6, 8, 10, 12, *range(13, 19)):  # where the update of that step cut the budget
        assert open_[step + 1] == allowed[step], step
    assert allowed[12] == kept < allowed[4] < 6 * MODULES
    left = methods.left(resolve(gated), flatten(end))
    ranks = {path.rpartition("/")[2]: rank for path, rank in left["ranks"].items()}
    assert sum(rank.sum() for rank in ranks.values()) == kept
    assert left["factors"] == sum(COSTS[name] * int(rank.sum()) for name, rank in ranks.items())
    assert left["head"] == 330
    for name in ("lora_a", "lora_b"):
        begun = np.concatenate([v.ravel() for p, v in start.items() if p.endswith(name)])
        assert abs(begun.std() / 0.02 - 1) < 0.05  # whatever lora.init says


def flatten(tree):
    """A tree of '/'-joined paths as nested dicts."""
    nested = {}
    for path, leaf in tree.items():
        *parts, last = path.split("/")
        node = nested
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = leaf
    return nested


@pytest.mark.slow
def test_sora_closes_gates_by_the_proximal_step(gated):
    """One step, recomputed: Adam's first move is the rate, then the threshold."""
    gated.method, gated.sora.sparsity, gated.sora.gate_rate = "sora", 5.0, 2.0
    _, start, end, _ = trained(gated, 1)
    rate = 2.0 * 1e-2
    for path in [path for path in start if path.endswith("lora_e")]:
        # B is 0, so that the gates have no gradient yet: only the threshold acts.
        expected = np.sign(start[path]) * np.maximum(np.abs(start[path]) - rate * 5.0, 0)
        np.testing.assert_allclose(end[path], expected, rtol=1e-5, atol=1e-7)
    assert sum(np.sum(end[p] == 0) for p in end if p.endswith("lora_e")) > 0
    _, _, end, history = trained(changed(gated, sora__sparsity=8.0), 20)
    assert history[-1]["open_directions"] < history[0]["open_directions"] == 8 * MODULES
    _, _, whole, history = trained(changed(gated, sora__sparsity=0.0), 20)
    assert history[-1]["open_directions"] == 8 * MODULES
    assert methods.left(resolve(gated), flatten(whole))["factors"] == 8 * 2 * sum(COSTS.values())
    open_ = {p: np.count_nonzero(v) for p, v in end.items() if p.endswith("lora_e")}
    expected = sum(n * COSTS[path.split("/")[-2]] for path, n in open_.items())
    assert methods.left(resolve(gated), flatten(end))["factors"] == expected


def test_sora_shrinks_by_what_is_asked_at_any_rate_and_length(gated):
    """A gate that no gradient moves loses ``sora.shrink`` between the first and the last step."""
    gated.method, gated.optimizer.warmup = "sora", 0.2
    gates = {"lora_a": np.ones((3, 4)), "lora_b": np.ones((4, 2))}
    for rate, steps, gate_rate, shrink in ((1e-2, 20, 1.0, 0.7), (3e-4, 35, 4.0, 1.5)):
        gated.optimizer.learning_rate, gated.sora.gate_rate = rate, gate_rate
        gated.sora.shrink = shrink
        tx = methods.optimizer(resolve(gated), steps)
        tree = gates | {"lora_e": np.array([2.0, -1.6, 0.6, -0.3])}
        state, still = tx.init(tree), jax.tree.map(np.zeros_like, tree)
        for _ in range(steps):
            updates, state = jax.jit(tx.update)(still, state, tree)
            tree = optax.apply_updates(tree, updates)
        expected = np.sign([2.0, -1.6, 0.6, -0.3]) * np.maximum([2 - shrink, 1.6 - shrink, 0, 0], 0)
        np.testing.assert_allclose(tree["lora_e"], expected, atol=2e-5)
    gated.sora.proximal = "authors_exact"
    with pytest.raises(UserError, match=r"sora\.shrink=1\.5: must be None where"):
        check_config(gated)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adalora", "sora"])
def test_the_folded_model_predicts_the_same(gated, name):
    gated.method, gated.sora.sparsity = name, 10.0
    devices = all_devices(limit=1)
    job, _, end, _ = trained(gated, 20)
    frozen = jax.device_get(job.constants.frozen)
    folded, plain = rm.to_lora(rm.join(flatten(end), frozen), job.lora[0])
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    base = setup.open_base(resolve(gated), devices)
    apply = jax.jit(base.adapted.apply, static_argnames="train")
    wanted = apply({"params": rm.join(flatten(end), frozen)}, images, train=False)
    model = rm.adapt(base.problem.model, plain)
    found = jax.jit(model.apply, static_argnames="train")({"params": folded}, images, train=False)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    sizes = {p: v.size for p, v in flatten_dict(folded, sep="/").items() if "lora_" in p}
    assert sum(sizes.values()) < sum(v.size for p, v in end.items() if "lora_" in p)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adalora", "sora"])
def test_a_continued_run_ends_bit_identical(gated, name, tmp_path):
    gated.method = name
    whole = loop.train(gated, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (tmp_path / "again" / "summary.json").unlink()
    with checkpoint.open_checkpoints(tmp_path / "again") as manager:
        steps = manager.all_steps()
    assert 20 in steps
    # Begin once more at the state of step 10, as after a kill.
    half = setup.build(resolve(gated), all_devices())
    state, batches = half.state, half.feed.train(0)
    for _ in range(10):
        state, _ = half.train_step(state, half.constants, shard(next(batches), all_devices()))
    shutil.rmtree(tmp_path / "again" / "checkpoints")
    with checkpoint.open_checkpoints(tmp_path / "again") as manager:
        checkpoint.Keeper(manager, "accuracy").evaluated(state, [{"accuracy": 0.0, "loss": 9.0}])
        manager.wait_until_finished()
    summary = loop.train(gated, tmp_path / "again")
    assert summary["test"] == whole["test"]
    assert summary["final_parameters"] == whole["final_parameters"]
    assert json.dumps(summary["intrinsic_dimension"]) == json.dumps(whole["intrinsic_dimension"])


@pytest.mark.slow
def test_runs_together_equal_runs_alone(gated, tmp_path):
    gated.method, gated.steps, gated.eval_every = "sora", 6, 6
    gated.sweep.grid = "{'sparsity': (0.5, 20.0)}"
    sweep.train(gated, tmp_path / "sweep")
    gated.sweep.grid = ""
    for value in (0.5, 20.0):
        gated.sora.sparsity = value
        alone = loop.train(gated, tmp_path / str(value))
        folder = next((tmp_path / "sweep").glob(f"*sparsity={value:g}*"))
        found = json.loads((folder / "summary.json").read_text())
        assert found["final_parameters"] == alone["final_parameters"]
        assert found["test"]["loss"] == pytest.approx(alone["test"]["loss"], rel=1e-4)


def test_mistakes_are_said_in_plain_words(gated):
    gated.adalora.initial_rank, gated.adalora.final = 4, 0.95
    with pytest.raises(UserError, match=r"(?s)adalora.final=0.95.*initial_rank=4: must be above"):
        check_config(gated)
    gated.adalora.initial_rank, gated.adalora.final = 6, 0.4
    check_config(gated)
    gated.method, gated.lora.init, gated.sora.proximal = "sora", "pissa", "papper"
    with pytest.raises(UserError, match=r"(?s)papper.*did you mean paper\?.*another than pissa"):
        check_config(gated)


def test_adalora_is_its_own_chain(gated):
    """The config's fields against the optax parts themselves."""
    job = setup.build(resolve(gated), all_devices(limit=1))
    tree = jax.device_get(job.state.trainable)
    tx = methods.optimizer(resolve(gated), 20)
    inner = allocate_rank(
        optax.adamw(methods.learning_rate(resolve(gated), 20), weight_decay=0.0),
        total_steps=20, target=4, initial_steps=2, final_steps=8, every=2)
    theirs = optax.chain(rm.add_orthogonality(0.1), optax.clip_by_global_norm(1.0), inner)
    ours, other = (tree, tx.init(tree)), (tree, theirs.init(tree))
    rng = np.random.default_rng(0)
    for _ in range(16):
        gradients = jax.tree.map(
            lambda v: rng.normal(size=v.shape, scale=0.1).astype(np.float32), tree)
        pairs = []
        for update, (params, state) in ((tx.update, ours), (theirs.update, other)):
            updates, state = jax.jit(update)(gradients, state, params)
            pairs.append((optax.apply_updates(params, updates), state))
        ours, other = pairs
    for one, two in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(other[0]), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-8)
