"""Factors on disk: the same numbers back, in order, and no pickle is ever opened."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rmlora_jax.errors import UserError
from rmlora_jax.sweep import train as sweep
from rmlora_jax.train import checkpoint, loop


def params(seed, layers=3):
    rng = np.random.default_rng(seed)
    make = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    attention = {"kernel": make(layers, 6, 5), "lora_a": make(layers, 6, 2),
                 "lora_b": make(layers, 2, 5)}
    return {"layers": {"query": attention}, "head": {"kernel": make(5, 2)}}


def test_factors_come_back_by_step(tmp_path):
    for step in (100, 9, 20):
        checkpoint.save_snapshot(tmp_path, step, params(step))
    found = checkpoint.read_snapshots(tmp_path)
    assert [step for step, _ in found] == [9, 20, 100]
    for step, tree in found:
        want = params(step)["layers"]["query"]
        assert tree.keys() == {"layers"} and tree["layers"]["query"].keys() == {"lora_a", "lora_b"}
        for name in ("lora_a", "lora_b"):
            np.testing.assert_array_equal(tree["layers"]["query"][name], want[name])


def test_half_precision_is_kept_as_numbers(tmp_path):
    half = jax.tree.map(lambda x: jax.numpy.asarray(x, jax.numpy.bfloat16), params(0))
    checkpoint.save_snapshot(tmp_path, 1, half)
    ((_, tree),) = checkpoint.read_snapshots(tmp_path)
    got = tree["layers"]["query"]["lora_a"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.float32(half["layers"]["query"]["lora_a"]))


def test_a_diagonal_is_multiplied_into_a(tmp_path):
    tree = params(0)
    query = tree["layers"]["query"]
    query["lora_e"] = np.array([[2.0, 0.0], [1.0, -1.0], [0.5, 3.0]], np.float32)
    checkpoint.save_snapshot(tmp_path, 1, tree)
    ((_, found),) = checkpoint.read_snapshots(tmp_path)
    got = found["layers"]["query"]
    assert got.keys() == {"lora_a", "lora_b"}
    for layer in range(3):
        want = query["lora_a"][layer] @ np.diag(query["lora_e"][layer])
        np.testing.assert_allclose(got["lora_a"][layer], want, rtol=1e-6)


def test_later_steps_are_dropped(tmp_path):
    checkpoint.drop_snapshots(tmp_path, 0)  # nothing there yet
    for step in (10, 20, 30):
        checkpoint.save_snapshot(tmp_path, step, params(step))
    checkpoint.drop_snapshots(tmp_path, 20)
    assert [step for step, _ in checkpoint.read_snapshots(tmp_path)] == [10, 20]
    assert checkpoint.read_snapshots(tmp_path / "elsewhere") == []


def test_pickles_and_damaged_files_are_refused(tmp_path):
    folder = tmp_path / "snapshots"
    folder.mkdir()
    np.savez(folder / "00000001.npz", lora_a=np.array([{}], object))
    with pytest.raises(UserError, match="is not a snapshot"):
        checkpoint.read_snapshots(tmp_path)
    (folder / "00000001.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match="is not a snapshot"):
        checkpoint.read_snapshots(tmp_path)
    with pytest.raises(ValueError, match="no LoRA factors"):
        checkpoint.save_snapshot(tmp_path, 1, {"head": {"kernel": np.ones((2, 2))}})


@pytest.mark.slow
def test_runs_keep_their_factors_at_each_evaluation(config, tmp_path):
    """A single run and a sweep: the same factors, those of the checkpoint, the gate in A."""
    config.method, config.steps, config.eval_every, config.snapshots = "sora", 4, 2, True
    config.compilation_cache = ""
    loop.train(config, tmp_path / "one")
    config.sweep.seeds = 2
    sweep.train(config, tmp_path / "two")
    taken = checkpoint.read_snapshots(tmp_path / "one")
    assert [step for step, _ in taken] == [2, 4]
    assert [s for s, _ in checkpoint.read_snapshots(tmp_path / "two" / "seed=1")] == [2, 4]
    for (_, ours), (_, theirs) in zip(taken, checkpoint.read_snapshots(tmp_path / "two" / "seed=0"),
                                      strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                     ours, theirs)
    with checkpoint.open_checkpoints(tmp_path / "one") as manager:
        path = manager.directory / "4" / "default"
    kept = ocp.StandardCheckpointer().restore(path)["trainable"]["encoder"]["layers"]["mlp"]["fc1"]
    found = taken[-1][1]["encoder"]["layers"]["mlp"]["fc1"]
    np.testing.assert_array_equal(found["lora_b"], kept["lora_b"])
    np.testing.assert_array_equal(
        found["lora_a"], np.asarray(kept["lora_a"]) * np.asarray(kept["lora_e"])[:, None, :])
    # A run that goes on from step 2 makes the later ones anew.
    checkpoint.drop_snapshots(tmp_path / "one", 2)
    assert [step for step, _ in checkpoint.read_snapshots(tmp_path / "one")] == [2]
    config.sweep.seeds, config.snapshots = 0, False
    loop.train(config, tmp_path / "none")
    assert checkpoint.read_snapshots(tmp_path / "none") == []
