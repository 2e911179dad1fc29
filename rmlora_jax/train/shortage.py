"""What to lower where a run does not fit into memory: before it starts, or when it runs out."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rmlora_jax import methods
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.models.blocks import REMAT
from rmlora_jax.parallel import memory
from rmlora_jax.parallel.mesh import Devices
from rmlora_jax.report.records import amount
from rmlora_jax.train.evaluate import Steps
from rmlora_jax.train.workdir import forget


class Plan:
    """What the compiled steps of a run need, as ``--compile_only`` tells it; not known at first."""

    def __init__(self, config: Run, devices: Devices):
        self.config, self.devices = config, devices
        self.need: int | None = None  # bytes on each device

    def check(self, steps: Steps) -> None:
        """Raises a UserError for compiled steps that need more memory than a device has."""
        self.need = steps.need or None
        if steps.need > memory.available():
            raise UserError(self.words())

    def words(self) -> str:
        """What is needed, what there is, and what to lower."""
        limit = memory.available()
        return too_large(self.need, limit, "this machine", self.config, self.devices)


@contextlib.contextmanager
def in_two_lines(config: Run, devices: Devices, workdir: Path) -> Iterator[Plan]:
    """Turns running out of memory inside the block into a UserError that says what to lower.

    A workdir that has no checkpoint by then is free for another config.
    """
    plan = Plan(config, devices)

    def words() -> str:
        forget(workdir)
        return plan.words()

    with memory.told(words):
        yield plan


def too_large(
    need: int | None, limit: int, where: str, config: Run, devices: Devices
) -> str:
    """The message for a step that does not fit."""
    needs = "more" if need is None else amount(need)
    words = smaller(config, devices)
    advice = f"Type {', or '.join(words)}" if words else "Choose a larger chip, or a smaller model"
    return (f"the training step needs {needs} on each of {devices.count} devices of {where}, which "
            f"have {amount(limit)}\n{advice}")


def smaller(config: Run, devices: Devices) -> list[str]:
    """Overrides that make a step smaller, first those that do not change its numbers."""
    policies = list(REMAT)
    weaker = policies[policies.index(config.model.remat) + 1 :]
    words = [f"--config.model.remat={policy}" for policy in weaker]
    local = config.batch_size // devices.count
    if local % (2 * config.accumulate) == 0:
        words.append(f"--config.accumulate={2 * config.accumulate}")
    if config.batch_size % (2 * devices.count * config.accumulate) == 0:
        words.append(f"--config.batch_size={config.batch_size // 2}")
    if config.model.base_dtype == "float32" and methods.description(config).train != ".*":
        words.append("--config.model.base_dtype=bfloat16")
    if max(config.sweep.at_once, config.sweep.seeds) > 1:
        words.append("a smaller --config.sweep.at_once")
    return words
