"""A finished run of method full as the base of another: its best parameters and its config."""

from pathlib import Path

import ml_collections

from rmlora_jax.errors import UserError
from rmlora_jax.files import read_object
from rmlora_jax.train import checkpoint
from rmlora_jax.train.check import check_config
from rmlora_jax.train.config import default_config, flatten


def read_config(workdir: Path) -> ml_collections.ConfigDict:
    """The config of a run, from its folder; fields that are younger than the run have their
    defaults, and those that are no more are left out.

    Raises:
      UserError: there is none, or it is damaged.
    """
    file = workdir / "config.json"
    try:
        config, own = default_config(), flatten(read_object(file))
        for name in flatten(config).keys() & own.keys():
            config.update_from_flattened_dict({name: own[name]})
        check_config(config)
        return config
    except FileNotFoundError:
        raise UserError(f"{workdir} has no config.json; is it the folder of a run?") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as e:
        why = str(e).replace(str(file), "it").splitlines()[0][:300] if str(e) else type(e).__name__
        raise UserError(f"{file} is not the config of a run ({why}); copy the folder again") from e


def read_base(
    workdir: Path, task: str, advice: str
) -> tuple[ml_collections.ConfigDict, dict]:
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
    config = read_config(workdir)
    for field, wanted in (("task", task), ("method", "full")):
        if config[field] != wanted:
            raise UserError(
                f"{workdir} holds a run with {field} {config[field]!r}, not {wanted!r}; {advice}"
            )
    return config, checkpoint.best_trainable(workdir)
