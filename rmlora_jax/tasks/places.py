"""The files and folders that a config names, looked for before anything is loaded.

The network is not asked, so a model that the hub does not have is found later.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from rmlora_jax.config import Mistake, flatten, leaves, with_values
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.files import is_writable, near
from rmlora_jax.hub.gguf_file import SUFFIX
from rmlora_jax.hub.peft_config import CONFIG_FILE, read_config
from rmlora_jax.hub.pretrained import find_architecture
from rmlora_jax.hub.source import (
    CONFIG,
    HUB_NAME,
    PACKAGED,
    bundled,
    find_folder,
    gguf_files,
    join_revision,
    split_revision,
)
from rmlora_jax.models.family import Family, Inputs

OF_TEXTS = ("text.train_file", "text.test_file", "text.predict_file", "data.unlabelled_split")


def unused(config: Run, paths: Iterable[str], why: str) -> Iterator[Mistake]:
    """The fields among ``paths`` that must be left empty, as they are by default."""
    flat, known = flatten(config), leaves(type(config))
    for path in paths:
        if flat[path]:
            yield path, f"{known[path].default!r} {why}"


def missing_model(c: Run) -> Iterator[str]:
    """What is wrong with ``model.source``, a folder or a name."""
    source = c.model.source
    folder, field = Path(source).expanduser(), f"config.model.source={source!r}"
    if folder.is_dir():
        try:
            if not (folder / CONFIG).is_file() and not gguf_files(folder):
                yield f"{field}: the folder has no {CONFIG}; give that of a model"
        except UserError as error:
            yield f"{field}: {error}"
    elif source not in bundled() and not (
        HUB_NAME.fullmatch(source) and source not in PACKAGED and folder.suffix != SUFFIX
    ):
        try:
            find_folder(source)
        except UserError as error:
            yield f"{field}: {error}{near(folder)}"


def missing_adapter(c: Run) -> Iterator[str]:
    """What is wrong with ``model.adapter``, a folder or ''."""
    folder, field = Path(c.model.adapter).expanduser(), f"config.model.adapter={c.model.adapter!r}"
    if not c.model.adapter:
        return
    if (folder / CONFIG_FILE).is_file():
        try:
            its = read_config(folder)
        except UserError as error:
            yield f"{field}: {error}"
            return
        name, revision = split_revision(c.model.source)
        own, given = (join_revision(name, one or "main") for one in (its.revision, revision))
        if its.base == name and own != given:
            yield f"{field}: its base is {own}; type --config.model.source={own}"
        return
    if not folder.is_dir():
        yield f"{field}: {no_folder(folder)}"
        return
    inside = folder / "adapter"
    hint = f"; type --config.model.adapter={inside}" if (inside / CONFIG_FILE).is_file() else ""
    yield f"{field}: the folder has no {CONFIG_FILE}{hint}"


def closed_caches(c: Run) -> Iterator[str]:
    """Cache folders that the user named and that cannot be written. For default ones, see
    `without_closed`."""
    known = leaves(type(c))
    for path, own in _closed(c).items():
        if own != known[path].default:
            yield (f"config.{path}={own!r}: it cannot be written; give another folder, or '' for "
                   "none")


def without_closed(c: Run) -> Run:
    """The config without cache folders that cannot be written; a line says that there is none."""
    closed = _closed(c)
    if closed and jax.process_index() == 0:
        print(f"note: nothing is kept in {', '.join(dict.fromkeys(closed.values()))}, which cannot "
              "be written", flush=True)
    return with_values(c, dict.fromkeys(closed, ""))


def _closed(c: Run) -> dict[str, str]:
    flat = flatten(c)
    caches = {path: flat[path] for path, leaf in leaves(type(c)).items() if leaf.spec.cache}
    return {
        path: own for path, own in caches.items()
        if own and not is_writable(Path(os.path.expanduser(own)))
    }


def architecture(c: Run, inputs: Inputs) -> tuple[Family, Any]:
    """The family and the config of the model, from its config.json alone.

    Raises:
      UserError: there is no config.json on this machine, or the model does not take ``inputs``.
    """
    family, found = find_architecture(c.model.source, image_size=c.model.image_size or None)
    if family.inputs is not inputs:
        raise UserError(
            f"config.model.source={c.model.source!r} is a {family.classifier}, which does not "
            f"fit config.task={c.task!r}; give another --config.model.source"
        )
    return family, found


def no_folder(folder: Path) -> str:
    return f"there is no folder {folder}{near(folder)}"
