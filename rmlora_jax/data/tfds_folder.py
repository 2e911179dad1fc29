"""Folders of prepared TFDS data sets: found by name and opened, without TensorFlow.

They are found by looking (``data_dir/name[/config]/version``), not through the builders' code:
faster, works for data sets that TFDS does not know, and never imports TensorFlow.
"""

import difflib
import fnmatch
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rmlora_jax import extras
from rmlora_jax.data.dataset import Request, shown
from rmlora_jax.errors import UserError, first_line
from rmlora_jax.files import is_writable

_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.-]+))?(:(?P<version>[\d.*]+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def import_tfds():
    """tensorflow_datasets, when first needed (0.3 s), without its advice to install OpenCV."""
    import tensorflow_datasets

    logging.getLogger("absl").addFilter(_is_needed)
    return tensorflow_datasets


def _is_needed(record: logging.LogRecord) -> bool:
    return "OpenCV is not installed" not in str(record.msg)


def data_dir_of(request: Request) -> Path:
    """The folder of TFDS: the request's, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        return Path(request.data_dir or default).expanduser()
    except RuntimeError as error:
        raise UserError(f"{error} Name a folder with --config.data.data_dir") from error


class Name(NamedTuple):
    """``name[/config][:version]`` taken apart; the version may hold ``*``."""

    name: str
    config: str | None = None
    version: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Name":
        """
        >>> Name.parse("eurosat/rgb:2.0.0")
        Name(name='eurosat', config='rgb', version='2.0.0')
        """
        match = _NAME.fullmatch(text)
        if not match:
            raise UserError(
                f"{text!r} is not the name of a data set: type name, name/config or name:1.0.0"
            )
        return cls(**match.groupdict())


def find_prepared(name: Name, data_dir: Path) -> Path | None:
    """The folder of the newest fitting version, or None.

    Raises:
      UserError: if ``name`` has several configs there and none was asked for.
    """
    root = data_dir / name.name
    if name.config:
        return _newest(root / name.config, name.version)
    if found := _newest(root, name.version):
        return found
    configs = {p.name: v for p in _folders(root) if (v := _newest(p, name.version))}
    if len(configs) > 1:
        raise UserError(
            f"{data_dir} has several configs of {name.name}: {', '.join(sorted(configs))}\n"
            f"Choose one, such as --config.data.name={name.name}/{min(configs)}"
        )
    return next(iter(configs.values()), None)


def _newest(folder: Path, wanted: str | None) -> Path | None:
    found = [path.parent for path in folder.glob("*/features.json")]
    versions = [
        path for path in found
        if _VERSION.fullmatch(path.name) and fnmatch.fnmatchcase(path.name, wanted or "*")
    ]
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))), default=None)


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []


Prepare = Callable[[Request], Path]  # fetches a data set, prepares it and returns its folder


def prepared(request: Request, prepare: Prepare | None = None) -> Path:
    """The folder of the data set, made by ``prepare`` if it is not there yet.

    Raises:
      UserError: the data set is neither here nor can it be prepared.
    """
    folder, data_dir = _look(request, prepare)
    if folder:
        return folder
    if prepare is None or not request.download:
        raise UserError(
            f"{request.name} is not prepared in {data_dir}: type\n"
            f"python -m rmlora_jax.data.prepare {request.name} --data_dir={data_dir}"
        )
    return prepare(request)


def tfds_missing(request: Request, prepare: Prepare | None = None) -> list[str]:
    """``Source.missing`` of a data set that ``prepare`` makes on first use, where it is given."""
    folder, data_dir = _look(request, prepare)
    if folder or is_writable(data_dir):
        return []
    return [
        f"config.data.data_dir: {data_dir} cannot be written, to prepare {request.name}; give "
        "another folder"
    ]


def _look(request: Request, prepare: Prepare | None) -> tuple[Path | None, Path]:
    """The folder of the data set, where it is there, and that of TFDS."""
    name, data_dir = Name.parse(request.name), data_dir_of(request)
    folder = find_prepared(name, data_dir)
    if folder is None and prepare is None:
        raise not_prepared(request.name, name, data_dir)
    return folder, data_dir


def not_prepared(text: str, name: Name, data_dir: Path) -> UserError:
    """The error for a data set that :func:`find_prepared` did not find, with what to type."""
    here = sorted(p.name for p in _folders(data_dir / name.name))
    if here:
        return UserError(
            f"{text} is not prepared in {data_dir}, which has of {name.name}: {', '.join(here)}\n"
            "Ask for one of those with --config.data.name, or for another folder with "
            "--config.data.data_dir"
        )
    known = set(import_tfds().list_builders(with_community_datasets=False))
    if name.name in known:
        return UserError(
            f"{text} is not prepared in {data_dir}; preparing it needs TensorFlow, once: type\n"
            f"{extras.install('prepare')} && "
            f"python -m rmlora_jax.data.prepare {text} --data_dir={data_dir}"
        )
    choices = (known | {"digits"} | {p.name for p in _folders(data_dir)}) - {name.name}
    near = difflib.get_close_matches(name.name, choices, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see tensorflow.org/datasets/catalog"
    return UserError(
        f"no data set {name.name!r} is known, nor in {data_dir}: {hint}\n"
        "A data set of your own is found there by its folder name; "
        "--config.data.data_dir names another folder"
    )


def open_builder(folder: Path) -> Any:
    """TFDS's read-only builder of a prepared folder."""
    try:
        return import_tfds().builder_from_directory(str(folder))
    except Exception as error:  # TFDS raises many kinds on a damaged or foreign folder
        why = f"{type(error).__name__}: {first_line(error)[:300]}"
        raise UserError(
            f"{folder} cannot be read as a TFDS data set: {why}\n"
            "Delete it and prepare it again, or name another folder with --config.data.data_dir"
        ) from error


def open_records(builder: Any, split: str, **options) -> Any:
    """The examples of a split, read at random. ``options`` are those of ``as_data_source``.

    Raises:
      UserError: the split does not exist, is damaged, or has a format without random reads.
    """
    folder, info = Path(builder.data_dir), builder.info
    try:
        records = builder.as_data_source(split=split, **options)
        count = len(records)
    except NotImplementedError as error:
        name = info.full_name[:200]
        kind = info.file_format
        raise UserError(
            f"{folder} is stored as {kind.value if kind else 'an unknown format'}, which cannot be "
            "read at random; prepare it again in another folder: type\n"
            f"python -m rmlora_jax.data.prepare {name.replace('/' + str(info.version), '')} "
            "--data_dir=OTHER, then use --config.data.data_dir=OTHER"
        ) from error
    except Exception as error:  # of many kinds, where the folder is damaged
        if isinstance(error, ValueError) and split not in info.splits:
            known = shown(sorted(info.splits))
            raise UserError(f"{folder} has no split {split!r}; it has {known}") from error
        raise UserError(
            f"{folder} is damaged: split {split!r} cannot be opened: {first_line(error)[:300]}\n"
            "Delete that folder and prepare it again"
        ) from error
    size = sum(path.stat().st_size for path in folder.iterdir())
    if count > size:
        raise UserError(
            f"{folder} is damaged: split {split!r} declares {count} examples in {size} bytes\n"
            "Delete that folder and prepare it again"
        )
    return records


def declared_features(info) -> dict:
    """The features at the top of a data set, sorted by name: a protobuf map has no order."""
    if not isinstance(info.features, import_tfds().features.FeaturesDict):
        return {}
    return dict(sorted(info.features.items()))
