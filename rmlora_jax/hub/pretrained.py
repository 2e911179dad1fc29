"""A pretrained model of any family that is known, by the ``model_type`` of its config.json."""

from pathlib import Path

import jax
import jax.numpy as jnp

from rmlora_jax.errors import UserError
from rmlora_jax.hub.source import CONFIG, find_folder, read_json
from rmlora_jax.hub.text import FAMILIES, PretrainedText, load_text
from rmlora_jax.hub.vit import Pretrained, load_vit


def load_pretrained(
    source: str | Path,
    *,
    num_labels: int | None = None,
    image_size: int | None = None,
    key: jax.Array | None = None,
    dtype=jnp.float32,
) -> Pretrained | PretrainedText:
    """`load_vit` or `load_text`, whichever the model is for.

    Raises:
      UserError: a model of another kind, ``image_size`` for a model of texts, or as those.

    >>> load_pretrained("vit-tiny-patch8-64-tinyimagenet", num_labels=10).family.classifier
    'ViTForImageClassification'
    """
    folder = find_folder(source)
    kind = read_json(folder / CONFIG).get("model_type")
    if kind == "vit":
        return load_vit(
            source, num_classes=num_labels, image_size=image_size, key=key, dtype=dtype
        )
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(("vit", *FAMILIES))
        raise UserError(f"{folder / CONFIG}: model_type is {repr(kind)[:80]}; known are {known}")
    if image_size is not None:
        raise UserError(f"{source} is a model of texts; leave out image_size")
    return load_text(source, num_labels=num_labels, key=key, dtype=dtype)
