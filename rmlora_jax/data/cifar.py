"""CIFAR-10 and CIFAR-100 as TFDS array_record, without TensorFlow.

The result has the name, version, features and row order of tensorflow-datasets' own, so that
``tfds.data_source("cifar100", data_dir=...)`` reads it anywhere. The archives are the "binary"
ones: plain bytes. (The better known "python" archives are pickles, which can run code.)

Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images";
format at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import dataclasses
import functools
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from rmlora_jax.data.dataset import Known, Request, Source
from rmlora_jax.data.download import built, prepared_folder, published_file
from rmlora_jax.data.tfds import tfds_images
from rmlora_jax.data.tfds_folder import Name, data_dir_of, tfds_missing
from rmlora_jax.errors import UserError, progress

VERSION = "3.0.2"
URL = "https://www.cs.toronto.edu/~kriz"
URL_VARIABLE = "RMLORA_CIFAR_URL"

_PIXELS = 32 * 32 * 3
_MAX_TEXT = 1 << 16


@dataclasses.dataclass(frozen=True)
class Archive:
    """An official archive and what is in it.

    Attributes:
      name: of the data set.
      file: of the archive, under the base URL.
      sha256, size: of that file; size in bytes.
      folder: that holds the members.
      train, test: (member, images) pairs in order. An image is one byte for each of ``labels``,
        then 1024 bytes red, green and blue, row by row.
      labels: (feature, member with its class names, classes), in the order of the label bytes.
    """

    name: str
    file: str
    sha256: str
    size: int
    folder: str
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]
    labels: tuple[tuple[str, str, int], ...]


ARCHIVES = {
    "cifar10": Archive(
        name="cifar10",
        file="cifar-10-binary.tar.gz",
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        size=170_052_171,
        folder="cifar-10-batches-bin",
        train=tuple((f"data_batch_{i}.bin", 10_000) for i in range(1, 6)),
        test=(("test_batch.bin", 10_000),),
        labels=(("label", "batches.meta.txt", 10),),
    ),
    "cifar100": Archive(
        name="cifar100",
        file="cifar-100-binary.tar.gz",
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        size=168_513_733,
        folder="cifar-100-binary",
        train=(("train.bin", 50_000),),
        test=(("test.bin", 10_000),),
        labels=(
            ("coarse_label", "coarse_label_names.txt", 20),
            ("label", "fine_label_names.txt", 100),
        ),
    ),
}


def prepare_cifar(
    archive: Archive, data_dir: str | os.PathLike, *, base_url: str | None = None
) -> Path:
    """Makes ``data_dir/<name>/3.0.2`` and returns it; see :func:`download.prepared_folder`.

    Args:
      archive: one of :data:`ARCHIVES`.
      data_dir: of TFDS.
      base_url: of the archive's folder on the web; default $RMLORA_CIFAR_URL, else Toronto's.

    Raises:
      UserError: no network, a damaged archive, or a folder that cannot be written.
    """
    url = (base_url or os.environ.get(URL_VARIABLE) or URL).rstrip("/") + "/" + archive.file

    def make(work: Path) -> Path:
        file = published_file(
            url,
            archive.file,
            work=work,
            sha256=archive.sha256,
            size=archive.size,
            name=archive.name,
        )
        contents = _read_archive(archive, file)
        return built(archive.name, work, functools.partial(_splits, archive, contents))

    return prepared_folder(archive.name, VERSION, data_dir, make)


def _read_archive(archive: Archive, path: Path) -> dict[str, bytes]:
    """The members that ``archive`` names, each of exactly its size. Nothing is extracted."""
    record = len(archive.labels) + _PIXELS
    sizes = {name: images * record for name, images in (*archive.train, *archive.test)}
    texts = {name for _, name, _ in archive.labels}
    contents = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if folder != archive.folder or not (name in sizes or name in texts):
                    continue
                most = sizes.get(name, _MAX_TEXT)
                if not member.isreg() or member.size > most:
                    raise UserError(f"{path}: {member.name} is not a file of {most} bytes or less")
                file = tar.extractfile(member)
                assert file is not None  # it is a regular file
                contents[name] = file.read(most)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read as a tar.gz archive: {error}") from error
    for name in (*sizes, *texts):
        if name not in contents:
            raise UserError(f"{path} has no member {archive.folder}/{name}")
        size = len(contents[name])
        if size != sizes.get(name, size):
            raise UserError(f"{path}: {name} has {size} bytes, not {sizes[name]}")
    return contents


def _splits(archive: Archive, contents: dict[str, bytes], builder) -> dict[str, Iterator]:
    """The examples of each split; TFDS's builder is given the names of the classes."""
    for feature, file, classes in archive.labels:
        names = contents[file].decode("utf-8", "replace").split()
        if len(names) != classes:
            raise UserError(f"{archive.file}: {file} has {len(names)} class names, not {classes}")
        builder.info.features[feature].names = names
    parts = {"train": archive.train, "test": archive.test}
    return {split: _examples(archive, split, parts[split], contents) for split in parts}


def _examples(archive: Archive, split: str, members, contents) -> Iterator[tuple[int, dict]]:
    """(key, example) of every image, in the archive's order."""
    features = [feature for feature, _, _ in archive.labels]
    k, total = len(features), sum(images for _, images in members)
    rows = np.frombuffer(b"".join(contents[name] for name, _ in members), np.uint8)
    with progress(total, f"preparing {archive.name} {split}", " images") as bar:
        # The key decides the row order; TFDS's own builder counts likewise.
        for key, row in enumerate(rows.reshape(total, k + _PIXELS)):
            image = row[k:].reshape(3, 32, 32).transpose(1, 2, 0)
            labels = dict(zip(features, row[:k].tolist(), strict=True))
            yield key, {"id": f"{split}_{key:05d}", "image": Image.fromarray(image), **labels}
            bar.update()


def _archive(request: Request) -> Archive:
    return ARCHIVES[Name.parse(request.name).name]


def _handles(request: Request) -> bool:
    """Whether it is CIFAR without a config, in the version built here."""
    name = Name.parse(request.name)
    return name.name in ARCHIVES and not name.config and name.version in (None, VERSION)


def _prepare(request: Request) -> Path:
    return prepare_cifar(_archive(request), data_dir_of(request), base_url=request.base_url)


def _known(request: Request) -> Known | None:
    archive = _archive(request)
    classes = {feature: count for feature, _, count in archive.labels}
    if request.label_key not in classes:
        return None
    train, test = (sum(n for _, n in part) for part in (archive.train, archive.test))
    return Known(classes[request.label_key], train, test, (32, 32, 3))


SOURCE = Source(
    handles=_handles,
    missing=functools.partial(tfds_missing, prepare=_prepare),
    images=functools.partial(tfds_images, prepare=_prepare),
    known=_known,
    prepare=_prepare,
)
