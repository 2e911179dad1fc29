"""What differs between families of models, as data."""

from typing import NamedTuple

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
