"""Image classification: a ViT, and images that are resident on the device or streamed.

Both give the same examples in the same order at the same step, so that resident or streamed is a
matter of memory alone.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from rmlora_jax import data
from rmlora_jax import methods as method
from rmlora_jax.errors import UserError
from rmlora_jax.hub import Info, Pretrained, find_folder, load_vit, new_vit_head
from rmlora_jax.models import ViT, ViTConfig
from rmlora_jax.parallel.mesh import Devices, replicate
from rmlora_jax.tasks.task import Feed, Problem, absent_classes, checkpoint_notes, numbered
from rmlora_jax.train.config import data_seed
from rmlora_jax.train.fields import fields

COUNTED = 20_000  # streamed training examples whose labels are read before a run: seconds


def open_problem(
    config: ml_collections.ConfigDict, devices: Devices, head_key: jax.Array
) -> Problem:
    """The data set and the ViT that the config names.

    Raises:
      UserError: one of them cannot be had.
    """
    find_folder(config.model.source)  # a mistyped model is said before any data is fetched
    images = load(config)
    pretrained = load_vit(
        config.model.source,
        num_classes=images.num_classes,
        image_size=config.model.image_size or None,
        key=head_key,
    )
    model = build_model(config, pretrained.config, images.num_classes)
    size = pretrained.image_size
    image = jax.ShapeDtypeStruct((1, size, size, pretrained.config.num_channels), jnp.float32)
    with fields("model.attention"):
        jax.eval_shape(model.init, head_key, image)
    return Problem(
        model=model,
        params=pretrained.params,
        new=pretrained.new,
        reseeded=lambda key: new_vit_head(pretrained, key).params,
        example=(image,),
        open_feed=lambda: open_feed(config, images, pretrained, devices),
        metrics=("accuracy",),
        notes=checkpoint_notes(pretrained),
        pretrained=pretrained,
        info=info(config, images, size),
        skipped=images.skipped,
    )


def build_model(
    config: ml_collections.ConfigDict, architecture: ViTConfig, num_classes: int
) -> ViT:
    """The ViT of a run, with what its method puts into the layers."""
    return ViT(
        method.architecture(config, architecture),
        num_classes,
        dtype=jnp.dtype(config.model.dtype),
        attention=config.model.attention,
        unroll=min(config.model.unroll, architecture.num_hidden_layers),
        remat=config.model.remat,
    )


def info(config: ml_collections.ConfigDict, images: data.Dataset, size: int) -> Info:
    """What tells how to prepare an image as the evaluation does."""
    storage = data.plan_storage(images, size, mode=config.data.mode)
    return Info(
        task=config.task,
        labels=tuple(images.class_names),
        image_size=size,
        stored_size=storage.size,
        center=storage.center,
        channels=images.channels,
        dtype=config.model.dtype,
    )


def load(config: ml_collections.ConfigDict, *, download: bool = True) -> data.Dataset:
    """The data set that the config names, with a validation split carved from train."""
    c = config.data
    return data.load_images(
        c.name,
        data_dir=c.data_dir,
        validation=c.validation,
        train_split=c.train_split,
        test_split=c.test_split,
        image_key=c.image_key,
        label_key=c.label_key,
        classes=c.classes,
        per_class=c.per_class,
        limit=c.limit,
        download=download,
        bad_records=c.bad_records,
        cache=c.cache,
        threads=c.workers,
    )


def open_feed(
    config: ml_collections.ConfigDict,
    images: data.Dataset,
    pretrained: Pretrained,
    devices: Devices,
) -> Feed:
    """Decodes what fits onto the device, or opens the stream."""
    c = config.data
    splits = {"train": images.train, "validation": images.validation, "test": images.test}
    sizes = {name: len(split) for name, split in splits.items()}
    storage = data.plan_storage(images, pretrained.image_size, mode=c.mode)
    if storage.resident:
        def decode(name):
            desc = f"decoding {images.name} {name}"
            return data.load_resident(splits[name], storage.size, threads=c.workers, desc=desc)

        arrays = {
            name: data.cached(split, storage.size, c.cache, functools.partial(decode, name))
            if c.cache
            else decode(name)
            for name, split in splits.items()
        }
        for name, (_, labels) in arrays.items():
            check_labels(labels, images.num_classes, f"{images.name}, split {name}")
        resident = replicate(
            {
                "image": np.concatenate([pixels for pixels, _ in arrays.values()]),
                "label": np.concatenate([labels for _, labels in arrays.values()]),
            },
            devices,
        )
        train, evaluate = numbered(config, sizes)
        labels = arrays["train"][1]
    else:
        resident = {}
        labels = data.labels_of(images.train) if sizes["train"] <= COUNTED else None
        process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        reading = {"size": storage.size, "threads": c.workers}

        def checked(batches, split):
            where = f"{images.name}, split {split}"
            for batch in batches:
                check_labels(batch["label"], images.num_classes, where, batch["id"])
                yield batch

        def train(step):
            batches = data.stream_batches(
                images.train,
                config.batch_size,
                start_step=step,
                workers=c.processes,
                seed=data_seed(config),
                **process,
                **reading,
            )
            return checked(batches, "train")

        def evaluate(split):
            batches = data.eval_batches(splits[split], config.eval_batch_size, **process, **reading)
            return checked(batches, split)

    prepare_train, prepare_eval = preparation(
        config,
        image_size=pretrained.image_size,
        center=storage.center,
        mean=pretrained.image_mean,
        std=pretrained.image_std,
    )
    absent = () if labels is None else absent_classes(labels, tuple(images.class_names))
    return Feed(sizes, train, evaluate, resident, prepare_train, prepare_eval, absent=absent)


def preparation(config: ml_collections.ConfigDict, **image) -> tuple[Callable, Callable]:
    """``prepare_train`` and ``prepare_eval`` of a `Feed`; ``image`` are arguments of `augment`."""
    c = config.data
    augment = functools.partial(data.augment, dtype=jnp.dtype(config.model.dtype), **image)

    def examples(resident, batch):
        if resident:
            return resident["image"][batch["id"]], resident["label"][batch["id"]]
        return batch["image"], batch["label"]

    def prepare_train(key, positions, resident, batch):
        pixels, labels = examples(resident, batch)
        pixels = augment(pixels, key, positions, train=True, crop=c.crop, flip=c.flip)
        return (pixels,), labels

    def prepare_eval(resident, batch):
        pixels, labels = examples(resident, batch)
        return (augment(pixels, train=False),), labels

    return prepare_train, prepare_eval


def check_labels(labels: np.ndarray, num_classes: int, where: str, ids=None) -> None:
    """Raises a UserError for a label that the head has no output for.

    ``ids`` are the examples' own numbers, where ``labels`` are not those of a whole split.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        example = wrong[0] if ids is None else ids[wrong[0]]
        raise UserError(
            f"{where}: example {example} has label {labels[wrong[0]]}, but the data set declares "
            f"{num_classes} classes, 0 to {num_classes - 1}; correct the data set's features"
        )
