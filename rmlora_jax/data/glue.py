"""The nine tasks of GLUE: their texts, metrics, splits, preparation, and the leaderboard's files.

TFDS's own code reads the published files and writes the data set. It needs TensorFlow to fetch and
unpack them, which is done here instead.

Source: Wang et al. 2019, https://arxiv.org/abs/1804.07461, and the submission format at
https://gluebenchmark.com.
"""

import functools
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax.data.dataset import Known, Request, Source
from rmlora_jax.data.download import built, prepared_folder, published_file
from rmlora_jax.data.tfds import tfds_texts
from rmlora_jax.data.tfds_folder import Name, data_dir_of, tfds_missing
from rmlora_jax.errors import UserError
from rmlora_jax.files import write_text_atomic

VERSION = "2.0.0"
# A text is at most this many times larger than its archive.
_INFLATION = 60


class GlueTask(NamedTuple):
    """One task.

    Attributes:
      columns: features that hold the text or the two texts.
      metrics: official metrics, and accuracy for every classification; the first picks the best
        step.
      words: what the leaderboard wants for label 0, 1, ...: words, or None for the number itself.
      files: split without labels -> file of the leaderboard.
      tests: reported split -> split of TFDS.
      unlabelled: split to predict -> split of TFDS.
    """

    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    words: tuple[str, ...] | None
    files: dict[str, str]
    tests: Mapping[str, str] = MappingProxyType({"test": "validation"})
    unlabelled: Mapping[str, str] = MappingProxyType({"predict": "test"})

    @property
    def regression(self) -> bool:
        return "pearson" in self.metrics


_PAIR = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")

TASKS = {
    "cola": GlueTask(("sentence",), ("matthews", "accuracy"), None, {"predict": "CoLA.tsv"}),
    "sst2": GlueTask(("sentence",), ("accuracy",), None, {"predict": "SST-2.tsv"}),
    "mrpc": GlueTask(_PAIR, ("f1", "accuracy"), None, {"predict": "MRPC.tsv"}),
    "stsb": GlueTask(_PAIR, ("pearson", "spearman"), None, {"predict": "STS-B.tsv"}),
    "qqp": GlueTask(
        ("question1", "question2"), ("f1", "accuracy"), None, {"predict": "QQP.tsv"}
    ),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("accuracy",),
        ("entailment", "neutral", "contradiction"),
        {"predict": "MNLI-m.tsv", "predict_mismatched": "MNLI-mm.tsv"},
        {"test": "validation_matched", "test_mismatched": "validation_mismatched"},
        {"predict": "test_matched", "predict_mismatched": "test_mismatched"},
    ),
    "qnli": GlueTask(("question", "sentence"), ("accuracy",), _ENTAILED, {"predict": "QNLI.tsv"}),
    "rte": GlueTask(_PAIR, ("accuracy",), _ENTAILED, {"predict": "RTE.tsv"}),
    "wnli": GlueTask(_PAIR, ("accuracy",), None, {"predict": "WNLI.tsv"}),
}


def glue_task(name: str) -> GlueTask | None:
    """The task of a TFDS name, or None.

    >>> glue_task("glue/rte:2.0.0").metrics
    ('accuracy',)
    """
    head, _, config = name.partition(":")[0].partition("/")
    return TASKS.get(config) if head == "glue" else None


def _handles(request: Request) -> bool:
    version = Name.parse(request.name).version
    return glue_task(request.name) is not None and version in (None, VERSION)


def write_predictions(
    folder: Path,
    split: str,
    ids: np.ndarray,
    predictions: np.ndarray,
    label_names: Sequence[str] | None,
    task: GlueTask | None = None,
) -> Path:
    """Writes ``index``, ``prediction`` rows in the order of ``ids``, as the leaderboard reads them.

    Args:
      folder: made if missing.
      split: names the file where ``task`` has no name for it.
      ids: int (n,), the rows' numbers in the published file.
      predictions: int (n,) classes, or float (n,) values.
      label_names: of the classes; None for regression.
      task: a GLUE task: its words for the labels, or its range of values, STS-B's [0, 5].

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ids, found = np.array([1, 0]), np.array([0, 1])
    ...     print(write_predictions(Path(folder), "predict", ids, found, None, TASKS["rte"])
    ...           .read_text())
    index	prediction
    0	not_entailment
    1	entailment
    <BLANKLINE>
    """
    if task is None:
        names = label_names
        found = [names[value] if names else repr(float(value)) for value in predictions]
    elif task.regression:
        found = [f"{value:.3f}" for value in np.clip(predictions, 0.0, 5.0)]
    else:
        found = [task.words[value] if task.words else str(int(value)) for value in predictions]
    rows = [f"{ids[i]}\t{found[i]}\n" for i in np.argsort(ids, kind="stable")]
    name = (task.files if task else {}).get(split, f"{split}.tsv")
    return write_text_atomic(Path(folder) / name, "".join(["index\tprediction\n", *rows]))


# Preparation


def _prepare(request: Request) -> Path:
    """Makes ``data_dir/glue/<config>/2.0.0`` and returns it; see :func:`download.prepared_folder`.

    Published files have the checksums that TFDS knows; see :func:`download.published_file`.
    """
    import tensorflow_datasets.text  # noqa: F401  (registers glue)

    config = Name.parse(request.name).config

    def make(work: Path) -> Path:
        def split_generators(builder) -> dict:
            files = _Files(f"glue/{config}", work, builder.url_infos)
            return type(builder)._split_generators(builder, files)

        return built("glue", work, split_generators, config=config)

    return prepared_folder(f"glue/{config}", VERSION, data_dir_of(request), make)


class _Files(NamedTuple):
    """What TFDS's builder asks for: published files, and archives unpacked."""

    name: str
    work: Path
    known: Mapping[str, Any]

    def download(self, urls) -> Any:
        if isinstance(urls, dict):
            return {key: self.download(url) for key, url in urls.items()}
        facts = self.known[urls]
        file = published_file(
            urls,
            facts.filename,
            work=self.work,
            sha256=facts.checksum,
            size=int(facts.size),
            name=self.name,
        )
        return str(file)

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
                        raise UserError(f"{archive}: {member.filename!r} is not a file of GLUE")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with members.open(member) as source, open(path, "wb") as copy:
                        shutil.copyfileobj(source, copy)
        except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            raise UserError(f"{archive} cannot be read as a zip archive: {error}") from error
        return str(folder)


def _known(request: Request) -> Known | None:
    task = glue_task(request.name)
    return Known(len(task.words or (0, 1))) if task and not task.regression else None


SOURCE = Source(
    handles=_handles,
    missing=functools.partial(tfds_missing, prepare=_prepare),
    texts=functools.partial(tfds_texts, prepare=_prepare),
    known=_known,
    prepare=_prepare,
)
