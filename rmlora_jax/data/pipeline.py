"""Which examples each process sees at each step, and their images.

The order is a function of (number of examples, seed, step) alone. Position ``j`` of the global
batch of step ``t`` is element ``t * global_batch + j`` of an endless sequence of shuffled passes;
process ``p`` of ``P`` takes the contiguous positions from ``p * B/P`` up to ``(p + 1) * B/P``. So
any number of processes sees the same global batches in the same order, and a run starts at any
step.
"""

import contextlib
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax.data.dataset import ArraySource, Dataset, ImageSource
from rmlora_jax.data.subsets import fingerprint, in_chunks
from rmlora_jax.errors import UserError
from rmlora_jax.files import read_arrays, write_arrays
from rmlora_jax.models.processor import Resize
from rmlora_jax.stopping import deaf

RESIDENT_LIMIT = 2 << 30

Arrays = tuple[np.ndarray, np.ndarray]  # images and labels


class Storage(NamedTuple):
    """How the images of a data set are held.

    Attributes:
      resident: all on the device as one array, or streamed.
      size: side, or `Resize`, to which the host brings every image; None where they stay as they
        are.
      shape: (H, W, C) of a held image.
      center: the middle part of a held image that evaluation uses, for ``vision.augment``.
      nbytes: of the held images of all splits.
    """

    resident: bool
    size: int | Resize | None
    shape: tuple[int, int, int]
    center: float
    nbytes: int


def plan_storage(data: Dataset, image_size: int, **options) -> Storage:
    """Chooses how to hold ``data`` for a model of ``image_size`` pixels; options: see `storage_of`.

    Square images of one size up to ``image_size * 256 / 224``, the common margin for random crops,
    stay as they are. All others are brought to that size; evaluation uses their middle
    ``image_size``. With ``resize``, small squares stay as they are, too, and `Resize.image` makes
    all others.

    >>> from rmlora_jax.data import load_images
    >>> plan_storage(load_images("digits"), 32)
    Storage(resident=True, size=None, shape=(8, 8, 3), center=1.0, nbytes=345024)

    Raises:
      UserError: on an unknown ``mode``.
    """
    splits = (data.train, data.validation, data.test)
    n, shape = sum(len(split) for split in splits if split is not None), data.image_shape
    return storage_of(shape, data.channels, n, image_size, **options)


def storage_of(
    shape: tuple[int, int, int] | None,
    channels: int,
    examples: int,
    image_size: int,
    mode: str = "auto",
    resident_limit: int = RESIDENT_LIMIT,
    resize: Resize | None = None,
) -> Storage:
    """`plan_storage` for this many images of this shape, None where they differ in shape."""
    if mode not in ("auto", "resident", "stream"):
        raise UserError(f"data.mode={mode!r}: must be auto, resident or stream")
    size, center = stored_as(shape, image_size, resize)
    side = size.side if isinstance(size, Resize) else size
    held = shape if side is None else (side, side, channels)
    assert held is not None  # images that differ in shape are always brought to one size
    nbytes = math.prod(held) * examples
    resident = mode == "resident" or (mode == "auto" and nbytes <= resident_limit)
    return Storage(resident, size, held, center, nbytes)


def stored_as(
    shape: tuple[int, ...] | None, image_size: int, resize: Resize | None = None
) -> tuple[int | Resize | None, float]:
    """``size`` and ``center`` of `Storage` for images (H, W, C), None where they differ in shape.

    >>> stored_as((32, 32, 3), 224), stored_as((480, 640, 3), 224)
    ((None, 1.0), (256, 0.875))

    Raises:
      UserError: ``resize`` makes no square of images of this shape.
    """
    size = round(image_size * 256 / 224)
    if resize is not None and shape is not None:
        try:
            resize.check(*shape[:2])
        except ValueError as error:
            raise UserError(f"images of {shape[0]} x {shape[1]} pixels: {error}") from None
    kept = resize is None or resize.keeps_squares
    if kept and shape is not None and shape[0] == shape[1] <= size:
        return None, 1.0
    if resize is not None:
        return resize, 1.0
    return size, min(1.0, image_size / size)


def load_resident(
    source: ImageSource,
    size: int | Resize | None = None,
    *,
    threads: int = 8,
    desc: str = "decoding",
) -> Arrays:
    """All of ``source`` as uint8 (N, H, W, C) and int32 labels (N,), with a progress bar.

    Images of several shapes need a ``size``, that of :class:`Storage`.
    """
    if isinstance(source, ArraySource) and size is None:
        return source.images, source.labels.astype(np.int32)
    labels = np.empty(len(source), np.int32)
    first, _ = source.load(0, size)
    images = np.empty((len(source), *first.shape), np.uint8)

    def fill(chunk: range) -> None:
        for i in chunk:
            images[i], labels[i] = source.load(i, size)

    for _ in in_chunks(len(source), fill, threads, desc):
        pass
    return images, labels


def cached(
    source: ImageSource,
    size: int | Resize | None,
    folder: str | os.PathLike,
    make: Callable[[], Arrays],
) -> Arrays:
    """The images and labels that ``make`` returns, from ``folder`` if they were kept there.

    The file's name is a hash of ``size`` and of what ``source`` is: the files it reads, their sizes
    and times, the split, and the examples chosen from it. Images of a source without ``identity()``
    are not kept. A damaged file is made again.
    """
    if (name := fingerprint(source, size)) is None:
        return make()
    path = Path(folder).expanduser() / f"{name}.npz"
    if found := read_arrays(path, ("images", "labels")):
        images, labels = found
        kinds = images.dtype, images.ndim, labels.dtype
        if kinds == (np.uint8, 4, np.int32) and len(images) == len(labels) == len(source):
            return images, labels
    images, labels = make()
    write_arrays(path, {"images": images, "labels": labels})
    return images, labels


def local_size(global_batch: int, process_count: int) -> int:
    """Examples of each global batch that fall to each process.

    Raises:
      UserError: if they cannot be shared equally.
    """
    if global_batch < 1 or global_batch % process_count:
        raise UserError(
            f"a batch of {global_batch} cannot be shared by {process_count} processes: "
            f"give a multiple of {process_count}"
        )
    return global_batch // process_count


def batch_ids(
    n: int,
    global_batch: int,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[np.ndarray]:
    """The example ids of each step from ``start_step``: int32 (global_batch / process_count,).

    Endless. Each pass over the ``n`` examples has its own shuffle and drops no example: a batch may
    hold the end of one pass and the beginning of the next.

    >>> ids = batch_ids(10, 4, seed=0)
    >>> sorted(np.concatenate([next(ids) for _ in range(5)]).tolist()) == sorted([*range(10)] * 2)
    True
    """
    local = local_size(global_batch, process_count)
    example = _example_at(n, global_batch, local, process_index, seed)

    def batch(step: int) -> np.ndarray:
        return np.array([example(k) for k in range(step * local, (step + 1) * local)], np.int32)

    return map(batch, itertools.count(start_step))


def _example_at(
    n: int, global_batch: int, local: int, process_index: int, seed: int
) -> Callable[[int], int]:
    """k-th example of this process -> example id, a function that worker processes can have."""
    import grain

    if n < 1:
        raise UserError("the training split is empty: lower --config.data.validation")
    ids = grain.MapDataset.range(n).seed(seed).shuffle().repeat(None)
    return functools.partial(_example, ids, global_batch, local, process_index * local)


def _example(ids: Any, global_batch: int, local: int, offset: int, k: int) -> int:
    step, j = divmod(int(k), local)
    return ids[step * global_batch + offset + j]


def _load(source: ImageSource, size: int | Resize | None, index: int) -> dict:
    """The image and label of an example id; -1 stands for padding."""
    real = index >= 0
    image, label = source.load(index if real else 0, size)
    return {
        "image": image,
        "label": np.int32(label),
        "id": np.int32(index if real else 0),
        "mask": np.bool_(real),
    }


def stream_batches(
    source: ImageSource,
    global_batch: int,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    size: int | Resize | None = None,
    threads: int = 8,
    workers: int = 0,
) -> Iterator[dict]:
    """Endless batches of this process: the examples of :func:`batch_ids`, in the same order.

    Yields:
      ``{"image": uint8 (b, size, size, C), "label": int32 (b,), "id": int32 (b,)}`` with
      ``b = global_batch / process_count``. Closing the generator stops its threads.

    Args:
      size: from :class:`Storage`.
      threads: that decode, in each process; decoding runs outside Python's lock.
      workers: processes that decode, 0 for threads of this one. Neither number changes a batch.
    """
    import grain

    local = local_size(global_batch, process_count)
    example = _example_at(len(source), global_batch, local, process_index, seed)
    first = start_step * local
    # A length that no run reaches, whole in batches and safe to count with in 64 bits.
    endless = (sys.maxsize // 4 // local) * local
    ids = grain.MapDataset.range(first, first + endless).map(example)
    for batch in _read(ids, source, size, local, threads, workers):
        del batch["mask"]
        yield batch


def eval_batches(
    data: int | ImageSource,
    global_batch: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    size: int | Resize | None = None,
    threads: int = 8,
) -> Iterator[dict]:
    """Each example once and in order, padded to whole global batches.

    Every process yields the same number of batches of the same shape, so that no process waits
    forever. Padding repeats example 0 with ``mask`` False. ``size`` and ``threads`` are
    those of :func:`stream_batches`.

    Yields:
      ``{"id": int32 (b,), "mask": bool (b,)}``; where ``data`` is a source and not the number of
      examples, also "image" and "label".

    >>> [b["id"][b["mask"]].tolist() for b in eval_batches(5, 4)]
    [[0, 1, 2, 3], [4]]
    """
    local = local_size(global_batch, process_count)
    n = data if isinstance(data, int) else len(data)
    ids = np.full(math.ceil(n / global_batch) * global_batch, -1, np.int32)
    ids[:n] = np.arange(n, dtype=np.int32)
    mine = ids.reshape(-1, process_count, local)[:, process_index]
    if isinstance(data, int):
        return ({"id": np.maximum(row, 0), "mask": row >= 0} for row in mine)
    import grain

    return _read(grain.MapDataset.source(mine.ravel().tolist()), data, size, local, threads)


def _read(
    ids, source: ImageSource, size: int | Resize | None, local: int, threads: int, workers: int = 0
) -> Iterator[dict]:
    """Batches of a grain MapDataset of ids, decoded ahead by threads or worker processes."""
    import grain

    examples = ids.map(functools.partial(_load, source, size))
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # worker processes read absl flags
            flags.FLAGS.mark_as_parsed()
        # Workers take whole batches in turn: their number does not show in the order.
        batches = (
            examples.batch(local)
            .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
            .mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        )
    else:
        ahead = max(2 * threads, 2 * local)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        batches = examples.to_iter_dataset(options).batch(local)
    with deaf() if workers else contextlib.nullcontext():
        iterator = iter(batches)
    try:
        for batch in iterator:
            # A worker's arrays lie in memory it shares: a copy gives that back at once.
            yield {k: np.array(v) for k, v in batch.items()} if workers else batch
    finally:
        iterator.close()
