"""Data for the trainer: by name, in a fixed order, from the host to the accelerator.

A `Request` says which data a run wants. ``missing`` tells what is not there, ``known`` what is
known without it, and ``open_images``, ``open_texts`` and ``open_utterances`` open it.

Images: ``plan_storage`` decides how they are held, ``batch_ids`` (resident) or ``stream_batches``
give the training examples of each step, ``eval_batches`` those of an evaluation, and ``augment``
crops, flips, resizes and normalises inside jit.

Texts: ``tokenise`` turns them into numbers, once, and ``text_batches`` and ``eval_text_batches``
pad them.
"""

from rmlora_jax.data.content import content_of, hash_of
from rmlora_jax.data.dataset import (
    ArraySource,
    Dataset,
    ImageSource,
    Request,
    TextDataset,
    TextSplit,
    listed,
)
from rmlora_jax.data.glue import GlueTask, glue_task, write_predictions
from rmlora_jax.data.pipeline import (
    Storage,
    batch_ids,
    cached,
    eval_batches,
    load_resident,
    plan_storage,
    storage_of,
    stored_as,
    stream_batches,
)
from rmlora_jax.data.sources import (
    known,
    load_images,
    load_texts,
    missing,
    open_images,
    open_texts,
    open_utterances,
)
from rmlora_jax.data.subsets import Subset, labels_of
from rmlora_jax.data.tokens import Tokens, eval_text_batches, text_batches, tokenise
from rmlora_jax.data.vision import augment

__all__ = [
    "ArraySource",
    "Dataset",
    "GlueTask",
    "ImageSource",
    "Request",
    "Storage",
    "Subset",
    "TextDataset",
    "TextSplit",
    "Tokens",
    "augment",
    "batch_ids",
    "cached",
    "content_of",
    "eval_batches",
    "eval_text_batches",
    "glue_task",
    "hash_of",
    "known",
    "labels_of",
    "listed",
    "load_images",
    "load_resident",
    "load_texts",
    "missing",
    "open_images",
    "open_texts",
    "open_utterances",
    "plan_storage",
    "storage_of",
    "stored_as",
    "stream_batches",
    "text_batches",
    "tokenise",
    "write_predictions",
]
