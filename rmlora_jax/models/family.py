"""What differs between families of models, as data.

A family is one file (config, Linen module and one `Family`) and one line of
`rmlora_jax.models.FAMILIES`. Code that loads, saves, adapts or predicts reads the `Family`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from rmlora_jax.models.config import ModelConfig
from rmlora_jax.models.processor import Processor, read_processor

# How a stored tensor becomes a parameter: the axes for numpy.transpose. PyTorch's Linear keeps
# (out, in), its Conv1d (out, in, width), its Conv2d (out, in, height, width).
AS_IS = None
LINEAR = (1, 0)
CONV1D = (2, 1, 0)
CONV = (2, 3, 1, 0)


class Entry(NamedTuple):
    """One parameter and its names in published files, the oldest spelling first.

    In a name ``{}`` stands for the number of a layer; the parameter has the layers on axis 0.
    """

    path: str  # '/'-joined, in the parameter tree
    axes: tuple[int, ...] | None  # for numpy.transpose from file to parameter (of one layer)
    names: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        """Whether the parameter has the layers on axis 0."""
        return "{}" in self.names[0]


def linear_entries(
    path: str, *names: str, leaf: str = "kernel", axes: tuple[int, ...] | None = LINEAR
) -> tuple[Entry, Entry]:
    """Kernel and bias of a linear layer with these spellings."""
    return (
        Entry(f"{path}/{leaf}", axes, tuple(f"{name}.weight" for name in names)),
        Entry(f"{path}/bias", AS_IS, tuple(f"{name}.bias" for name in names)),
    )


def norm_entries(path: str, *names: str) -> tuple[Entry, Entry]:
    """Scale and bias of a layer norm with these spellings."""
    return linear_entries(path, *names, leaf="scale", axes=AS_IS)


def layer_entries(layers: Sequence[str], modules: Iterable[tuple[str, ...]]) -> Iterator[Entry]:
    """Entries of the modules of every layer.

    ``layers`` are the spellings of layer ``{}``, and a module is its path in the layer, then its
    name in each spelling; ``norm1`` and ``norm2`` are norms.
    """
    for path, *names in modules:
        entries = norm_entries if path.startswith("norm") else linear_entries
        spelled = (f"{layer}.{name}" for layer, name in zip(layers, names, strict=True))
        yield from entries(f"encoder/layers/{path}", *spelled)


def text_entries(embeddings: str) -> Iterator[Entry]:
    """Entries of the embeddings of texts, whose names families of BERT's lineage share."""
    for path in ("word", "position", "token_type"):
        yield Entry(f"embed/{path}/embedding", AS_IS, (f"{embeddings}.{path}_embeddings.weight",))
    yield from norm_entries("embed/norm", f"{embeddings}.LayerNorm")


def text_layer(projection: str, *names: str) -> list[tuple[str, str]]:
    """Modules of a layer for `layer_entries`, whose names families of BERT's lineage share.

    ``names`` are those of the projections of attention here, ``projection`` that in files.
    """
    return [
        *((f"attention/{name}", f"attention.self.{projection.format(name)}") for name in names),
        ("attention/out", "attention.output.dense"),
        ("norm1", "attention.output.LayerNorm"),
        ("mlp/fc1", "intermediate.dense"),
        ("mlp/fc2", "output.dense"),
        ("norm2", "output.LayerNorm"),
    ]


class Inputs(NamedTuple):
    """The inputs of a model. ``resized`` and ``processor`` are for images alone."""

    name: str  # for messages
    # config -> arguments that the model can be initialised with
    example: Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]]
    # (config, image size in pixels) -> the config for images of that size; raises a ValueError
    resized: Callable[[Any, int], Any] | None = None
    # `read_processor`
    processor: Callable[[Mapping | None, Any, int | None], Processor] | None = None


def _image(config) -> tuple[jax.ShapeDtypeStruct, ...]:
    side = config.image_size
    return (jax.ShapeDtypeStruct((1, side, side, config.num_channels), jnp.float32),)


def _with_image_size(config, image_size: int):
    try:
        return dataclasses.replace(config, image_size=image_size)
    except ValueError:
        raise ValueError(
            f"image_size is {image_size!r}; it must be a whole number of pixels, "
            f"at least the patch size {config.patch_size}"
        ) from None


IMAGES = Inputs("images", _image, _with_image_size, read_processor)
TEXTS = Inputs("texts", lambda config: (jax.ShapeDtypeStruct((1, 2), jnp.int32),))
TOKENS = Inputs("text that it continues", TEXTS.example)

def normal_kernel(config, key: jax.Array, number: int, shape: tuple[int, ...]) -> np.ndarray:
    """N(0, ``initializer_range``^2), drawn from ``key`` folded with ``number``."""
    # Not config.kernel_init: jax.nn.initializers round the product in another way.
    unit = jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)
    return config.initializer_range * np.asarray(unit)


class Family(NamedTuple):
    """How the files of one family become a model.

    Attributes:
      config: the class of its configs.
      model: Linen module ``model(config, num_labels, dtype=..., unroll=..., remat=...)`` that is
        called with images, with ``(input_ids, attention_mask, token_type_ids)``, or with
        ``(input_ids, positions, segments)``.
      inputs: `IMAGES`, `TEXTS` or `TOKENS`.
      classifier: transformers' class of the same model with a classification head, or of the
        language model.
      prefix: the part of the names that a file of the bare encoder leaves out, such as ``"bert."``.
      table: one entry for each parameter.
      leftovers: regular expressions (full match) of tensors that belong to pre-training.
      new: regular expressions (full match) of the parameters' paths that a file may lack, since
        they are made for the task.
      draw: (config, key, number, shape) -> the new kernel of this number, float32.
      resized: (params, config) -> the parameters for the image size of ``config``; None where
        there is no image size.
      outputs: config -> outputs of a language model's head; None where the task says how many.
    """

    config: type[ModelConfig]
    model: Callable[..., nn.Module]
    inputs: Inputs
    classifier: str
    prefix: str
    table: tuple[Entry, ...]
    leftovers: tuple[str, ...]
    new: tuple[str, ...] = (r"pooler/.*", r"head/.*")
    draw: Callable[[Any, jax.Array, int, tuple[int, ...]], np.ndarray] = normal_kernel
    resized: Callable[[dict, Any], dict] | None = None
    outputs: Callable[[Any], int] | None = None

    @property
    def purpose(self) -> str:
        """The model's use, as in the name of transformers' class ``AutoModelFor...``."""
        return self.classifier.partition("For")[2]

    @property
    def spellings(self) -> int:
        """How many spellings its names have."""
        return max(len(entry.names) for entry in self.table)


@functools.lru_cache(256)
def param_shapes(family: Family, config, num_labels: int) -> Mapping[str, tuple[int, ...]]:
    """'/'-joined path -> shape of every parameter of ``family.model(config, num_labels)``."""
    model = family.model(config, num_labels)
    example = family.inputs.example(config)
    params = jax.eval_shape(model.init, jax.random.key(0), *example)["params"]
    return MappingProxyType({path: leaf.shape for path, leaf in flat_params(params).items()})


def flat_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """'/'-joined path -> parameter."""
    return cast(dict[str, Any], flatten_dict(params, sep="/"))
