"""Image classification: a ViT, and images that are resident on the device or streamed.

Both give the same examples in the same order at the same step, so that resident or streamed is a
matter of memory alone.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from rmlora_jax import data, methods
from rmlora_jax.config import Mistake
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.hub import Info, Pretrained, find_folder, load_vit, new_vit_head
from rmlora_jax.models import ViT, ViTConfig
from rmlora_jax.models.family import IMAGES
from rmlora_jax.parallel.mesh import Devices, replicate
from rmlora_jax.tasks import places
from rmlora_jax.tasks.task import (
    Feed,
    Opening,
    Problem,
    Shapes,
    Task,
    absent_classes,
    checkpoint_notes,
    classification,
    fields,
    numbered,
)

COUNTED = 20_000  # streamed training examples whose labels are read before a run: seconds


def check(config: Run) -> Iterator[Mistake]:
    """What is wrong with a config for images."""
    if not config.model.source:
        yield "model.source", "a folder, or a model's name"
    yield from places.no_texts(config)


def missing(config: Run) -> Iterator[str]:
    yield from places.model(config)
    yield from places.adapter(config)
    yield from data.missing("images", request(config))


def open_problem(config: Run, opening: Opening) -> Problem:
    """The data set and the ViT that the config names.

    Raises:
      UserError: one of them cannot be had.
    """
    find_folder(config.model.source)  # a mistyped model is reported before any data is fetched
    images = load(config)
    pretrained = load_vit(
        config.model.source,
        num_classes=images.num_classes,
        image_size=config.model.image_size or None,
        key=opening.key,
    )
    model = build_model(config, pretrained.config, images.num_classes)
    size = pretrained.image_size
    assert size is not None  # of every model of images
    image = jax.ShapeDtypeStruct((1, size, size, pretrained.config.num_channels), jnp.float32)
    with fields("model.attention"):
        jax.eval_shape(model.init, opening.key, image)
    return Problem(
        model=model,
        params=pretrained.params,
        new=pretrained.new,
        reseeded=lambda key: new_vit_head(pretrained, key).params,
        example=(image,),
        open_feed=lambda: open_feed(config, images, pretrained, opening.devices),
        objective=classification(config.optimizer.label_smoothing),
        metrics=("accuracy",),
        notes=(*checkpoint_notes(pretrained), *images.notes),
        pretrained=pretrained,
        info=info(config, images, size),
        skipped=images.skipped,
    )


def shapes(config: Run) -> Shapes:
    """A run as shapes. The number of classes is that of CIFAR, of a data set that is on this
    machine, or ``data.classes``.

    Raises:
      UserError: what of the config is not known without more than is here.
    """
    _, architecture = places.architecture(config, IMAGES)
    classes, storage, examples = known(config, architecture.image_size)
    b, struct = config.batch_size, jax.ShapeDtypeStruct
    batch, resident = {"id": struct((b,), jnp.int32)}, {}

    def held(n):
        return {"image": struct((n, *storage.shape), jnp.uint8), "label": struct((n,), jnp.int32)}

    if storage.resident:
        resident = held(examples)
    else:
        batch |= held(b)
    channels, size = architecture.num_channels, architecture.image_size
    prepare_train, _ = preparation(
        config,
        image_size=size,
        center=storage.center,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )
    return Shapes(
        model=build_model(config, architecture, classes),
        example=(struct((1, size, size, channels), jnp.float32),),
        outputs=classes,
        objective=classification(config.optimizer.label_smoothing),
        prepare_train=prepare_train,
        resident=resident,
        batch=batch,
    )


def known(config: Run, image_size: int) -> tuple[int, data.Storage, int]:
    """Classes, how the images are held, and how many there are."""
    c = config.data
    if found := data.known("images", request(config)):
        classes = min(c.classes or found.classes, found.classes)
        train, test = (n * classes // found.classes for n in (found.train, found.test))
        train = min(train, c.per_class * classes or train, c.limit or train)
        channels = found.image_shape[-1] if found.image_shape else 3
        storage = data.storage_of(
            found.image_shape, channels, train + test, image_size, mode=c.mode
        )
        return classes, storage, train + test
    try:
        images = load(config, download=False)
    except UserError as e:
        if not c.classes:
            raise UserError(
                f"{e}\nTo compile without it, say how many classes it has: --config.data.classes=N"
            ) from e
        return c.classes, data.storage_of(None, 3, 0, image_size, mode="stream"), 0
    storage = data.plan_storage(images, image_size, mode=c.mode)
    splits = images.train, images.validation, images.test
    return images.num_classes, storage, sum(len(split) for split in splits if split is not None)


def build_model(config: Run, architecture: ViTConfig, num_classes: int) -> ViT:
    """The ViT of a run, with what its method puts into the layers."""
    return ViT(
        methods.architecture(config, architecture),
        num_classes,
        dtype=jnp.dtype(config.model.dtype),
        attention=config.model.attention,
        unroll=min(config.model.unroll, architecture.num_hidden_layers),
        remat=config.model.remat,
    )


def info(config: Run, images: data.Dataset, size: int) -> Info:
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


def load(config: Run, *, download: bool = True) -> data.Dataset:
    """The data set that the config names, with a validation split carved from train."""
    return data.open_images(request(config, download=download))


def request(config: Run, *, download: bool = True) -> data.Request:
    """The images that the config names."""
    c = config.data
    return data.Request(
        c.name,
        data_dir=c.data_dir,
        validation=c.validation,
        train_split=c.train_split,
        test_splits={"test": c.test_split},
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
    config: Run,
    images: data.Dataset,
    pretrained: Pretrained,
    devices: Devices,
) -> Feed:
    """Decodes what fits onto the device, or opens the stream."""
    c = config.data
    splits = {"train": images.train, "validation": images.validation, "test": images.test}
    sizes = {name: len(split) for name, split in splits.items()}
    assert pretrained.image_size is not None
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
                seed=config.data_seed,
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


def preparation(config: Run, **image) -> tuple[Callable, Callable]:
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


TASK = Task(
    "image_classification",
    "the class of an image",
    check,
    missing,
    open_problem,
    shapes,
    lambda config: len(load(config, download=False).train),
)
