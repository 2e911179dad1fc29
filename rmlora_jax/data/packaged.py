"""Data sets that Python packages ship: handwritten digits and spoken Japanese vowels."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax.data.dataset import ArraySource, FoundImages, Request, Source
from rmlora_jax.data.subsets import held_out_count, hold_out
from rmlora_jax.errors import UserError
from rmlora_jax.files import near

# Handwritten digits

TEST_IMAGES = 360
_TEST_SEED = 0


def _digits(request: Request) -> FoundImages:
    """The 1,797 images of 8x8 pixels of ``sklearn.datasets.load_digits``.

    Gray levels 0..16 become uint8 0..255, repeated to three channels. The test split is always the
    same 360 images; both it and the validation split have every digit in its share.

    Source: Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI.
    """
    from sklearn import datasets

    raw: Any = datasets.load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(images[..., None], 3, axis=-1)
    labels = raw.target.astype(np.int32)
    train, test = (
        ArraySource(images[ids], labels[ids])
        for ids in hold_out(len(labels), TEST_IMAGES, seed=_TEST_SEED, labels=labels)
    )
    return FoundImages(train, test, tuple("0123456789"), (8, 8, 3), by_class=True)


DIGITS = Source(
    handles=lambda request: request.name == "digits",
    missing=lambda request: [],
    images=_digits,
)

# Japanese vowels

NAME = "JapaneseVowels"
SPEAKERS = tuple(range(1, 10))
PACKAGES = ("aeon", "sktime")  # wheels that hold the files; neither is imported
INSTALL = "pip install --no-deps aeon"


class Utterances(NamedTuple):
    """One split.

    Attributes:
      frames: float32 (n, longest, channels), 0 behind the end of an utterance.
      lengths: int32 (n,), frames of each utterance.
      labels: int32 (n,), places in ``SpeechDataset.speakers``, or clusters.
    """

    frames: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    def take(self, ids) -> "Utterances":
        return Utterances(*(x[ids] for x in self))


class SpeechDataset(NamedTuple):
    """Utterances of some speakers; no utterance is in two splits."""

    train: Utterances
    validation: Utterances
    test: Utterances
    speakers: tuple[int, ...]
    num_classes: int  # speakers, or clusters


def load_speech(request: Request) -> SpeechDataset:
    """Nine men say /ae/: 270 utterances to train on, 370 to test, 12 coefficients x 7 to 29 frames.

    Each coefficient is standardised by mean and deviation of the training split's frames.

    The request's ``validation`` and ``limit`` take each speaker's share. Its ``data_dir`` is the
    folder of the two .ts files; None: an installed package has them.

    Raises:
      UserError: the files are missing or damaged, or a speaker does not exist.

    Source: Kudo, Toyama and Shimbo 1999, "Multidimensional curve classification using
    passing-through regions", Pattern Recognition Letters 20; https://doi.org/10.24432/C5NS47
    (CC BY 4.0).
    """
    chosen, limit = tuple(request.speakers) or SPEAKERS, request.limit
    if len(set(chosen)) != len(chosen) or len(chosen) < 2 or not set(chosen) <= set(SPEAKERS):
        raise UserError(
            f"config.speech.speakers={chosen}: must be two or more different numbers from 1 to 9"
        )
    folder = find_files(request.data_dir)
    train, test = (read_ts(folder / f"{NAME}_{part}.ts") for part in ("TRAIN", "TEST"))
    longest = max(len(one) for one in (*train[0], *test[0]))
    train, test = (_of_speakers(chosen, *part, longest) for part in (train, test))

    def parted(split: Utterances, count: int) -> tuple[Utterances, Utterances]:
        kept, held = hold_out(len(split.labels), count, seed=request.seed, labels=split.labels)
        return split.take(kept), split.take(held)

    train, held = parted(train, held_out_count(len(train.labels), request.validation))
    if limit and limit < len(train.labels):
        _, train = parted(train, limit)
    real = train.frames[_real(train)]
    mean, deviation = real.mean(0), real.std(0)
    splits = [
        split._replace(frames=np.where(
            _real(split)[..., None], (split.frames - mean) / deviation, np.float32(0)
        ))
        for split in (train, held, test)
    ]
    if request.clusters:
        splits = _hidden_frames(splits, request.clusters)
    train, held, test = splits
    return SpeechDataset(train, held, test, chosen, request.clusters or len(chosen))


def _hidden_frames(splits: Sequence[Utterances], clusters: int) -> list[Utterances]:
    """Examples without labels of people: the model learns which sound a hidden frame has.

    Each frame of each utterance gives an example: the utterance with that frame and its two
    neighbours set to 0, and as the label the cluster of the frame, by k-means over the frames of
    the first split.

    Source: the idea is that of HuBERT, Hsu et al. 2021, https://arxiv.org/abs/2106.07447, with one
    hidden frame an example.
    """
    from sklearn.cluster import KMeans

    first = splits[0]
    if clusters > first.lengths.sum():
        raise UserError(f"config.speech.clusters={clusters}: there are not that many frames")
    n_init: Any = 4
    sounds = KMeans(clusters, n_init=n_init, random_state=0).fit(first.frames[_real(first)])

    def examples(split):
        rows, places = np.nonzero(_real(split))
        frames = split.frames[rows]
        hidden = np.abs(np.arange(frames.shape[1]) - places[:, None]) <= 1
        labels = np.asarray(sounds.predict(split.frames[rows, places]), np.int32)
        return Utterances(np.where(hidden[..., None], 0, frames), split.lengths[rows], labels)

    return [examples(split) for split in splits]


def _of_speakers(chosen: tuple[int, ...], series, labels, longest: int) -> Utterances:
    """The utterances of the ``chosen`` speakers, padded to ``longest`` frames."""
    rows = np.flatnonzero(np.isin(labels, chosen))
    frames = np.zeros((len(rows), longest, series[0].shape[1]), np.float32)
    for row, i in zip(frames, rows, strict=True):
        row[: len(series[i])] = series[i]
    lengths = np.array([len(series[i]) for i in rows], np.int32)
    return Utterances(frames, lengths, np.array([chosen.index(i) for i in labels[rows]], np.int32))


def _real(split: Utterances) -> np.ndarray:
    """bool (n, longest): False behind the end of an utterance."""
    return np.arange(split.frames.shape[1]) < split.lengths[:, None]


def find_files(data_dir: str | os.PathLike | None = None) -> Path:
    """The folder with JapaneseVowels_TRAIN.ts and JapaneseVowels_TEST.ts.

    Raises:
      UserError: no package has them, with what to type.
    """
    if data_dir:
        return Path(data_dir).expanduser()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # this does not import it
        for place in (spec.submodule_search_locations or ()) if spec else ():
            folder = Path(place, "datasets", "data", NAME)
            if (folder / f"{NAME}_TRAIN.ts").is_file():
                return folder
    raise UserError(
        f"the Japanese Vowels come with a package that is not installed; type: {INSTALL}"
    )


def read_ts(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """The series, each float32 (frames, channels), and the labels of a .ts file of the UEA archive.

    After a header of lines with @ or #, each line is a series: channels separated by colons, the
    values of a channel by commas, and last the label, here a whole number.

    Raises:
      UserError: the file is missing, or is not such a file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = [row.split(":") for row in text.splitlines() if row.strip() and row[0] not in "@#"]
        series = [
            np.array([channel.split(",") for channel in row[:-1]], np.float32).T for row in rows
        ]
        labels = np.array([row[-1] for row in rows], np.int32)
        if not rows or len({one.shape[1] for one in series}) != 1:
            raise ValueError("no series, or of different numbers of channels")
    except FileNotFoundError:
        raise UserError(f"there is no {path}; type: {INSTALL}") from None
    except (OSError, ValueError, IndexError) as e:
        raise UserError(f"{path} cannot be read as a .ts file ({e}); type: {INSTALL}") from e
    return series, labels


def _missing(request: Request) -> list[str]:
    folder = find_files(request.data_dir)
    wrong = f"config.data.data_dir: there is no folder {folder}{near(folder)}"
    return [] if folder.is_dir() else [wrong]


VOWELS = Source(
    handles=lambda request: request.name == "japanese_vowels",
    missing=_missing,
    utterances=load_speech,
)
