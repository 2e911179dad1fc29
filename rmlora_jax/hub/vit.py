"""ViT checkpoints of the Hugging Face layout, without PyTorch."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmlora_jax.errors import UserError
from rmlora_jax.hub.labels import label_names
from rmlora_jax.hub.source import CONFIG, PREPROCESSOR, find_folder, read_json
from rmlora_jax.hub.weights import AS_IS, CONV, LINEAR, Entry, Tensors, read_params
from rmlora_jax.models.family import Family, shapes_of
from rmlora_jax.models.hf_config import LARGEST
from rmlora_jax.models.parts import truncated_normal
from rmlora_jax.models.positions import resize_positions
from rmlora_jax.models.vit import ViT
from rmlora_jax.models.vit_config import ViTConfig

# Modules of a layer: path here, name up to transformers 5.8, name since 5.9.
_LINEARS = (
    ("attention/query", "attention.attention.query", "attention.q_proj"),
    ("attention/key", "attention.attention.key", "attention.k_proj"),
    ("attention/value", "attention.attention.value", "attention.v_proj"),
    ("attention/out", "attention.output.dense", "attention.o_proj"),
    ("mlp/fc1", "intermediate.dense", "mlp.fc1"),
    ("mlp/fc2", "output.dense", "mlp.fc2"),
)
_NORMS = (("norm1", "layernorm_before"), ("norm2", "layernorm_after"))

HEAD = (
    Entry("head/kernel", LINEAR, ("classifier.weight",)),
    Entry("head/bias", AS_IS, ("classifier.bias",)),
)

# Path here, axes, names in files; read it in either direction.
TABLE = (
    Entry("embed/cls_token", AS_IS, ("vit.embeddings.cls_token",)),
    Entry("embed/position", AS_IS, ("vit.embeddings.position_embeddings",)),
    Entry("embed/patch/kernel", CONV, ("vit.embeddings.patch_embeddings.projection.weight",)),
    Entry("embed/patch/bias", AS_IS, ("vit.embeddings.patch_embeddings.projection.bias",)),
    *(
        Entry(
            f"encoder/layers/{path}/{leaf}",
            axes,
            (f"vit.encoder.layer.{{}}.{old}.{name}", f"vit.layers.{{}}.{new}.{name}"),
        )
        for path, old, new in _LINEARS
        for leaf, name, axes in (("kernel", "weight", LINEAR), ("bias", "bias", AS_IS))
    ),
    *(
        Entry(
            f"encoder/layers/{path}/{leaf}",
            AS_IS,
            (f"vit.encoder.layer.{{}}.{norm}.{name}", f"vit.layers.{{}}.{norm}.{name}"),
        )
        for path, norm in _NORMS
        for leaf, name in (("scale", "weight"), ("bias", "bias"))
    ),
    Entry("encoder/norm/scale", AS_IS, ("vit.layernorm.weight",)),
    Entry("encoder/norm/bias", AS_IS, ("vit.layernorm.bias",)),
    *HEAD,
)

VIT = Family(
    config=ViTConfig,
    model=ViT,
    classifier="ViTForImageClassification",
    prefix="vit.",
    table=TABLE,
    new=(r"head/.*",),
    # What other ViT classes leave in a file and a classifier does not use: the pooler of ViTModel,
    # the mask token and the decoder of masked-image modelling.
    leftovers=(
        r"(vit\.)?pooler\.dense\.(weight|bias)",
        r"(vit\.)?embeddings\.mask_token",
        r"decoder\..*",
    ),
)


class Pretrained(NamedTuple):
    """A pretrained ViT, ready for ``ViT(config, num_classes)``.

    Attributes:
      config: the architecture, with the image size asked for.
      params: nested dict of numpy arrays, the parameters of ``ViT(config, num_classes)``.
      num_classes: outputs of the head.
      image_mean, image_std: per channel, for pixels in [0, 1]: x = (pixel - mean) / std.
      image_size: side of the image in pixels; equals ``config.image_size``.
      labels: class names, or None where the head is new.
      dropped: names of tensors in the file that were left out.
      new: paths of parameters that are newly initialised.
      folder: where its files are.
      source: what was loaded, as given.
      family: ``VIT``.
    """

    config: ViTConfig
    params: dict[str, Any]
    num_classes: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    image_size: int
    labels: tuple[str, ...] | None
    dropped: tuple[str, ...]
    new: tuple[str, ...]
    folder: Path
    source: str
    family: Family = VIT

    @property
    def num_labels(self) -> int:
        return self.num_classes


def load_vit(
    source: str | Path,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    key: jax.Array | None = None,
    dtype=jnp.float32,
    revision: str | None = None,
) -> Pretrained:
    """Loads a ViT of the Hugging Face layout.

    Reads safetensors or ``pytorch_model.bin``, sharded or not, in any floating type, with or
    without the ``vit.`` prefix, in the names of every release of transformers. A classifier of
    another size is replaced by a new one: truncated normal of standard deviation
    ``config.initializer_range``, bias 0.

    Args:
      source: a local folder, a bundled model or a name on the hub, looked up in this order.
      num_classes: outputs of the head; None keeps the file's classifier.
      image_size: side of the images in pixels; position embeddings are interpolated with
        PyTorch's bicubic kernel. None keeps the model's.
      key: for a new head; default ``jax.random.key(0)``.
      dtype: of all parameters but the head, which is trained and therefore always float32.
      revision: branch, tag or commit on the hub.

    Raises:
      UserError: a model that is not found or not supported, tensors that are missing, unexpected
        or misshapen, or ``num_classes`` left out where the file has no classifier.

    >>> vit = load_vit("vit-tiny-patch8-64-tinyimagenet", num_classes=10)
    >>> vit.config.hidden_size, vit.image_size, vit.new
    (192, 64, ('head/kernel', 'head/bias'))
    """
    folder = find_folder(source, revision)
    raw = read_json(folder / CONFIG)
    try:
        config = ViTConfig.from_hf(raw)
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    resized = config if image_size is None else _resized(config, image_size)
    tensors = Tensors(folder)

    stored = _stored_classes(tensors)
    classes = stored if num_classes is None else num_classes
    if classes is None:
        raise UserError(f"{folder} has no classifier; say how many classes with num_classes=...")
    if not isinstance(classes, int) or classes < 1:
        raise UserError(f"num_classes is {classes!r}; it must be a whole number of at least 1")
    keep_head = stored == classes
    leftovers = VIT.leftovers if keep_head else (*VIT.leftovers, r"classifier\.(weight|bias)")
    shapes = shapes_of(folder, VIT, config, classes)
    if not keep_head:
        shapes = {path: shape for path, shape in shapes.items() if not path.startswith("head/")}
    params, dropped, _ = read_params(
        tensors,
        TABLE,
        shapes,
        prefix=VIT.prefix,
        leftovers=leftovers,
        trained=(r"head/.*",),
        dtype=dtype,
    )

    embed = params["embed"]
    embed["position"] = resize_positions(embed["position"], resized.grid)
    mean, std = _normalisation(folder, config.num_channels)
    pretrained = Pretrained(
        config=resized,
        params=params,
        num_classes=classes,
        image_mean=mean,
        image_std=std,
        image_size=resized.image_size,
        labels=label_names(raw, classes) if keep_head else None,
        dropped=dropped,
        new=() if keep_head else tuple(entry.path for entry in HEAD),
        folder=folder,
        source=str(source),
    )
    return new_vit_head(pretrained, jax.random.key(0) if key is None else key)


def new_vit_head(pretrained: Pretrained, key: jax.Array) -> Pretrained:
    """The same model with its new head drawn from ``key``, as `load_vit` does; nothing is read."""
    if not pretrained.new:
        return pretrained
    shape = (pretrained.config.hidden_size, pretrained.num_classes)
    init = truncated_normal(pretrained.config.initializer_range)
    head = {
        "kernel": np.asarray(init(key, shape, jnp.float32)),
        "bias": np.zeros(shape[1:], np.float32),
    }
    return pretrained._replace(params=pretrained.params | {"head": head})


def _numbers(values, count: int, least: float) -> bool:
    """Whether these are so many numbers from ``least`` on, none too large to reckon with."""
    fine = isinstance(values, list) and len(values) == count
    return fine and all(type(x) in (int, float) and least <= x <= LARGEST for x in values)


def _resized(config: ViTConfig, image_size: int) -> ViTConfig:
    try:
        return dataclasses.replace(config, image_size=image_size)
    except ValueError:
        raise UserError(
            f"image_size is {image_size!r}; it must be a whole number of pixels, "
            f"at least the patch size {config.patch_size}"
        ) from None


def _stored_classes(tensors: Tensors) -> int | None:
    name = HEAD[0].names[0]
    return tensors.shape(name)[0] if name in tensors else None


def _normalisation(folder: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for pixels in [0, 1]; ViTImageProcessor's defaults are 0.5."""
    path = folder / PREPROCESSOR
    raw = read_json(path) if path.exists() else {}
    mean = std = [0.5] * channels
    if not raw.get("do_normalize", True):
        mean, std = [0.0] * channels, [1.0] * channels
    else:
        mean, std = raw.get("image_mean") or mean, raw.get("image_std") or std
    # The processor normalises pixel * rescale_factor, where we normalise pixel / 255.
    factor = raw.get("rescale_factor", 1 / 255) if raw.get("do_rescale", True) else 1.0
    if not (_numbers(mean, channels, -LARGEST) and _numbers(std, channels, 1 / LARGEST)):
        raise UserError(f"{path}: image_mean and image_std need {channels} numbers each, those of "
                        "image_std above 0")
    if not _numbers([factor], 1, 1 / LARGEST):
        raise UserError(f"{path}: rescale_factor is {repr(factor)[:80]}; it must be above 0")
    mean, std = tuple(mean), tuple(std)
    if abs(255 * factor - 1) > 1e-6:
        mean, std = (tuple(x / (255 * factor) for x in values) for values in (mean, std))
    return mean, std
