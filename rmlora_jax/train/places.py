"""The files and folders that a config names, looked for before anything is loaded.

What only a network can tell (whether the hub has a model) is left to those who ask it.
"""

import os
from pathlib import Path

import ml_collections

from rmlora_jax.data.prepare.cifar import archive_of
from rmlora_jax.data.prepare.glue import is_glue
from rmlora_jax.data.speech import find_files
from rmlora_jax.data.tfds_images import Name, default_data_dir, find_prepared, not_prepared
from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.hub.peft_config import CONFIG_FILE
from rmlora_jax.hub.source import CONFIG, HUB_NAME, PACKAGED, bundled, find_folder
from rmlora_jax.train.config import KINDS, SPEECH, TEXTS, default_config, flatten

TEXT_FILES = (".csv", ".tsv", ".jsonl")
CACHES = ("data.cache", "text.cache", "compilation_cache")


def missing(c: ml_collections.ConfigDict) -> list[str]:
    """What is wrong with the places that a config of proper values names."""
    return [*_model(c), *_adapter(c), *_text_files(c), *_data(c), *_caches(c)]


def _model(c: ml_collections.ConfigDict) -> list[str]:
    source = c.model.source
    folder, field = Path(source).expanduser(), f"config.model.source={source!r}"
    if c.task == SPEECH:
        return [] if not source or folder.is_dir() else [f"{field}: {_no_folder(folder)}"]
    if folder.is_dir():
        fine = (folder / CONFIG).is_file()
        return [] if fine else [f"{field}: the folder has no {CONFIG}; give that of a model"]
    if source in bundled() or (HUB_NAME.fullmatch(source) and source not in PACKAGED):
        return []
    try:
        find_folder(source)
    except UserError as error:
        return [f"{field}: {error}{_near(folder)}"]
    return []


def _adapter(c: ml_collections.ConfigDict) -> list[str]:
    folder, field = Path(c.model.adapter).expanduser(), f"config.model.adapter={c.model.adapter!r}"
    if not c.model.adapter or (folder / CONFIG_FILE).is_file():
        return []
    if not folder.is_dir():
        return [f"{field}: {_no_folder(folder)}"]
    inside = folder / "adapter"
    hint = f"; type --config.model.adapter={inside}" if (inside / CONFIG_FILE).is_file() else ""
    return [f"{field}: the folder has no {CONFIG_FILE}{hint}"]


def _text_files(c: ml_collections.ConfigDict) -> list[str]:
    wrong = []
    for name in ("train_file", "test_file", "predict_file"):
        if not c.text[name]:
            continue
        path, field = Path(c.text[name]).expanduser(), f"config.text.{name}={c.text[name]!r}"
        if path.suffix.lower() not in TEXT_FILES:
            wrong.append(f"{field}: files of texts end in .csv, .tsv or .jsonl; convert it to one")
        elif not path.is_file():
            wrong.append(f"{field}: there is no such file{_near(path)}")
    return wrong


def _data(c: ml_collections.ConfigDict) -> list[str]:
    """A data set that is neither here nor fetched on first use."""
    if c.task not in KINDS:
        return []
    given = c.data.data_dir and Path(c.data.data_dir).expanduser()
    if given and given.exists() and not given.is_dir():
        return [f"config.data.data_dir={c.data.data_dir!r}: it is a file; give a folder"]
    try:
        if c.task == SPEECH:
            folder = find_files(c.data.data_dir)
            return [] if folder.is_dir() else [f"config.data.data_dir: {_no_folder(folder)}"]
        if c.data.name == "digits" or (c.task in TEXTS and c.text.train_file):
            return []
        name, folder = Name.parse(c.data.name), given or default_data_dir()
        fetched = is_glue(name) if c.task in TEXTS else archive_of(name) is not None
        if find_prepared(name, folder) is None:
            if not fetched:
                raise not_prepared(c.data.name, name, folder)
            if not _writable(folder):
                return [f"config.data.data_dir: {folder} cannot be written, to prepare "
                        f"{c.data.name}; give another folder"]
    except UserError as error:
        return [f"config.data.name={c.data.name!r}: {error}"]
    return []


def _caches(c: ml_collections.ConfigDict) -> list[str]:
    """Folders of caches that someone named and that cannot be written; without the default ones a
    run does as well, and slower."""
    own, default = flatten(c), flatten(default_config())
    return [
        f"config.{field}={own[field]!r}: it cannot be written; give another folder, or '' for none"
        for field in CACHES
        if own[field] not in ("", default[field]) and not _writable(Path(own[field]).expanduser())
    ]


def _writable(folder: Path) -> bool:
    """Whether a folder, or the nearest above it that is there, can be written."""
    there = next((p for p in (folder, *folder.absolute().parents) if os.path.lexists(p)), folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _no_folder(folder: Path) -> str:
    return f"there is no folder {folder}{_near(folder)}"


def _near(path: Path) -> str:
    """A hint at what lies beside a path that is not there."""
    parent = path.parent
    names = [one.name for one in parent.iterdir()] if parent.is_dir() else []
    return did_you_mean(path.name, names)
