"""A stored head and the classes of the data: matched by name, never by place."""

import doctest
import json

import numpy as np
import pytest
from fixtures.text.tiny import write_head, write_model
from safetensors.numpy import load_file

from rmlora_jax.hub import load_text, load_vit, pretrained
from rmlora_jax.hub.pretrained import class_order


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_head(write_model(tmp_path_factory.mktemp("named")), 3)


def named(folder, *names):
    """The model in ``folder`` with these class names, None for no names."""
    raw = json.loads((folder / "config.json").read_text())
    raw["id2label"] = {str(i): name for i, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def stored(folder):
    tensors = load_file(folder / "model.safetensors")
    return tensors["classifier.weight"], tensors["classifier.bias"]


@pytest.mark.parametrize("names, labels", [
    (("a", "b", "c"), ("b", "c", "a")),
    (("a", "b", "c"), ("a", "b", "c")),
    (("CONTRADICTION", "Neutral", "ENTAILMENT"), ("entailment", "neutral", "contradiction")),
    (("x ", "y", "z"), ("z", "x", "y")),
    (("10", "2", "1"), ("1", "2", "10")),
    (("A", "a", "b"), ("b", "a", "A")),  # told apart by case alone
])  # fmt: skip
def test_the_rows_of_a_head_follow_their_names(folder, names, labels):
    model = load_text(named(folder, *names), labels=labels)
    kernel, bias = stored(folder)
    plain = (lambda x: x) if set(names) == set(labels) else (lambda x: x.strip().lower())
    rows = [[*map(plain, names)].index(plain(label)) for label in labels]
    np.testing.assert_array_equal(model.params["head"]["kernel"], kernel[rows].T)
    np.testing.assert_array_equal(model.params["head"]["bias"], bias[rows])
    assert model.labels == labels and not model.new
    assert model.moved == bool(model.notes) == (rows != [0, 1, 2])


@pytest.mark.parametrize("names, labels", [
    (("a", "b", "c"), ("a", "b", "d")),
    (("a", "b", "c"), ("a", "b")),
    (("a", "b", "c"), ("a", "b", "c", "unknown")),
    (("a", "a", "b"), ("a", "b", "c")),
    (("A", "a", "b"), ("a", "b", "B")),  # two alike without their case
    (("a", "b", "c"), ("0", "1", "2")),
    (("LABEL_0", "LABEL_1", "LABEL_2"), ("a", "b")),
])  # fmt: skip
def test_a_head_for_other_classes_is_new_and_said_so(folder, names, labels):
    model = load_text(named(folder, *names), labels=labels)
    assert model.new == ("head/kernel", "head/bias") and model.num_labels == len(labels)
    (note,) = model.notes
    for word in ("a new one is made", ", ".join(names), ", ".join(labels)):
        assert word in note
    drawn = load_text(folder, num_labels=5).params["head"]
    assert drawn["kernel"].shape[1] == 5 and not drawn["bias"].any()


@pytest.mark.parametrize("names", [("LABEL_0", "LABEL_1", "LABEL_2"), (), ("only", "two")])
def test_a_head_without_names_keeps_its_order(folder, names):
    model = load_text(named(folder, *names), labels=("x", "y", "z"))
    np.testing.assert_array_equal(model.params["head"]["kernel"], stored(folder)[0].T)
    assert not model.new and not model.moved
    assert "taken to be, in this order, x, y, z" in model.notes[0]


def test_without_labels_nothing_is_moved(folder):
    model = load_text(named(folder, "c", "b", "a"), num_labels=3)
    np.testing.assert_array_equal(model.params["head"]["kernel"], stored(folder)[0].T)
    assert model.labels == ("c", "b", "a") and not model.notes


def test_images_too(tiny_vit):
    """The tiny ViT stores classes without names; the bundled one has the numbers 0 to 199."""
    labels = tuple(map(str, range(199, -1, -1)))
    bundled = "vit-tiny-patch8-64-tinyimagenet"
    kept, turned = load_vit(bundled), load_vit(bundled, labels=labels)
    for leaf in ("kernel", "bias"):
        turned_back = turned.params["head"][leaf][..., ::-1]
        np.testing.assert_array_equal(turned_back, kept.params["head"][leaf])


def test_examples_in_docstrings():
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner()
    for function in (class_order, pretrained.listed):
        for test in finder.find(function, function.__name__, globs=vars(pretrained)):
            assert runner.run(test).failed == 0
