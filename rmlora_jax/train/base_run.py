"""A finished run of method full as the base of another: its best parameters and its config."""

from pathlib import Path

from rmlora_jax.errors import UserError
from rmlora_jax.files import read_json
from rmlora_jax.train import checkpoint


def read_base(workdir: Path, task: str, advice: str) -> tuple[dict, dict]:
    """The config of the run in ``workdir`` and the parameters of its best step, on the host.

    Args:
      workdir: of the run.
      task: that it must have had.
      advice: how to make such a run, in words.

    Raises:
      UserError: there is no such run, it is not finished, or it trained a part of its model.
    """
    workdir = workdir.absolute()  # orbax takes no other
    if not (workdir / "summary.json").is_file():
        raise UserError(f"config.model.source={str(workdir)!r} holds no finished run; {advice}")
    config = read_json(workdir / "config.json")
    for field, wanted in (("task", task), ("method", "full")):
        if config[field] != wanted:
            raise UserError(
                f"{workdir} holds a run with {field} {config[field]!r}, not {wanted!r}; {advice}"
            )
    return config, checkpoint.best_trainable(workdir)
