"""Image data for the trainer: by name, in a fixed order, from the host to the accelerator.

``load_images`` finds a data set, ``plan_storage`` decides how it is held, ``batch_ids`` (resident)
or ``stream_batches`` give the training examples of each step, ``eval_batches`` those of an
evaluation, and ``augment`` crops, flips, resizes and normalises inside jit.
"""

from rmlora_jax.data.dataset import ArraySource, Dataset, ImageSource, Subset
from rmlora_jax.data.pipeline import (
    Storage,
    batch_ids,
    eval_batches,
    load_resident,
    local_size,
    plan_storage,
    stream_batches,
)
from rmlora_jax.data.sources import load_images
from rmlora_jax.data.vision import augment

__all__ = [
    "ArraySource",
    "Dataset",
    "ImageSource",
    "Storage",
    "Subset",
    "augment",
    "batch_ids",
    "eval_batches",
    "load_images",
    "load_resident",
    "local_size",
    "plan_storage",
    "stream_batches",
]
