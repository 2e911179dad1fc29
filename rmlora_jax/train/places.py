"""The files and folders that a config names, looked for before anything is loaded.

What only a network can tell (whether the hub has a model) is left to those who ask it.
"""

from pathlib import Path

import ml_collections

from rmlora_jax import data
from rmlora_jax.errors import UserError
from rmlora_jax.files import is_writable, near
from rmlora_jax.hub.peft_config import CONFIG_FILE
from rmlora_jax.hub.source import CONFIG, HUB_NAME, PACKAGED, bundled, find_folder
from rmlora_jax.train.config import KINDS, SPEECH, TEXTS, default_config, flatten

CACHES = ("data.cache", "text.cache", "compilation_cache")


def missing(c: ml_collections.ConfigDict) -> list[str]:
    """What is wrong with the places that a config of proper values names."""
    return [*_model(c), *_adapter(c), *_data(c), *_caches(c)]


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
        return [f"{field}: {error}{near(folder)}"]
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


def _data(c: ml_collections.ConfigDict) -> list[str]:
    """A data set that is neither here nor fetched on first use."""
    from rmlora_jax.tasks import images, speech, text  # speech imports base_run, which imports this

    if c.task not in KINDS:
        return []
    if c.task == SPEECH:
        return data.missing("utterances", speech.request(c))
    if c.task in TEXTS:
        return data.missing("texts", text.request(c))
    return data.missing("images", images.request(c))


def _caches(c: ml_collections.ConfigDict) -> list[str]:
    """Folders of caches that someone named and that cannot be written; without the default ones a
    run does as well, and slower."""
    own, default = flatten(c), flatten(default_config())
    return [
        f"config.{field}={own[field]!r}: it cannot be written; give another folder, or '' for none"
        for field in CACHES
        if own[field] not in ("", default[field]) and not is_writable(Path(own[field]).expanduser())
    ]


def _no_folder(folder: Path) -> str:
    return f"there is no folder {folder}{near(folder)}"
