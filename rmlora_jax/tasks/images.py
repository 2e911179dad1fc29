"""Image classification: a ViT, and images that are resident on the device or streamed.

Both ways give the same examples in the same order; they differ in memory and time alone.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from rmlora_jax import data
from rmlora_jax.config import Mistake
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.hub import Info, Pretrained, find_folder, load_vit
from rmlora_jax.hub.pretrained import find_resize
from rmlora_jax.models import ViT
from rmlora_jax.models.family import IMAGES
from rmlora_jax.models.processor import Resize
from rmlora_jax.parallel.mesh import Devices, replicate
from rmlora_jax.tasks import places, task

COUNTED = 20_000  # streamed training examples whose labels are read before a run: seconds


def check(config: Run) -> Iterator[Mistake]:
    """What is wrong with a config for images."""
    if not config.model.source:
        yield "model.source", "a folder, or a model's name"
    yield from places.unused(config, places.OF_TEXTS, f"for {config.task}")


def open_problem(config: Run, opening: task.Opening) -> task.Problem:
    """The data set and the ViT that the config names.

    Raises:
      UserError: one of them cannot be had.
    """
    c = config.model
    folder = find_folder(c.source)  # a mistyped model is reported before any data is fetched
    resize = chosen(config, find_resize(str(folder), c.image_size or None))
    images = data.open_images(task.request(config, resize=resize))
    pretrained = load_vit(
        c.source,
        labels=images.class_names,
        image_size=c.image_size or None,
        key=opening.key,
    )
    architecture, size = pretrained.config, pretrained.config.image_size
    example = IMAGES.example(architecture)
    model = task.build_model(config, ViT, architecture, images.num_classes, attention=c.attention)
    with task.fields("model.attention"):
        jax.eval_shape(model.init, opening.key, *example)
    stored, center = data.stored_as(images.image_shape, size, resize)
    return task.of_pretrained(
        pretrained,
        images.notes,
        model=model,
        example=example,
        open_feed=lambda: open_feed(config, images, pretrained, opening.devices),
        metrics=("accuracy",),
        info=Info(
            task=config.task,
            labels=tuple(images.class_names),
            image_size=size,
            resize="square" if resize is None else "processor",
            stored_size=stored if isinstance(stored, int) else None,
            center=center,
            channels=images.channels,
            dtype=c.dtype,
        ),
        skipped=images.skipped,
    )


def chosen(config: Run, resize: Resize | None) -> Resize | None:
    """``resize``, which is the model's, unless ``data.resize`` asks for the middle square."""
    return resize if config.data.resize == "processor" else None


def shapes(config: Run) -> task.Shapes:
    """A run as shapes.

    The number of classes is that of CIFAR, of a data set on this machine, or ``data.classes``.

    Raises:
      UserError: the model's config or the number of classes is not known on this machine.
    """
    _, architecture = places.architecture(config, IMAGES)
    size, channels = architecture.image_size, architecture.num_channels
    resize = chosen(config, find_resize(config.model.source, config.model.image_size or None))
    classes, storage, examples = known(config, size, resize)
    b, struct = config.batch_size, jax.ShapeDtypeStruct
    batch, resident = {"id": struct((b,), jnp.int32)}, {}

    def held(n):
        return {"image": struct((n, *storage.shape), jnp.uint8), "label": struct((n,), jnp.int32)}

    if storage.resident:
        resident = held(examples)
    else:
        batch |= held(b)
    half, attention = (0.5,) * channels, config.model.attention
    prepare_train, _ = preparation(config, storage, resize, size, half, half)
    return task.Shapes(
        model=task.build_model(config, ViT, architecture, classes, attention=attention),
        example=IMAGES.example(architecture),
        outputs=classes,
        prepare_train=prepare_train,
        resident=resident,
        batch=batch,
    )


def known(config: Run, image_size: int, resize: Resize | None) -> tuple[int, data.Storage, int]:
    """Classes, how the images are held, and how many there are."""
    c = config.data
    if found := data.known("images", task.request(config)):
        classes = min(c.classes or found.classes, found.classes)
        train, test = (n * classes // found.classes for n in (found.train, found.test))
        train = min(train, c.per_class * classes or train, c.limit or train)
        channels = found.image_shape[-1] if found.image_shape else 3
        storage = data.storage_of(
            found.image_shape, channels, train + test, image_size, mode=c.mode, resize=resize
        )
        return classes, storage, train + test
    try:
        images = data.open_images(task.request(config, download=False))
    except UserError as e:
        if not c.classes:
            raise UserError(
                f"{e}\nTo compile without it, say how many classes it has: --config.data.classes=N"
            ) from e
        return c.classes, data.storage_of(None, 3, 0, image_size, mode="stream", resize=resize), 0
    storage = data.plan_storage(images, image_size, mode=c.mode, resize=resize)
    splits = images.train, images.validation, images.test
    return images.num_classes, storage, sum(len(split) for split in splits if split is not None)


def open_feed(
    config: Run, images: data.Dataset, pretrained: Pretrained, devices: Devices
) -> task.Feed:
    """Decodes the images that fit on the device, or opens a stream of them."""
    c, size = config.data, pretrained.config.image_size
    splits = {name: getattr(images, name) for name in ("train", "validation", "test")}
    sizes = {name: len(split) for name, split in splits.items()}
    resize = chosen(config, pretrained.image_resize)
    storage = data.plan_storage(images, size, mode=c.mode, resize=resize)
    if storage.resident:
        def decoded(name):
            desc = f"decoding {images.name} {name}"
            decode = functools.partial(
                data.load_resident, splits[name], storage.size, threads=c.workers, desc=desc
            )
            return data.cached(splits[name], storage.size, c.cache, decode) if c.cache else decode()

        pixels, labels = zip(*map(decoded, splits), strict=True)
        for name, own in zip(splits, labels, strict=True):
            task.check_labels(own, images.class_names, f"{images.name}, split {name}")
        resident = replicate(
            {"image": np.concatenate(pixels), "label": np.concatenate(labels)}, devices
        )
        counted = labels[0]
        train, evaluate = task.numbered(config, sizes)
    else:
        resident = {}
        counted = data.labels_of(images.train) if sizes["train"] <= COUNTED else None
        reading = {"size": storage.size, "threads": c.workers} | task.process()

        def checked(batches, split):
            where = f"{images.name}, split {split}"
            for batch in batches:
                task.check_labels(batch["label"], images.class_names, where, batch["id"])
                yield batch

        def train(step):
            batches = data.stream_batches(
                images.train,
                config.batch_size,
                start_step=step,
                workers=c.processes,
                seed=config.data_seed,
                **reading,
            )
            return checked(batches, "train")

        def evaluate(split):
            batches = data.eval_batches(splits[split], config.eval_batch_size, **reading)
            return checked(batches, split)

    mean, std = pretrained.image_mean, pretrained.image_std
    prepare_train, prepare_eval = preparation(config, storage, resize, size, mean, std)
    absent = () if counted is None else task.absent_classes(counted, tuple(images.class_names))
    content = {name: data.content_of(split) for name, split in splits.items()}
    return task.Feed(
        sizes, train, evaluate, resident, prepare_train, prepare_eval, absent=absent,
        content=content,
    )


def preparation(
    config: Run, storage: data.Storage, resize: Resize | None, image_size: int, mean, std
) -> tuple[Callable, Callable]:
    """``prepare_train`` and ``prepare_eval`` of a feed."""
    c = config.data
    augment = functools.partial(
        data.augment,
        image_size=image_size,
        center=storage.center,
        how=resize if storage.size is None else None,  # the host has done it
        mean=mean,
        std=std,
        dtype=jnp.dtype(config.model.dtype),
    )

    def prepare(resident, batch, *drawn, **how):
        held = {name: x[batch["id"]] for name, x in resident.items()} or batch
        return (augment(held["image"], *drawn, **how),), held["label"]

    def prepare_train(key, positions, *given):
        return prepare(*given, key, positions, train=True, crop=c.crop, flip=c.flip)

    return prepare_train, functools.partial(prepare, train=False)


TASK = task.Task(
    "image_classification",
    "the class of an image",
    "images",
    task.request,
    check,
    open_problem,
    shapes,
    lambda config: len(data.open_images(task.request(config, download=False)).train),
)
