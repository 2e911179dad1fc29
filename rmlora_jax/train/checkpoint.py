"""Orbax checkpoints of what a run changes: step, trainable parameters, optimizer state.

The base is never written: it comes from where the config says. A run keeps its best checkpoint by
validation and, while it trains, the latest two: it continues from the second if the latest cannot
be read. A checkpoint that cannot be read is never deleted; it is moved to ``damaged/``.
"""

import contextlib
import io
import math
import os
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from rmlora_jax.adapt.diagonal import DIAGONAL
from rmlora_jax.errors import UserError, first_line
from rmlora_jax.fields import Run
from rmlora_jax.files import placed, read_json, write_bytes_atomic
from rmlora_jax.optim.diagonals import find_diagonals
from rmlora_jax.optim.factors import ADAPTED, find_factors, flatten
from rmlora_jax.tasks.scores import higher_is_better
from rmlora_jax.train.config import read_config
from rmlora_jax.train.step import State
from rmlora_jax.train.workdir import is_late, quiet, saved_steps

T = TypeVar("T")  # a NamedTuple of arrays: State, or the states of a sweep
LATEST = 2  # checkpoints kept beside the best while a run trains
SNAPSHOTS = "snapshots"  # the folder of the factors at several steps
DAMAGED = "damaged"  # the folder beside checkpoints/ for those that cannot be read


def score(metrics: Any) -> tuple[float, ...]:
    """What checkpoints are compared by: the metric that best is chosen by, then the loss.

    Both are negated where lower is better, and -inf where they are not finite.
    """
    values = metrics["score"], -metrics["loss"]
    return tuple(x if math.isfinite(x) else -math.inf for x in values)


def open_checkpoints(workdir: Path, *, keep_best: bool = True) -> ocp.CheckpointManager:
    """The manager of ``workdir/checkpoints``; saves are asynchronous, close it to wait for them.

    It keeps the latest two checkpoints and, with ``keep_best``, the best.

    Raises:
      UserError: it is a file, or the figures of all checkpoints are missing or damaged.
    """
    folder = workdir / "checkpoints"
    policy = preservation_policy
    latest = policy.LatestN(LATEST)
    options = ocp.CheckpointManagerOptions(
        save_decision_policy=save_decision_policy.FixedIntervalPolicy(1),
        preservation_policy=policy.AnyPreservationPolicy(
            [latest, policy.BestN(get_metric_fn=cast(Any, score), n=1)]
        )
        if keep_best
        else latest,
        best_fn=lambda metrics: metrics["score"],  # without it orbax writes no metrics
        cleanup_tmp_directories=True,  # what a killed save left behind
    )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder; start anew with another --workdir")
    _set_aside_without_figures(folder)
    try:
        return ocp.CheckpointManager(folder, options=options)
    except OSError:
        raise
    except Exception as e:  # whatever a damaged file makes orbax raise
        raise UserError(
            f"{folder} cannot be read ({type(e).__name__}); start anew with another --workdir"
        ) from e


def _set_aside_without_figures(folder: Path) -> None:
    """Orbax reads the figures of every step when it opens a folder, and fails on a damaged one."""
    lost = None
    if jax.process_index() == 0:
        steps = saved_steps(folder.parent)
        wrong = {int(step.name): why for step in steps if (why := _wrong_figures(step))}
        if wrong and len(wrong) == len(steps):
            lost = none_left(folder, wrong)
        else:
            for step, why in wrong.items():
                set_aside(folder / str(step), why)
    if not _all_processes(lost is None):
        raise lost or UserError(f"no checkpoint in {folder} can be read; process 0 says more")


def _wrong_figures(step: Path) -> str | None:
    try:
        if read_json(step / "metrics" / "metrics"):
            return None
    except FileNotFoundError:
        return "has lost its metrics"
    except ValueError:  # neither JSON nor UTF-8
        pass
    return "has damaged metrics"


def set_aside(step: Any, why: str) -> None:
    """Moves the folder of a step to ``damaged/``, where a save cannot meet it, and reports it."""
    place = step.parent.parent / DAMAGED / step.name
    while place.exists():
        place = place.with_name(place.name + "-again")
    place.parent.mkdir(exist_ok=True)
    os.rename(step, place)
    print(f"note: the checkpoint {step} {why}; it is now {place}", flush=True)


def none_left(folder: Path, why: dict[int, str]) -> UserError:
    """The error for a run none of whose checkpoints can be read; nothing was moved."""
    steps = "; ".join(f"{folder / str(step)} {words}" for step, words in sorted(why.items()))
    return UserError(
        f"no checkpoint of this run can be read: {steps}\n"
        "Put a copy of one back, or start anew with another --workdir"
    )


class Keeper:
    """Keeps the states of a program while it trains, and knows each run's best.

    This one is for a single run, with a checkpoint for each evaluation. ``metric`` names the figure
    that best is chosen by. ``waited`` counts the evaluations in a row that brought no better value
    of it. It is saved with the state, so that a continued run goes on with the same count.
    """

    def __init__(self, manager: ocp.CheckpointManager, metric: str, waited: int = 0):
        self.manager, self.metric, self.waited = manager, metric, waited

    def evaluated(self, state: State, figures: Sequence[dict[str, float]]) -> None:
        """Saves after an evaluation with the validation figures of each run."""
        found = scored(figures[0], self.metric)
        before = (score(self.manager.metrics(s))[0] for s in self.manager.all_steps())
        better = score(found)[0] > max(before, default=-math.inf)
        if jax.process_count() > 1:  # sums may differ in the last bit from one host to another
            better = bool(multihost_utils.broadcast_one_to_all(np.array(better)))
        self.waited = 0 if better else self.waited + 1
        write(self.manager, int(state.step), state, found | {"waited": self.waited})

    def interrupted(self, state: State) -> None:
        """Saves between two evaluations, for a run that stops."""
        # Without an evaluation it is never the best.
        figures = scored({"loss": math.inf}, "loss") | {"waited": self.waited}
        write(self.manager, int(state.step), state, figures)

    def wait(self) -> None:
        """Waits until everything is on the disk."""
        self.manager.wait_until_finished()

    def best(self, state: State) -> tuple[State, list[int]]:
        """The states of the best evaluations, and their steps; ``state`` is the last."""
        steps = by_score(self.manager)
        if steps[0] == int(state.step):
            return state, steps[:1]
        found, step = first_intact(self.manager, state, steps)
        return found, [step]

    def settle(self, i: int, folder: Path, state: State, best: State) -> None:
        """Leaves in the folder of run ``i`` the checkpoints that a finished run has."""
        for step in set(self.manager.all_steps()) - {int(best.step), int(state.step)}:
            self.manager.delete(step)


def waited(manager: ocp.CheckpointManager) -> int:
    """The ``waited`` of a `Keeper` in the latest checkpoint; 0 without, or in runs of before."""
    step = manager.latest_step()
    found = None if step is None else manager.metrics(step)
    return (found or {}).get("waited", 0)


def scored(validation: dict[str, float], metric: str) -> dict[str, float]:
    """The figures of a checkpoint with the "score" that `score` compares."""
    value = validation[metric]
    return validation | {"score": value if higher_is_better(metric) else -value}


def write(manager: ocp.CheckpointManager, step: int, state: NamedTuple, figures: dict) -> None:
    """Starts to write any state with its figures, which are kept as JSON."""
    manager.save(step, args=ocp.args.StandardSave(state._asdict()), metrics=figures)


def newest(manager: ocp.CheckpointManager, like: T) -> tuple[T | None, int]:
    """As `first_intact`, of all steps, the newest first; None, 0 where there are no checkpoints."""
    steps = sorted(manager.all_steps(), reverse=True)
    return first_intact(manager, like, steps) if steps else (None, 0)


def first_intact(manager: ocp.CheckpointManager, like: T, steps: Iterable[int]) -> tuple[T, int]:
    """The state of the first of ``steps`` that can be read, and its step.

    Those before it are set aside.

    Raises:
      UserError: none can be read. Nothing is moved then.
    """
    failed = {}
    for step in steps:
        try:
            state, why = restore(manager, like, step), None
        except UserError as e:
            state, why = None, str(e)
        if not _all_processes(state is not None):
            failed[step] = why or "cannot be read by another process"
            continue
        assert state is not None
        if failed:
            if jax.process_index() == 0:
                for other, words in failed.items():
                    set_aside(manager.directory / str(other), words)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("set aside")
            manager.reload()
        return state, step
    raise none_left(Path(manager.directory), failed)


def _all_processes(ok: bool) -> bool:
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def restore(manager: ocp.CheckpointManager, like: T, step: int) -> T:
    """Reads a step into the shapes, dtypes and shardings of ``like``.

    Raises:
      UserError: files of the checkpoint are missing or damaged.
    """
    own = cast(NamedTuple, like)._asdict()
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, own)
    hook, sys.unraisablehook = sys.unraisablehook, quiet(sys.unraisablehook, is_late)
    try:
        state = type(like)(**manager.restore(step, args=ocp.args.StandardRestore(target)))
        sys.unraisablehook = hook
        return state
    except Exception as e:  # orbax and tensorstore raise many kinds for damaged files
        raise UserError(damaged(e)) from e


def damaged(error: Exception) -> str:
    """The words for a checkpoint that cannot be read."""
    return f"cannot be read ({type(error).__name__}: {first_line(error)[:200]})"


def by_score(manager: ocp.CheckpointManager) -> list[int]:
    """All steps, the best first; of equals the latest, which is the one kept."""
    steps = manager.all_steps()
    return sorted(steps, key=lambda s: (score(manager.metrics(s)), s), reverse=True)


def best_step(workdir: Path) -> int:
    """The step of the best checkpoint so far. Nothing is changed, beside a run that trains.

    Raises:
      UserError: there is no checkpoint yet.
    """
    scores = {}
    for folder in saved_steps(workdir):
        if not _wrong_figures(folder):
            with contextlib.suppress(KeyError, TypeError):  # figures of another kind
                scores[int(folder.name)] = score(read_json(folder / "metrics" / "metrics"))
    if not scores:
        raise UserError(f"{workdir} has no checkpoint yet; wait until its first evaluation")
    return max(scores, key=lambda step: (scores[step], step))


def best_trainable(workdir: Path, step: int | None = None) -> dict:
    """What a run trained, at its best step or at ``step``, on the host.

    Raises:
      UserError: its checkpoints are damaged.
    """
    if step is None:
        with open_checkpoints(workdir) as manager:
            step = by_score(manager)[0]
    folder = workdir / "checkpoints" / str(step) / "default"
    reader = ocp.StandardCheckpointer()
    logger = logging.get_absl_logger()
    logger.addFilter(_no_note)
    # On one device here, however many wrote it.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            cast(Any, reader.metadata(folder)).item_metadata.tree,
        )
        return jax.device_get(reader.restore(folder, like)["trainable"])
    except Exception as e:  # orbax and tensorstore raise many kinds for damaged files
        raise UserError(
            f"the checkpoint {folder.parent} {damaged(e)}; put a copy of it back, or train again "
            "with another --workdir"
        ) from e
    finally:
        logger.removeFilter(_no_note)


def _no_note(record) -> bool:
    """Orbax notes the metadata of a step, which lie one folder above, as missing."""
    return "Metadata file does not exist" not in str(record.msg)


def read_base(workdir: Path, task: str, advice: str) -> tuple[Run, dict]:
    """The config of a finished run of ``task`` and the parameters of its best step, on the host.

    Raises:
      UserError: ``workdir`` holds no such run, or one that trained a part of its model; ``advice``
        says how to make one.
    """
    workdir = placed(workdir)  # orbax takes no relative path
    if not (workdir / "summary.json").is_file():
        raise UserError(f"config.model.source={str(workdir)!r} holds no finished run; {advice}")
    config = read_config(workdir)
    for field, wanted in (("task", task), ("method", "full")):
        found = getattr(config, field)
        if found != wanted:
            raise UserError(
                f"{workdir} holds a run with {field} {found!r}, not {wanted!r}; {advice}"
            )
    return config, best_trainable(workdir)


def save_snapshot(workdir: str | os.PathLike, step: int, params: Any) -> Path:
    """Writes the factors in ``params``, any tree, for `rmlora_jax.trajectory_dimension` afterwards.

    ``workdir/snapshots/00000120.npz`` has every factor of step 120 under its path, in float32, with
    the diagonal of AdaLoRA or SoRA multiplied into A: plain arrays, never pickles.

    Raises:
      ValueError: ``params`` has no factors.

    >>> import tempfile
    >>> layer = {"lora_a": np.ones((4, 2)), "lora_b": np.zeros((2, 3)), "bias": np.zeros(3)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_snapshot(folder, 5, {"fc": layer})
    ...     [(step, list(tree["fc"])) for step, tree in read_snapshots(folder)]
    [(5, ['lora_a', 'lora_b'])]
    """
    leaves, _, paths = flatten(params)
    found = find_factors(params, ADAPTED)
    factors = {f.path: np.asarray(leaves[f.index], np.float32) for f in found}
    if any(path.endswith(DIAGONAL) for path in paths):
        for d in find_diagonals(params):
            e = np.asarray(leaves[d.e], np.float32)
            factors[d.a.path] = factors[d.a.path] * e[..., None, :]
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **factors)
    return write_bytes_atomic(Path(workdir) / SNAPSHOTS / f"{step:08}.npz", file.getvalue())


def read_snapshots(workdir: str | os.PathLike) -> list[tuple[int, dict]]:
    """``(step, nested dict of factors)`` of every snapshot by increasing step; [] without any.

    Raises:
      UserError: a file is damaged.
    """
    found = []
    for path in sorted((Path(workdir) / SNAPSHOTS).glob("*.npz")):
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                flat = {tuple(name.split("/")): arrays[name] for name in arrays.files}
            found.append((int(path.stem), unflatten_dict(flat)))
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is not a snapshot ({error}); delete it") from error
    return found


def drop_snapshots(workdir: str | os.PathLike, step: int) -> None:
    """Deletes the snapshots of later steps: a run continuing after ``step`` makes them again."""
    for path in (Path(workdir) / SNAPSHOTS).glob("*.npz"):
        if int(path.stem) > step:
            path.unlink(missing_ok=True)
