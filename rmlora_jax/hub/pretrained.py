"""A pretrained model of any family: the folder of its files becomes a config and parameters.

The function is `load_pretrained` and this file is not called ``load.py``: importing a submodule
``rmlora_jax.hub.load`` would replace the public function `rmlora_jax.hub.load`, which opens a
trained model.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from rmlora_jax.errors import UserError, first_line
from rmlora_jax.files import read_object
from rmlora_jax.hub.source import PREPROCESSOR, find_config, find_folder, join_revision, raw_config
from rmlora_jax.hub.weights import Tensors, read_params
from rmlora_jax.models import FAMILIES
from rmlora_jax.models.decoder_files import check_supported
from rmlora_jax.models.family import (
    IMAGES,
    TEXTS,
    TOKENS,
    Family,
    Inputs,
    flat_params,
    param_shapes,
)
from rmlora_jax.models.processor import Resize


class Pretrained(NamedTuple):
    """A pretrained model, ready for ``family.model(config, num_labels)``.

    Attributes:
      family: how its files are read, and what it is called with.
      config: the architecture, with the image size asked for.
      params: nested dict of numpy arrays (or as `load_decoder` was asked for), the parameters of
        ``family.model(config, num_labels)``.
      num_labels: outputs of the head; ``num_classes`` is the same.
      labels: class names of a stored head, or those asked for; None where neither is known.
      dropped: names of tensors in the file that were left out.
      new: paths of parameters that are newly initialised.
      folder: where its files are, the tokenizer's too.
      source: what was loaded, as given; "NAME@REVISION" for a revision of a name on the hub.
      notes: what became of a stored head whose classes are not those asked for.
      moved: whether the rows of the stored head are in another order.
      image_size: side of the image in pixels; None for a model of texts, as the next two.
      image_mean, image_std: per channel, for pixels in [0, 1]: x = (pixel - mean) / std.
      image_resize: how preprocessor_config.json makes squares of images; None without that file.
      tokenizer: the folder of an adapter's own tokenizer; None: it is in ``folder``.
      tokens, rows: texts of new special tokens, and numbers of those whose rows alone are trained.
    """

    family: Family
    config: Any
    params: dict[str, Any]
    num_labels: int
    labels: tuple[str, ...] | None
    dropped: tuple[str, ...]
    new: tuple[str, ...]
    folder: Path
    source: str
    notes: tuple[str, ...] = ()
    moved: bool = False
    image_size: int | None = None
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    image_resize: Resize | None = None
    tokenizer: Path | None = None
    tokens: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()

    @property
    def num_classes(self) -> int:
        return self.num_labels


def load_pretrained(
    source: str | Path,
    *,
    num_labels: int | None = None,
    labels: Sequence[str] | None = None,
    image_size: int | None = None,
    key: jax.Array | None = None,
    dtype=jnp.float32,
    revision: str | None = None,
    inputs: Inputs | None = None,
    on_disk: bool = False,
) -> Pretrained:
    """Loads a model of any known family, with a classification head.

    Reads safetensors or ``pytorch_model.bin``, sharded or not, in any floating type, with or
    without the encoder's prefix, in the names of every release of transformers. Heads of
    pre-training are left out. A head of another size, or a pooler and head that the file lacks, are
    new: drawn with standard deviation ``config.initializer_range``, bias 0.

    Args:
      source: a local folder, a bundled model or a name on the hub, looked up in this order.
      num_labels: outputs of the head, 1 for regression; None keeps the file's head, or makes one
        for ``labels``.
      labels: names of the classes, in the order that the head is to have. A stored head for these
        classes is put into this order, see `class_order`; any other is left out, and the head is
        new. Without them a stored head of ``num_labels`` outputs stays as it is.
      image_size: side of the images in pixels; position embeddings are interpolated with
        PyTorch's bicubic kernel. None keeps the model's.
      key: for what is new; default ``jax.random.key(0)``.
      dtype: of all parameters but pooler and head, which are trained and always float32.
      revision: branch, tag or commit on the hub; ``source`` may name it, too: "NAME@REVISION".
      inputs: accept only models that are called with these.
      on_disk: as for `load_decoder`; classifiers are read all the same.

    Raises:
      UserError: a model that is not found or not supported, tensors that are missing, unexpected
        or misshapen, ``image_size`` for a model of texts, or ``num_labels`` left out where the file
        has no head.

    >>> vit = load_pretrained("vit-tiny-patch8-64-tinyimagenet", num_labels=10)
    >>> vit.config.hidden_size, vit.image_size, vit.new
    (192, 64, ('head/kernel', 'head/bias'))
    """
    folder = find_folder(source, revision)
    where, raw = raw_config(folder)
    if inputs is IMAGES:
        raw = {"model_type": "vit"} | raw
    family, config = _architecture(where, raw, inputs)
    if family.outputs is not None:
        asked = {"num_labels": num_labels, "labels": labels, "image_size": image_size}
        if given := [name for name, value in asked.items() if value is not None]:
            raise UserError(f"{source} is a language model; leave out {', '.join(given)}")
        return load_decoder(source, dtype=dtype, revision=revision, on_disk=on_disk)
    resized = config if image_size is None else _resized(source, family, config, image_size)
    tensors = Tensors(folder)

    head = [name for e in family.table if e.path.startswith("head/") for name in e.names]
    stored = next((tensors.shape(name)[0] for name in head if name in tensors), None)
    if labels is not None and num_labels is None:
        num_labels = len(labels)
    number = stored if num_labels is None else num_labels
    if number is None:
        raise UserError(f"{folder} has no head; say how many outputs it needs with num_labels=N "
                        "(of load_vit, num_classes=N)")
    if not isinstance(number, int) or number < 1:
        raise UserError(f"num_labels (of load_vit, num_classes) is {number!r}; it must be a whole "
                        "number of at least 1")
    with _naming(where):  # sizes may not go together
        shapes = param_shapes(family, config, number)
    names = None if stored is None else label_names(raw, stored)
    order, notes = tuple(range(number)) if stored == number else None, ()
    if labels is not None and stored is not None:
        order, notes = class_order(stored, names, labels, f"the head of {source}")
    wanted, leftovers = shapes, family.leftovers
    if order is None:
        wanted = {path: shape for path, shape in shapes.items() if not path.startswith("head/")}
        leftovers = (*leftovers, *(name.replace(".", r"\.") for name in head))
    on_file, dropped = read_params(tensors, family, wanted, leftovers, dtype)
    found = {path: np.asarray(x) for path, x in on_file.items()}
    new = tuple(e.path for e in family.table if e.path in shapes and e.path not in found)
    found |= {path: np.zeros(shapes[path], np.float32) for path in new}
    params = unflatten_dict(found, sep="/")
    moved = order not in (None, tuple(range(number)))
    params = with_head_order(params, order) if moved else params
    own = None if "head/kernel" in new else names
    image: dict[str, Any] = {}
    if family.inputs.processor is not None:
        path = folder / PREPROCESSOR
        with _naming(path):
            asked = read_object(path) if path.exists() else None
            processor = family.inputs.processor(asked, config, image_size)
        image = {f"image_{name}": value for name, value in processor._asdict().items()}
        image["image_size"] = resized.image_size
    pretrained = Pretrained(
        family=family,
        config=resized,
        params=family.resized(params, resized) if family.resized else params,
        num_labels=number,
        labels=own if labels is None else tuple(labels),
        dropped=dropped,
        new=new,
        folder=folder,
        source=join_revision(str(source), revision),
        notes=notes,
        moved=moved,
        **image,
    )
    return new_head(pretrained, jax.random.key(0) if key is None else key)


def load_decoder(
    source: str | Path,
    *,
    dtype=jnp.float32,
    sharding: Callable[[tuple[int, ...]], jax.sharding.Sharding] | None = None,
    revision: str | None = None,
    on_disk: bool = False,
) -> Pretrained:
    """Loads a language model.

    Reads safetensors, ``pytorch_model.bin`` or GGUF, sharded or not, in any floating type.

    Args:
      source, revision: as for `load_pretrained`.
      dtype: of all parameters; they are cast while they are read.
      sharding: shape -> where a parameter lies, such as ``lambda shape: base_sharding(shape,
        devices)``. The parameters then are `jax.Array`, and the host never holds more than one
        layer of one of them. None: numpy arrays.
      on_disk: leaves the parameters in their files, each an `OnDisk` that is read when it is used.

    Raises:
      UserError: as `load_pretrained`; also for another kind of model, and for one that is known but
        not supported: a mixture of experts, a model of more than text, quantised weights.
    """
    folder = find_folder(source, revision)
    where, raw = raw_config(folder)
    family, config = _architecture(where, raw, TOKENS)
    assert family.outputs is not None
    outputs = family.outputs(config)
    with _naming(where):  # sizes may not go together
        shapes = param_shapes(family, config, outputs)
    stored, dropped = read_params(Tensors(folder), family, shapes, family.leftovers, dtype)
    read = np.asarray if sharding is None else lambda x: x.place(sharding(x.shape))
    found = stored if on_disk else {path: read(x) for path, x in stored.items()}
    return Pretrained(
        family=family,
        config=config,
        params=unflatten_dict(found, sep="/"),
        num_labels=outputs,
        labels=None,
        dropped=dropped,
        new=(),
        folder=folder,
        source=join_revision(str(source), revision),
    )


def load_vit(source: str | Path, *, num_classes: int | None = None, **options) -> Pretrained:
    """`load_pretrained` for models of images alone; ``num_classes`` is ``num_labels``.

    >>> load_vit("vit-tiny-patch8-64-tinyimagenet").num_classes
    200
    """
    return load_pretrained(source, num_labels=num_classes, inputs=IMAGES, **options)


def load_text(source: str | Path, **options) -> Pretrained:
    """`load_pretrained` for models of texts alone."""
    return load_pretrained(source, inputs=TEXTS, **options)


def new_head(pretrained: Pretrained, key: jax.Array) -> Pretrained:
    """The same model with all that is new drawn from ``key``; no file is read."""
    family, config = pretrained.family, pretrained.config
    params = flat_params(pretrained.params)
    for number, path in enumerate(sorted(pretrained.new)):
        if path.endswith("/kernel"):
            params[path] = family.draw(config, key, number, params[path].shape)
    return pretrained._replace(params=unflatten_dict(params, sep="/"))


def find_architecture(source: str, *, image_size: int | None = None) -> tuple[Family, Any]:
    """The family and the config of a model, from its config.json alone.

    The network is never asked; `find_config` says where it looks.

    Args:
      source: as for `find_folder`.
      image_size: pixels, in place of the model's own; a model of texts ignores it.

    Raises:
      UserError: no config.json there, or one that is not supported.

    >>> family, config = find_architecture("microsoft/deberta-v3-base")
    >>> config.hidden_size, config.span
    (768, 256)
    """
    where, raw = find_config(source)
    family, config = _architecture(where, raw)
    if image_size and family.inputs.resized:
        config = _resized(source, family, config, image_size)
    return family, config


def find_resize(source: str, image_size: int | None = None) -> Resize | None:
    """How a model's preprocessor_config.json makes squares of images; None without that file.

    Of a published model whose files are not here: resized to the model's square, as in most.

    >>> find_resize("google/vit-base-patch16-224-in21k", 384)
    Resize(side=384, size=(384, 384), resample=2, crop=False)
    """
    where, raw = find_config(source)
    family, config = _architecture(where, raw, IMAGES)
    path = Path(where).with_name(PREPROCESSOR)
    asked = {} if where == source else read_object(path) if path.exists() else None
    with _naming(path):
        assert family.inputs.processor is not None
        return family.inputs.processor(asked, config, image_size).resize


def _architecture(
    where: str | Path, raw: Mapping[str, Any], inputs: Inputs | None = None
) -> tuple[Family, Any]:
    """The family and the config that a config.json asks for, among models with these inputs."""
    known = {kind: f for kind, f in FAMILIES.items() if inputs in (None, f.inputs)}
    kind = raw.get("model_type")
    with _naming(where):
        check_supported(raw)
    if not isinstance(kind, str) or kind not in known:
        raise UserError(f"{where}: model_type is {repr(kind)[:80]}; known are {', '.join(known)}")
    with _naming(where):
        return known[kind], known[kind].config.from_hf(raw)


def _resized(source: str | Path, family: Family, config, image_size: int):
    """The config for images of this size."""
    if family.inputs.resized is None:
        raise UserError(f"{source} is a model of {family.inputs.name}; leave out image_size")
    with _naming(source):
        return family.inputs.resized(config, image_size)


@contextlib.contextmanager
def _naming(place: str | Path) -> Iterator[None]:
    """Turns an error about what a file asks for into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{place}: {first_line(error)[:300]}") from None


def label_names(config: Mapping[str, Any], number: int) -> tuple[str, ...] | None:
    """The names under ``id2label``, None where they are not those of ``number`` classes.

    >>> label_names({"id2label": {"0": "cat", "1": "dog"}}, 2)
    ('cat', 'dog')
    """
    names = config.get("id2label")
    if not isinstance(names, Mapping) or len(names) != number:
        return None
    found = [names.get(str(index)) for index in range(number)]
    return tuple(map(str, found)) if all(isinstance(n, str | int | float) for n in found) else None


def class_order(
    stored: int, names: Sequence[str] | None, labels: Sequence[str], what: str
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Which output of a stored head each of the classes ``labels`` is, and what to tell about it.

    Classes are matched by name, exactly or, where that leaves no two alike, without regard to upper
    and lower case and to spaces around them. A head without names, or with those that transformers
    makes up (LABEL_0, LABEL_1, ...), is taken to have the order of ``labels``.

    Args:
      stored: outputs of the head.
      names: of its classes, where it has names.
      labels: the classes in the order that is wanted.
      what: the head, in words.

    Returns:
      (order, notes): output ``i`` of the head that is wanted is output ``order[i]`` of the stored
      one; None where its classes are others.

    >>> class_order(2, ("pos", "neg"), ("neg", "pos"), "the head")[0]
    (1, 0)
    >>> class_order(2, ("POS", "NEG"), ("neg", "pos"), "the head")[0]
    (1, 0)
    >>> print(class_order(2, ("cat", "dog"), ("neg", "pos"), "the head")[0])
    None
    """
    unnamed = names is None or [*names] == [f"LABEL_{i}" for i in range(stored)]
    if unnamed and stored == len(labels):
        note = f"{what} does not name its classes; they are taken to be, in this order, "
        return tuple(range(stored)), (note + listed(labels),)
    if names is None:
        words = f"{what} has {stored} outputs, the data {len(labels)} classes"
        return None, (f"{words}; a new one is made",)
    for plain in (str, lambda name: name.strip().casefold()):
        places = {plain(name): i for i, name in enumerate(names)}
        wanted = [plain(name) for name in labels]
        if len(places) == len(names) == len(set(wanted)) and places.keys() == set(wanted):
            order = tuple(places[name] for name in wanted)
            note = f"{what} has the classes of the data in another order; it is put into theirs"
            return order, () if order == tuple(range(stored)) else (note,)
    own, wanted = (f"{len(x)} classes ({listed(x)})" for x in (names, labels))
    return None, (f"{what} is for {own}, the data has {wanted}; a new one is made",)


def listed(names: Sequence[str]) -> str:
    """The first ten names.

    >>> listed("abcdefghijkl")
    'a, b, c, d, e, f, g, h, i, j, ...'
    """
    return ", ".join([*(str(name)[:40] for name in names[:10]), *["..."] * (len(names) > 10)])


def with_head_order(params: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """The same parameters with output ``order[i]`` of the head as output ``i``, factors too."""
    whole = [f"head/{leaf}" for leaf in ("kernel", "bias", "lora_b", "lora_m")]
    flat = flat_params(params)
    flat |= {path: flat[path][..., np.array(order)] for path in whole if path in flat}
    return unflatten_dict(flat, sep="/")
