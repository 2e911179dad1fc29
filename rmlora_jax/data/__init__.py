"""Data for the trainer: by name, in a fixed order, from the host to the accelerator.

A `Request` says which data a run wants. ``missing`` tells what is not there, ``known`` what is
known without it, and ``open_images``, ``open_texts`` and ``open_utterances`` open it.

Images: ``plan_storage`` decides how they are held, ``batch_ids`` (resident) or ``stream_batches``
give the training examples of each step, ``eval_batches`` those of an evaluation, and ``augment``
crops, flips, resizes and normalises inside jit.

Texts: ``tokenise`` turns them into numbers, once, and ``text_batches`` and ``eval_text_batches``
pad them.

Chats: ``open_chats`` finds examples, ``chat_reader`` and ``encode_chats`` turn them into tokens and
targets, ``pack`` puts several into a row, and ``packed_batches``, ``single_batches`` and
``streamed_batches`` give the training batches.
"""

from rmlora_jax.data.chat import ChatDataset, Chats
from rmlora_jax.data.chat_tokens import EncodedChats, cache_file, encode_chats
from rmlora_jax.data.chat_tokens import reader as chat_reader
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
from rmlora_jax.data.packing import (
    Rows,
    eval_packed_batches,
    eval_single_batches,
    pack,
    packed_batches,
    single_batches,
)
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
    load_chats,
    load_images,
    load_texts,
    missing,
    open_chats,
    open_images,
    open_texts,
    open_utterances,
)
from rmlora_jax.data.streaming import counts_file, streamed_batches
from rmlora_jax.data.subsets import Subset, labels_of
from rmlora_jax.data.tokens import Tokens, eval_text_batches, text_batches, tokenise
from rmlora_jax.data.vision import augment

__all__ = [
    "ArraySource",
    "ChatDataset",
    "Chats",
    "Dataset",
    "EncodedChats",
    "GlueTask",
    "ImageSource",
    "Request",
    "Rows",
    "Storage",
    "Subset",
    "TextDataset",
    "TextSplit",
    "Tokens",
    "augment",
    "batch_ids",
    "cache_file",
    "cached",
    "chat_reader",
    "content_of",
    "counts_file",
    "encode_chats",
    "eval_batches",
    "eval_packed_batches",
    "eval_single_batches",
    "eval_text_batches",
    "glue_task",
    "hash_of",
    "known",
    "labels_of",
    "listed",
    "load_chats",
    "load_images",
    "load_resident",
    "load_texts",
    "missing",
    "open_chats",
    "open_images",
    "open_texts",
    "open_utterances",
    "pack",
    "packed_batches",
    "plan_storage",
    "single_batches",
    "storage_of",
    "stored_as",
    "stream_batches",
    "streamed_batches",
    "text_batches",
    "tokenise",
    "write_predictions",
]
