"""Data for the trainer: by name, in a fixed order, from the host to the accelerator.

Images: ``load_images`` finds a data set, ``plan_storage`` decides how it is held, ``batch_ids``
(resident) or ``stream_batches`` give the training examples of each step, ``eval_batches`` those of
an evaluation, and ``augment`` crops, flips, resizes and normalises inside jit.

Texts: ``load_texts`` finds a data set, ``tokenise`` makes numbers of it, once, and ``text_batches``
pads them.
"""

from rmlora_jax.data.bad import listed
from rmlora_jax.data.dataset import ArraySource, Dataset, ImageSource, Subset
from rmlora_jax.data.decoded import cached
from rmlora_jax.data.glue import GlueTask, glue_task, write_predictions
from rmlora_jax.data.pipeline import (
    RESIDENT_LIMIT,
    Storage,
    batch_ids,
    eval_batches,
    load_resident,
    local_size,
    plan_storage,
    stored_as,
    stream_batches,
)
from rmlora_jax.data.sources import load_images
from rmlora_jax.data.subsets import labels_of
from rmlora_jax.data.text import TextDataset, TextSplit, load_texts
from rmlora_jax.data.tokens import Tokens, tokenise
from rmlora_jax.data.vision import augment

__all__ = [
    "RESIDENT_LIMIT",
    "ArraySource",
    "Dataset",
    "GlueTask",
    "ImageSource",
    "Storage",
    "Subset",
    "TextDataset",
    "TextSplit",
    "Tokens",
    "augment",
    "batch_ids",
    "cached",
    "eval_batches",
    "glue_task",
    "labels_of",
    "listed",
    "load_images",
    "load_resident",
    "load_texts",
    "local_size",
    "plan_storage",
    "stored_as",
    "stream_batches",
    "tokenise",
    "write_predictions",
]
