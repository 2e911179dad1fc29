"""Utterances as sequences of cepstral frames: the Japanese Vowels, from a package of PyPI."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rmlora_jax.data.dataset import held_out_count, hold_out
from rmlora_jax.errors import UserError

NAME = "JapaneseVowels"
SPEAKERS = tuple(range(1, 10))
PACKAGES = ("aeon", "sktime")  # wheels that hold the files; neither is imported
INSTALL = "pip install --no-deps aeon"


class Utterances(NamedTuple):
    """One split.

    Attributes:
      frames: float32 (n, longest, channels), 0 behind the end of an utterance.
      lengths: int32 (n,), frames of each.
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


def load_speech(
    *,
    speakers: Sequence[int] = (),
    clusters: int = 0,
    validation: float = 0.1,
    seed: int = 0,
    limit: int = 0,
    data_dir: str | None = None,
) -> SpeechDataset:
    """Nine men say /ae/: 270 utterances to train on, 370 to test, 12 coefficients x 7 to 29 frames.

    Each coefficient is standardised by mean and deviation of the training split's frames.

    Args:
      speakers: numbers from 1 to 9; (): all.
      clusters: 0: the labels are the speakers. Above: they are not used; an example is an utterance
        with one frame hidden, its label is the cluster of that frame, see :func:`hidden_frames`.
      validation: fraction (below 1) or number of training utterances to hold out, each speaker's
        share of them.
      seed: of the choice of those.
      limit: use only this many training utterances, each speaker's share of them; 0: all.
      data_dir: folder with the two .ts files; None: in the package that ships them.

    Raises:
      UserError: the files are nowhere, or damaged; numbers of speakers that there are not.

    Source: Kudo, Toyama and Shimbo 1999, "Multidimensional curve classification using
    passing-through regions", Pattern Recognition Letters 20; https://doi.org/10.24432/C5NS47
    (CC BY 4.0).
    """
    chosen = tuple(speakers) or SPEAKERS
    if len(set(chosen)) != len(chosen) or len(chosen) < 2 or not set(chosen) <= set(SPEAKERS):
        raise UserError(
            f"config.speech.speakers={chosen}: must be two or more different numbers from 1 to 9"
        )
    folder = find_files(data_dir)
    parts = [read_ts(folder / f"{NAME}_{part}.ts") for part in ("TRAIN", "TEST")]
    longest = max(len(one) for series, _ in parts for one in series)
    train, test = (of_speakers(chosen, *part, longest) for part in parts)

    def parted(split, count):
        parts = hold_out(len(split.labels), count, seed=seed, labels=split.labels)
        return map(split.take, parts)

    train, held = parted(train, held_out_count(len(train.labels), validation))
    if limit and limit < len(train.labels):
        _, train = parted(train, limit)
    real = train.frames[_real(train)]
    mean, deviation = real.mean(0), real.std(0)

    def standardised(split):
        frames = (split.frames - mean) / deviation
        return split._replace(frames=np.where(_real(split)[..., None], frames, np.float32(0)))

    splits = [standardised(split) for split in (train, held, test)]
    if clusters:
        splits = hidden_frames(splits, clusters)
    return SpeechDataset(*splits, chosen, clusters or len(chosen))


def hidden_frames(splits: Sequence[Utterances], clusters: int) -> list[Utterances]:
    """What a model can learn from utterances alone: which sound is where it hears none.

    Each frame of each utterance gives an example: the utterance with that frame and its two
    neighbours set to 0, and as the label the cluster of the frame, by k-means over the frames of
    the first split.

    Source: the idea is that of HuBERT, Hsu et al. 2021, https://arxiv.org/abs/2106.07447, with one
    hidden place an example.
    """
    from sklearn.cluster import KMeans

    first = splits[0]
    if clusters > first.lengths.sum():
        raise UserError(f"config.speech.clusters={clusters}: there are not that many frames")
    sounds = KMeans(clusters, n_init=4, random_state=0).fit(first.frames[_real(first)])

    def examples(split):
        rows, places = np.nonzero(_real(split))
        frames = split.frames[rows]
        near = np.abs(np.arange(frames.shape[1]) - places[:, None]) <= 1
        labels = sounds.predict(split.frames[rows, places]).astype(np.int32)
        return Utterances(np.where(near[..., None], 0, frames), split.lengths[rows], labels)

    return [examples(split) for split in splits]


def of_speakers(chosen: tuple[int, ...], series, labels, longest: int) -> Utterances:
    """The utterances of the ``chosen``, padded to the ``longest``."""
    rows = np.flatnonzero(np.isin(labels, chosen))
    frames = np.zeros((len(rows), longest, series[0].shape[1]), np.float32)
    for row, i in zip(frames, rows, strict=True):
        row[: len(series[i])] = series[i]
    lengths = np.array([len(series[i]) for i in rows], np.int32)
    return Utterances(frames, lengths, np.array([chosen.index(i) for i in labels[rows]], np.int32))


def _real(split: Utterances) -> np.ndarray:
    """bool (n, longest): False behind the end of an utterance."""
    return np.arange(split.frames.shape[1]) < split.lengths[:, None]


def find_files(data_dir: str | None = None) -> Path:
    """The folder with JapaneseVowels_TRAIN.ts and JapaneseVowels_TEST.ts.

    Raises:
      UserError: there is none, with what to type.
    """
    if data_dir:
        return Path(data_dir).expanduser()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # which does not run it
        for place in (spec.submodule_search_locations or ()) if spec else ():
            folder = Path(place, "datasets", "data", NAME)
            if (folder / f"{NAME}_TRAIN.ts").is_file():
                return folder
    raise UserError(
        f"the Japanese Vowels come with a package that is not installed; type: {INSTALL}"
    )


def read_ts(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """The series, each float32 (frames, channels), and the labels of a .ts file of the UEA archive.

    Behind a header of lines with @ or #, a line is a series: channels between colons, the values
    of each between commas, and last the label, here a whole number.

    Raises:
      UserError: the file is missing, or is none of those.
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
