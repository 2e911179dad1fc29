"""GLUE as TFDS array_record, without TensorFlow.

TFDS's own code reads the published files and writes the data set; what it needs TensorFlow for,
fetching and unpacking, is done here.
"""

import contextlib
import io
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from rmlora_jax.data.glue import TASKS
from rmlora_jax.data.prepare.cifar import quiet_tfds
from rmlora_jax.data.prepare.download import fetch, verify
from rmlora_jax.data.tfds_images import Name, import_tfds
from rmlora_jax.errors import UserError

# A member of an archive larger than this many times the archive is no text.
_INFLATION = 60


def is_glue(name: Name) -> bool:
    return name.name == "glue" and name.config in TASKS and name.version in (None, "2.0.0")


def prepare_glue(name: Name, data_dir: Path) -> Path:
    """Makes ``data_dir/glue/<config>/2.0.0`` and returns it; at once if it is there.

    Published files are taken from ``data_dir/downloads`` if they lie there, and fetched otherwise,
    with the checksums that TFDS knows. A failure leaves nothing behind, and of two processes at
    once each finds a whole one.

    Raises:
      UserError: no network, a damaged file, or a folder that cannot be written.
    """
    data_dir = Path(data_dir).expanduser()
    target = data_dir / "glue" / name.config / "2.0.0"
    if (target / "features.json").exists():
        return target
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".glue-{name.config}-", dir=data_dir))
    except OSError as error:
        raise UserError(
            f"cannot write to {data_dir}: {error.strerror}\n"
            "Choose another folder with --config.data.data_dir=DIR"
        ) from error
    try:
        made = _build(name.config, data_dir, work)
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # another process was first; its result is as good
            made.rename(target)
        if not (target / "features.json").exists():
            raise UserError(f"{target} exists but is not whole: delete it and run again")
        return target
    except OSError as error:
        raise UserError(f"cannot prepare glue/{name.config} in {data_dir}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _build(config: str, data_dir: Path, work: Path) -> Path:
    tfds = import_tfds()
    import tensorflow_datasets.text  # noqa: F401  (registers glue)

    published = tfds.builder_cls("glue")
    files = _Files(config, data_dir, work, published.url_infos)

    class Builder(published, skip_registration=True):
        name = "glue"

        def _split_generators(self, dl_manager):
            return super()._split_generators(files)

    with quiet_tfds(), contextlib.redirect_stdout(io.StringIO()):
        builder = Builder(config=config, data_dir=str(work / "tfds"), file_format="array_record")
        builder.download_and_prepare(
            download_dir=str(work / "downloads"),
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    return Path(builder.data_dir)


class _Files:
    """What TFDS's builder asks for: published files, and archives unpacked."""

    def __init__(self, config: str, data_dir: Path, work: Path, known):
        self.config, self.data_dir, self.work, self.known = config, data_dir, work, known

    def download(self, urls):
        if isinstance(urls, dict):
            return {key: self.download(url) for key, url in urls.items()}
        facts = self.known[urls]
        file, expected = facts.filename, {"sha256": facts.checksum, "size": int(facts.size)}
        given = self.data_dir / "downloads" / file
        if given.exists():
            verify(given, **expected)
            return str(given)
        path = self.work / file
        fetch(
            urls,
            path,
            **expected,
            otherwise=f"Without network: put {file} into {given.parent}, or name a folder where "
            f"glue/{self.config} is prepared with --config.data.data_dir=DIR",
        )
        return str(path)

    def download_and_extract(self, url: str) -> str:
        """The folder with the archive's text files; links and paths that lead out are refused."""
        archive, folder = Path(self.download(url)), self.work / "unpacked"
        most = _INFLATION * os.path.getsize(archive) + (1 << 20)
        try:
            with zipfile.ZipFile(archive) as members:
                for member in members.infolist():
                    path = (folder / member.filename).resolve()
                    if member.is_dir() or path.suffix != ".tsv":
                        continue
                    if not path.is_relative_to(folder.resolve()) or member.file_size > most:
                        raise UserError(f"{archive}: {member.filename!r} is no file of GLUE")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with members.open(member) as source, open(path, "wb") as copy:
                        shutil.copyfileobj(source, copy)
        except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            raise UserError(f"{archive} cannot be read as a zip archive: {error}") from error
        return str(folder)
