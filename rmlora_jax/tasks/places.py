"""The files and folders that a config names, looked for before anything is loaded.

The network is not asked, so a model that the hub does not have is found later.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rmlora_jax import config as fields
from rmlora_jax.config import Mistake
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.files import is_writable, near
from rmlora_jax.hub.peft_config import CONFIG_FILE
from rmlora_jax.hub.pretrained import find_architecture
from rmlora_jax.hub.source import CONFIG, HUB_NAME, PACKAGED, bundled, find_folder
from rmlora_jax.models.family import Family, Inputs

OF_TEXTS = ("text.train_file", "text.test_file", "text.predict_file", "data.unlabelled_split")


def unused(config: Run, paths: Iterable[str], why: str) -> Iterator[Mistake]:
    """The fields among ``paths`` that must be left empty, as they are by default."""
    flat, known = fields.flatten(config), fields.leaves(type(config))
    for path in paths:
        if flat[path]:
            yield path, f"{known[path].default!r} {why}"


def model(c: Run) -> Iterator[str]:
    """What is wrong with ``model.source``, a folder or a name."""
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
    """What is wrong with ``model.adapter``, a folder or ''."""
    folder, field = Path(c.model.adapter).expanduser(), f"config.model.adapter={c.model.adapter!r}"
    if not c.model.adapter or (folder / CONFIG_FILE).is_file():
        return
    if not folder.is_dir():
        yield f"{field}: {no_folder(folder)}"
        return
    inside = folder / "adapter"
    hint = f"; type --config.model.adapter={inside}" if (inside / CONFIG_FILE).is_file() else ""
    yield f"{field}: the folder has no {CONFIG_FILE}{hint}"


def caches(c: Run) -> Iterator[str]:
    """Cache folders that the user named and that cannot be written. A default one may be absent."""
    flat = fields.flatten(c)
    for path, leaf in fields.leaves(type(c)).items():
        own = flat[path]
        named = leaf.spec.cache and own not in ("", leaf.default)
        if named and not is_writable(Path(own).expanduser()):
            yield (f"config.{path}={own!r}: it cannot be written; give another folder, or '' for "
                   "none")


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
