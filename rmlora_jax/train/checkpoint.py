"""Orbax checkpoints of what a run changes: step, trainable parameters, optimizer state.

The base is never written: it comes from where the config says. Kept are the latest checkpoint, from
which a run continues, and the best one by validation.
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from rmlora_jax.errors import UserError
from rmlora_jax.train.scores import higher_is_better
from rmlora_jax.train.step import State


class Score(NamedTuple):
    """Validation figures of a checkpoint, in the order in which checkpoints are compared."""

    value: float  # of the metric that best is chosen by, negated where lower is better
    negative_loss: float


def score(metrics: dict) -> Score:
    def finite(x):
        return x if math.isfinite(x) else -math.inf

    return Score(finite(metrics["score"]), finite(-metrics["loss"]))


def open_checkpoints(workdir: Path, *, keep_best: bool = True) -> ocp.CheckpointManager:
    """The manager of ``workdir/checkpoints``; saves are asynchronous, close it to wait for them.

    It keeps the latest checkpoint and, with ``keep_best``, the best.

    Raises:
      UserError: the folder is none, or what it says of its steps is missing or damaged.
    """
    folder = workdir / "checkpoints"
    policy = preservation_policy
    options = ocp.CheckpointManagerOptions(
        save_decision_policy=save_decision_policy.FixedIntervalPolicy(1),
        preservation_policy=policy.AnyPreservationPolicy(
            [policy.LatestN(1), policy.BestN(get_metric_fn=score, n=1)]
        )
        if keep_best
        else policy.LatestN(1),
        best_fn=lambda metrics: metrics["score"],  # without it orbax writes no metrics
        cleanup_tmp_directories=True,  # what a killed save left behind
    )
    advice = "delete the damaged step in it, or start anew with another --workdir"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder; start anew with another --workdir")
    try:
        manager = ocp.CheckpointManager(folder, options=options)
    except Exception as e:  # whatever a damaged file makes orbax raise
        raise UserError(f"{folder} cannot be read ({type(e).__name__}); {advice}") from e
    for step in manager.all_steps():
        if manager.metrics(step) is None:
            raise UserError(f"{folder / str(step)} has lost its metrics; {advice}")
    return manager


def save(
    manager: ocp.CheckpointManager, state: State, validation: dict[str, float], metric: str
) -> None:
    """Starts to write a checkpoint; ``metric`` names the figure that best is chosen by."""
    write(manager, int(state.step), state, scored(validation, metric))


def scored(validation: dict[str, float], metric: str) -> dict[str, float]:
    """The figures of a checkpoint with the "score" that `score` compares."""
    value = validation[metric]
    return validation | {"score": value if higher_is_better(metric) else -value}


def write(manager: ocp.CheckpointManager, step: int, state: NamedTuple, figures: dict) -> None:
    """Starts to write any state with its figures, which are kept as JSON."""
    manager.save(step, args=ocp.args.StandardSave(state._asdict()), metrics=figures)


def restore(manager: ocp.CheckpointManager, like: NamedTuple, step: int) -> NamedTuple:
    """Reads a step into the shapes, dtypes and shardings of ``like``.

    Raises:
      UserError: files of the checkpoint are missing or damaged.
    """
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
    hook, sys.unraisablehook = sys.unraisablehook, _without_late_reads(sys.unraisablehook)
    try:
        state = type(like)(**manager.restore(step, args=ocp.args.StandardRestore(target)))
        sys.unraisablehook = hook
        return state
    except Exception as e:  # orbax and tensorstore raise many kinds for damaged files
        raise damaged(manager.directory / str(step), e) from e


def damaged(folder: Path, error: Exception) -> UserError:
    """The words for a checkpoint that cannot be read."""
    why = str(error).splitlines()[0][:200] if str(error) else "no details"
    return UserError(
        f"the checkpoint {folder} cannot be read ({type(error).__name__}: {why}). Delete that "
        "folder to continue from an older one, or start anew with another --workdir"
    )


def _without_late_reads(hook):
    """After a failed restore the reads still under way come back to an event loop that is closed,
    each with a traceback in the middle of our own words. Hence it stays in place."""

    def quiet(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    return quiet


def best_step(manager: ocp.CheckpointManager) -> int:
    """The step with the best validation score; of equals the latest, which is the one kept."""
    return max(manager.all_steps(), key=lambda s: (score(manager.metrics(s)), s))


def best_trainable(workdir: Path) -> dict:
    """What a run trained, at its best step, on the host.

    Raises:
      UserError: its checkpoints are damaged.
    """
    with open_checkpoints(workdir) as manager:
        folder = manager.directory / str(best_step(manager)) / "default"
    reader = ocp.StandardCheckpointer()
    # On one device here, however many wrote it.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            reader.metadata(folder).item_metadata.tree,
        )
        return jax.device_get(reader.restore(folder, like)["trainable"])
    except Exception as e:  # orbax and tensorstore raise many kinds for damaged files
        raise damaged(folder.parent, e) from e
