"""What differs between families of models, as data."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from rmlora_jax.errors import UserError, first_line
from rmlora_jax.hub.source import CONFIG
from rmlora_jax.hub.weights import Entry


class Family(NamedTuple):
    """How the files of one family become a model.

    Attributes:
      config: dataclass with ``from_hf(dict)``.
      model: Linen module ``model(config, num_labels, dtype=..., unroll=..., remat=...)`` that is
        called with images, or with ``(input_ids, attention_mask, token_type_ids)``.
      classifier: transformers' class of the same model with a classification head.
      prefix: the part of the names that a file of the bare encoder leaves out, such as ``"bert."``.
      table: one entry a parameter.
      new: regular expressions (full match) of the parameters' paths that a file may lack, since
        they are made for the task: pooler and head.
      leftovers: regular expressions (full match) of tensors that belong to pre-training.
    """

    config: type
    model: type
    classifier: str
    prefix: str
    table: tuple[Entry, ...]
    new: tuple[str, ...]
    leftovers: tuple[str, ...]


def shapes_of(
    folder: Path, family: Family, config, num_labels: int
) -> dict[str, tuple[int, ...]]:
    """`param_shapes` for the config.json of a folder.

    Raises:
      UserError: its sizes do not go together.
    """
    try:
        return param_shapes(family, config, num_labels)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{folder / CONFIG}: {first_line(error)[:300]}") from None


def param_shapes(family: Family, config, num_labels: int) -> dict[str, tuple[int, ...]]:
    """'/'-joined path -> shape of every parameter of ``family.model(config, num_labels)``."""
    if hasattr(config, "image_size"):
        side = config.image_size
        inputs = jax.ShapeDtypeStruct((1, side, side, config.num_channels), jnp.float32)
    else:
        inputs = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    model = family.model(config, num_labels)
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
