"""What a logger is: a second place for the numbers of ``metrics.jsonl``, where they become curves.

A new one is a file in this folder with a `Logger`, and a line of ``LOGGERS``.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rmlora_jax import extras
from rmlora_jax.config import Mistake
from rmlora_jax.fields import Run


class Opened(Protocol):
    """A logger while a run trains. Only process 0 has one."""

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes finite numbers of a step, by their names in ``metrics.jsonl``."""

    def flush(self) -> None:
        """Called before the checkpoint of a step: what was added must survive a kill."""

    def close(self) -> None:
        """Called once, at the end of the run or when it stops."""


class Logger(NamedTuple):
    """An entry of ``LOGGERS``.

    Attributes:
      help: what it is, for ``--config.logger``.
      open: ``(workdir, start_step, config) -> Opened``. The run continues after ``start_step``; at
        0 it begins anew. ``config`` is flat. None: there is no second place.
      package: what it needs beside the trainer's packages; the extra has the same name.
      many: whether many runs at once may name it.
    """

    help: str
    open: Callable[[Path, int, Mapping[str, Any]], Opened] | None = None
    package: str = ""
    many: bool = True

    def check(self, config: Run) -> Iterator[Mistake]:
        """What is wrong between this logger and other fields."""
        if config.is_sweep and not self.many:
            yield "logger", "tensorboard or none for sweep.*, whose runs have no curves elsewhere"

    def missing(self, config: Run) -> Iterator[str]:
        """A line if the package is not installed."""
        found = importlib.util.find_spec(self.package) if self.package else None
        # wandb leaves folders of its own name, which Python takes for packages without a file.
        if self.package and (found is None or found.origin is None):
            yield (f"config.logger={config.logger!r} needs the package {self.package}; type: "
                   f"{extras.install(self.package)}")
