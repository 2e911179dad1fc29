"""The files and folders that a config names, looked for before anything is loaded.

What only a network can tell (whether the hub has a model) is left to those who ask it. Every
function gives a line for each place that is not as it should be.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmlora_jax import config as fields
from rmlora_jax.config import Mistake
from rmlora_jax.data.prepare.cifar import archive_of
from rmlora_jax.data.prepare.glue import is_glue
from rmlora_jax.data.tfds_images import Name, default_data_dir, find_prepared, not_prepared
from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.fields import Run
from rmlora_jax.hub.peft_config import CONFIG_FILE
from rmlora_jax.hub.published import find_architecture
from rmlora_jax.hub.source import CONFIG, HUB_NAME, PACKAGED, bundled, find_folder

TEXT_FILES = (".csv", ".tsv", ".jsonl")


def no_texts(config: Run) -> Iterator[Mistake]:
    """The fields of texts that a task without texts must leave empty."""
    flat = fields.flatten(config)
    for path in ("text.train_file", "text.test_file", "text.predict_file", "data.unlabelled_split"):
        if flat[path]:
            yield path, f"None for {config.task}"


def model(c: Run) -> Iterator[str]:
    """The folder of ``model.source``, or its name."""
    source = c.model.source
    folder, field = Path(source).expanduser(), f"config.model.source={source!r}"
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            yield f"{field}: the folder has no {CONFIG}; give that of a model"
    elif source not in bundled() and not (HUB_NAME.fullmatch(source) and source not in PACKAGED):
        try:
            find_folder(source)
        except UserError as error:
            yield f"{field}: {error}{near(folder)}"


def adapter(c: Run) -> Iterator[str]:
    """The folder of ``model.adapter``."""
    folder, field = Path(c.model.adapter).expanduser(), f"config.model.adapter={c.model.adapter!r}"
    if not c.model.adapter or (folder / CONFIG_FILE).is_file():
        return
    if not folder.is_dir():
        yield f"{field}: {no_folder(folder)}"
        return
    inside = folder / "adapter"
    hint = f"; type --config.model.adapter={inside}" if (inside / CONFIG_FILE).is_file() else ""
    yield f"{field}: the folder has no {CONFIG_FILE}{hint}"


def images(c: Run) -> Iterator[str]:
    """A data set of images that is neither here nor fetched on first use."""
    wrong = [*wrong_data_dir(c)]
    yield from wrong
    if not wrong and c.data.name != "digits":
        yield from _tfds(c, lambda name: archive_of(name) is not None)


def texts(c: Run, own: Any) -> Iterator[str]:
    """Files of texts, or a data set that is neither here nor fetched; ``own``: section text."""
    for name in ("train_file", "test_file", "predict_file"):
        value = getattr(own, name)
        if not value:
            continue
        path, field = Path(value).expanduser(), f"config.text.{name}={value!r}"
        if path.suffix.lower() not in TEXT_FILES:
            yield f"{field}: files of texts end in .csv, .tsv or .jsonl; convert it to one"
        elif not path.is_file():
            yield f"{field}: there is no such file{near(path)}"
    wrong = [*wrong_data_dir(c)]
    yield from wrong
    if not wrong and not own.train_file:
        yield from _tfds(c, is_glue)


def _tfds(c: Run, fetched) -> Iterator[str]:
    """A data set of TFDS that is not prepared; ``fetched(name)``: whether a run prepares it."""
    folder = Path(c.data.data_dir).expanduser() if c.data.data_dir else default_data_dir()
    try:
        name = Name.parse(c.data.name)
        if find_prepared(name, folder) is None:
            if not fetched(name):
                raise not_prepared(c.data.name, name, folder)
            if not writable(folder):
                yield (f"config.data.data_dir: {folder} cannot be written, to prepare "
                       f"{c.data.name}; give another folder")
    except UserError as error:
        yield f"config.data.name={c.data.name!r}: {error}"


def wrong_data_dir(c: Run) -> Iterator[str]:
    given = c.data.data_dir and Path(c.data.data_dir).expanduser()
    if given and given.exists() and not given.is_dir():
        yield f"config.data.data_dir={c.data.data_dir!r}: it is a file; give a folder"


def caches(c: Run) -> Iterator[str]:
    """Folders of caches that someone named and that cannot be written. Without those of the
    defaults a run does as well, and slower."""
    flat = fields.flatten(c)
    for path, leaf in fields.leaves(type(c)).items():
        own = flat[path]
        named = leaf.spec.cache and own not in ("", leaf.default)
        if named and not writable(Path(own).expanduser()):
            yield (f"config.{path}={own!r}: it cannot be written; give another folder, or '' for "
                   "none")


def family_and_architecture(c: Run) -> tuple[Any, Any]:
    """The family and the config of the model, from its config.json alone.

    Raises:
      UserError: they are not on this machine, or do not fit the task.
    """
    family, found = find_architecture(c.model.source, image_size=c.model.image_size or None)
    if hasattr(found, "image_size") != (c.task == "image_classification"):
        raise UserError(
            f"config.model.source={c.model.source!r} is a {family.classifier}, which does not "
            f"fit config.task={c.task!r}; give another --config.model.source"
        )
    return family, found


def architecture(c: Run) -> Any:
    return family_and_architecture(c)[1]


def writable(folder: Path) -> bool:
    """Whether a folder, or the nearest above it that is there, can be written."""
    there = next((p for p in (folder, *folder.absolute().parents) if os.path.lexists(p)), folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def no_folder(folder: Path) -> str:
    return f"there is no folder {folder}{near(folder)}"


def near(path: Path) -> str:
    """A hint at what lies beside a path that is not there."""
    parent = path.parent
    names = [one.name for one in parent.iterdir()] if parent.is_dir() else []
    return did_you_mean(path.name, names)
