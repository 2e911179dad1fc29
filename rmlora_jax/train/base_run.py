"""A finished run of method full as the base of another: its best parameters and its config."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

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
    with checkpoint.open_checkpoints(workdir) as manager:
        folder = manager.directory / str(checkpoint.best_step(manager)) / "default"
    reader = ocp.StandardCheckpointer()
    # On one device here, however many wrote it.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        reader.metadata(folder).item_metadata.tree,
    )
    return config, jax.device_get(reader.restore(folder, like)["trainable"])
