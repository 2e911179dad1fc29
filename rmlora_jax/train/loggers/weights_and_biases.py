"""Weights & Biases: one run there for each workdir.

``wandb.json`` in the workdir keeps the id of that run, so that a continued run goes on under the
same id. wandb's own environment variables hold: ``WANDB_MODE=offline`` keeps everything in
``WORKDIR/wandb``, ``WANDB_PROJECT`` names the project, by default rmlora_jax.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmlora_jax.errors import UserError, first_line
from rmlora_jax.files import read_object, write_json
from rmlora_jax.train.loggers.logger import Logger

FILE = "wandb.json"
PROJECT = "rmlora_jax"


class Curves:
    """The run there while ours trains."""

    def __init__(self, run: Any):
        self._run = run
        # wandb's own steps count calls. Steps that a killed run made and a continued one makes
        # again come twice, with the same numbers, at the same place of this axis.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step} | {name: float(value) for name, value in scalars.items()})

    def flush(self) -> None:
        """Nothing to do: another process has what was added, and outlives a kill of this one."""

    def close(self) -> None:
        self._run.finish()


def open_run(workdir: Path, start_step: int, config: Mapping[str, Any]) -> Curves:
    """The run of a workdir: that of ``wandb.json``, or a new one where ours begins anew.

    Raises:
      UserError: wandb refuses it, for instance without a login, or ``wandb.json`` is damaged.
    """
    import wandb  # pyright: ignore[reportMissingImports] (an extra)

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id(workdir, start_step),
            name=workdir.name,
            dir=str(workdir),
            config=dict(config),
            resume="allow",
            reinit="create_new",  # a run that the user's own code has open stays apart
            settings=wandb.Settings(console="off"),  # the terminal stays ours
        )
    except wandb.errors.Error as error:  # pyright: ignore[reportAttributeAccessIssue]
        raise UserError(
            f"config.logger='wandb': {first_line(error)}\n"
            "Type wandb login, or set WANDB_MODE=offline, or --config.logger=tensorboard"
        ) from error
    return Curves(run)


def run_id(workdir: Path, start_step: int) -> str:
    """The id in ``wandb.json``; a new one, which is written there, for a run that begins anew.

    Raises:
      UserError: the file is damaged.
    """
    file = workdir / FILE
    if start_step and file.exists():
        try:
            found = read_object(file).get("id")
        except ValueError:
            found = None
        if not isinstance(found, str) or not found.isalnum():
            raise UserError(f"{file} has no id of a run of Weights & Biases; delete it, and the "
                            "same command goes on as a new run there")
        return found
    found = secrets.token_hex(4)
    write_json(file, {"id": found})
    return found


LOGGER = Logger(
    "Weights & Biases; WANDB_MODE=offline sends nothing", open_run, package="wandb", many=False
)
