"""Some classes, some images of each: counts by numpy, the same images for ever, splits apart."""

import dataclasses

import numpy as np
import pytest

from rmlora_jax.data import ArraySource, Dataset, Subset, load_images
from rmlora_jax.data.subsets import labels_of, with_classes, with_per_class
from rmlora_jax.errors import UserError
from rmlora_jax.sweep.grid import check_config
from rmlora_jax.train.config import default_config, use_glue

DIGITS = load_images("digits")
SPLITS = ("train", "validation", "test")


def pictures(source):
    """Images as bytes with their labels."""
    rows = [source.load(i) for i in range(len(source))]
    return [(image.tobytes(), label) for image, label in rows]


@pytest.mark.parametrize("count", [2, 5, 10])
def test_classes_have_all_their_images_in_every_split(count):
    small = load_images("digits", classes=count)
    chosen = np.random.RandomState(0).permutation(10)[:count]
    assert small.num_classes == count
    assert small.class_names == tuple(str(c) for c in chosen)
    for name in SPLITS:
        whole, part = pictures(getattr(DIGITS, name)), pictures(getattr(small, name))
        new = {old: i for i, old in enumerate(chosen)}
        assert part == [(x, new[label]) for x, label in whole if label in new]
        assert set(labels_of(getattr(small, name))) == set(range(count))


def test_fewer_classes_keep_their_labels_among_more():
    few, more = (pictures(load_images("digits", classes=n).train) for n in (3, 7))
    assert [row for row in more if row[1] < 3] == few


@pytest.mark.parametrize("count", [1, 10, 100])
def test_images_of_each_class_are_counted(count):
    small = load_images("digits", per_class=count)
    have = np.bincount(labels_of(DIGITS.train), minlength=10)
    assert np.bincount(labels_of(small.train)).tolist() == np.minimum(have, count).tolist()
    assert set(pictures(small.train)) <= set(pictures(DIGITS.train))
    for name in ("validation", "test"):
        assert pictures(getattr(small, name)) == pictures(getattr(DIGITS, name))


def test_fewer_images_are_among_more():
    few, more = (pictures(load_images("digits", per_class=n).train) for n in (10, 50))
    assert set(few) < set(more)


def test_draws_depend_on_their_seed_alone():
    for draw in (with_classes, with_per_class):
        one, same, other = (pictures(draw(DIGITS, 5, seed=s).train) for s in (0, 0, 1))
        assert one == same != other


def test_all_three_limits_in_one():
    small = load_images("digits", classes=4, per_class=10, limit=33)
    assert len(small.train) == 33 and labels_of(small.train).max() == 3
    whole = load_images("digits", classes=4, per_class=10)
    assert pictures(small.train) == pictures(whole.train)[:33]
    assert not set(pictures(small.train)) & set(pictures(small.validation))


class OnlyLabels:
    """A source whose images cannot be decoded."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def label(self, index):
        return int(self.labels[index])


def test_labels_are_read_without_images():
    source = OnlyLabels(np.array([3, 1, 4, 1, 5, 9]))
    assert labels_of(source).tolist() == [3, 1, 4, 1, 5, 9]
    assert labels_of(Subset(source, (5, 0))).tolist() == [9, 3]
    assert labels_of(Subset(Subset(source, range(1, 6)), (4, 0))).tolist() == [9, 1]
    data = Dataset("a", source, None, source, 10, tuple("0123456789"), None)
    small = with_per_class(data, 1)
    assert sorted(labels_of(small.train).tolist()) == [1, 3, 4, 5, 9]
    nine = np.flatnonzero(np.random.RandomState(0).permutation(10) == 9)[0]
    classes = with_classes(data, 10)
    assert labels_of(classes.train)[5] == nine


def test_a_split_without_an_image_is_refused():
    with pytest.raises(UserError, match=r"classes=11: digits has 10 classes"):
        load_images("digits", classes=11)
    zero = ArraySource(np.zeros((1, 8, 8, 3), np.uint8), np.array([0]))
    data = dataclasses.replace(DIGITS, validation=zero)
    with pytest.raises(UserError, match="validation split of digits has no image"):
        with_classes(data, 2)  # 2 and 8


@pytest.mark.parametrize(("field", "value", "words"), [
    ("classes", 1, "0 for all, or at least 2"), ("classes", -2, "0 for all, or at least 2"),
    ("per_class", -1, "0 or more")])
def test_values_are_checked(field, value, words):
    c = default_config()
    c.data[field] = value
    with pytest.raises(UserError, match=f"data.{field}={value}: must be {words}"):
        check_config(c)


@pytest.mark.parametrize("field", ["classes", "per_class"])
def test_texts_have_no_such_subsets(field):
    c = default_config()
    use_glue(c, "cola")
    c.data[field] = 2
    with pytest.raises(UserError, match=f"data.{field}=2: must be 0 for text"):
        check_config(c)
