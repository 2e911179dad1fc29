"""Runs of a tiny ViT in this process, on one device, and what they leave."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from conftest import tiny_config

from rmlora_jax.parallel import mesh
from rmlora_jax.sweep import train as sweep
from rmlora_jax.train import checkpoint, finished, loop

STEPS, EVERY = 12, 4


class Killed(Exception):
    """Ends a run where a kill would: nothing is caught, nothing is cleaned up but the lock."""


def config_of(tiny_vit):
    c = tiny_config(tiny_vit)
    c.compilation_cache = ""
    c.steps, c.eval_every, c.log_every = STEPS, EVERY, 1
    c.data.limit = 200
    return c


def on_one_device(patch):
    """Eight fake devices on two cores take their time; a report takes longer than the run."""
    for module in (loop, sweep):
        patch.setattr(module, "all_devices", lambda name, **_: mesh.all_devices(name, limit=1))
    patch.setattr(loop, "write_report", lambda workdir: None)
    patch.setattr(loop, "ending", lambda *_: "done")


def train(config, workdir, until=None):
    """The run; ``until``: killed when the checkpoint of that step is whole."""
    train = sweep.train if config.sweep.seeds else loop.train
    if until is None:
        return train(config, workdir)
    write = checkpoint.write

    def then_die(manager, step, *rest):
        write(manager, step, *rest)
        if step == until:
            manager.wait_until_finished()
            raise Killed

    with contextlib.suppress(Killed):
        checkpoint.write = then_die
        try:
            train(config, workdir)
        finally:
            checkpoint.write = write
    return None


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def column(workdir: Path, name: str) -> np.ndarray:
    return np.array([row[name] for row in rows(workdir) if name in row])


def steps_of(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def leaves(workdir: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path."""
    tree = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "default")
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(tree)}


def check_same_end(one: Path, other: Path, step: int = STEPS) -> None:
    """Two runs of one config: states, adapters and metrics to the bit, each step once."""
    a, b = leaves(one, step), leaves(other, step)
    assert a.keys() == b.keys() and len(a) > 20
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)
    name = f"{finished.ADAPTER}/adapter_model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()
    assert column(other, "step").tolist() == list(range(1, step + 1))
    for name in ("train/loss", "train/grad_norm", "train/kept_fraction", "learning_rate"):
        np.testing.assert_array_equal(column(one, name), column(other, name), err_msg=name)
