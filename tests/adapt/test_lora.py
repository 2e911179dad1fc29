"""The description: validation, rules, ranks and scales."""

import dataclasses
import math

import jax.numpy as jnp
import pytest

from rmlora_jax.adapt.lora import LoRA


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("rank", 0, "integer >= 1"),
        ("rank", 2.0, "integer >= 1"),
        ("rank", True, "integer >= 1"),
        ("alpha", 0, "finite number > 0, or None"),
        ("alpha", math.inf, "finite number > 0, or None"),
        ("alpha", "16", "finite number > 0, or None"),
        ("target", "(", "valid regular expression"),
        ("target", "", "not empty"),
        ("target", (), "a tuple of names"),
        ("target", ("query", 3), "names that are not empty"),
        ("exclude", 5, "a regular expression, a tuple of names, or None"),
        ("train", "*head", "valid regular expression"),
        ("dropout", 1.0, "[0, 1)"),
        ("dropout", -0.1, "[0, 1)"),
        ("dropout", True, "[0, 1)"),
        ("init", "zeros", "'kaiming'"),
        ("dtype", "int32", "floating-point"),
        ("dtype", "float33", "floating-point"),
        ("rank_pattern", (("a", 0),), "integer >= 1"),
        ("rank_pattern", (("(", 2),), "valid regular expression"),
        ("rank_pattern", ("ab",), "integer >= 1"),
        ("rank_pattern", 3, "pairs"),
        ("alpha_pattern", (("a", -1.0),), "finite number > 0"),
        ("rs", 1, "True or False"),
        ("execution", "fast", "'merged'"),
    ],
)
def test_a_bad_value_names_the_field_the_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError) as e:
        LoRA(**({"rank": 4} | {field: value}))
    message = str(e.value)
    assert f"LoRA.{field}" in message
    assert allowed in message
    shown = value[0][0] if field == "rank_pattern" and value == (("(", 2),) else value
    if not field.endswith("_pattern"):
        assert repr(shown) in message


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing to train"):
        LoRA(rank=1, target=None)
    with pytest.raises(ValueError, match=r"LoRA\.exclude"):
        LoRA(rank=1, target=None, train="head", exclude="x")


def test_it_is_frozen_and_equal_descriptions_hash_equal():
    a = LoRA(4, 16, ["query", "value"], rank_pattern={"x": 2}, dtype="float32")
    b = LoRA(4, 16.0, ("query", "value"), rank_pattern=(("x", 2),), dtype=jnp.float32)
    assert a == b
    assert hash(a) == hash(b)
    assert a != dataclasses.replace(a, alpha=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.rank = 8


def test_a_regular_expression_must_match_the_whole_path():
    lora = LoRA(1, target=r"encoder/layers/.*")
    assert lora.targets("encoder/layers/mlp/fc1")
    assert not lora.targets("encoder/layers")
    assert not lora.targets("vit/encoder/layers/mlp/fc1")
    assert not LoRA(1, target="query").targets("attention/query")
    assert not LoRA(1, target="query").targets("query/inner")


def test_a_tuple_of_names_matches_last_components():
    lora = LoRA(1, target=("query", "attention/out"))
    assert lora.targets("query") and lora.targets("layers/attention/query")
    assert lora.targets("layers/attention/out")
    assert not lora.targets("mlp/out")
    assert not lora.targets("layers/subquery")
    assert not lora.targets("query/inner")


def test_exclude_wins_over_target():
    lora = LoRA(1, target=".*", exclude=("out",))
    assert lora.targets("a/query") and not lora.targets("a/out")


@pytest.mark.parametrize(
    ("train", "leaf", "expected"),
    [
        ("head", "head/kernel", True),
        ("head", "head/dense/kernel", True),
        ("head", "body/head/kernel", False),
        (r".*/bias", "body/fc/bias", True),
        (r".*/bias", "body/fc/kernel", False),
        ("cls_token", "cls_token", True),
        (("classifier",), "bert/classifier/out_proj/kernel", True),
        (("classifier",), "bert/classifiers/kernel", False),
        (".*", "anything", True),
        (None, "head/kernel", False),
        (None, "body/fc/lora_a", True),
        (None, "lora_b", True),
    ],
)
def test_what_is_trained(train, leaf, expected):
    assert LoRA(1, train=train).trains(leaf) is expected


def test_scale_and_patterns():
    assert LoRA(8).scale_of("x") == 1.0
    assert LoRA(8, 16).scale_of("x") == 2.0
    assert LoRA(16, 8, rs=True).scale_of("x") == 2.0
    lora = LoRA(
        4, 8, rank_pattern=((".*/query", 2), (".*", 16)), alpha_pattern=((".*/query", 10.0),)
    )
    assert (lora.rank_of("a/query"), lora.rank_of("a/value")) == (2, 16)  # the first match wins
    assert (lora.scale_of("a/query"), lora.scale_of("a/value")) == (5.0, 0.5)
    free = LoRA(4, rank_pattern=(("x", 2),), alpha_pattern=(("y", 12),))
    assert (free.scale_of("x"), free.scale_of("y"), free.scale_of("z")) == (1.0, 3.0, 1.0)


LAYERS = ["encoder/attention/query", "encoder/attention/value", "head"]


@pytest.mark.parametrize(
    ("fields", "field", "near"),
    [
        ({"target": "encoder/attention/qeury"}, "target", "encoder/attention/query"),
        ({"target": ("query", "valeu")}, "target", "'valeu'"),
        ({"exclude": "haed"}, "exclude", "'head'"),
        ({"rank_pattern": (("encoder/query", 2),)}, "rank_pattern", "encoder/attention/query"),
        ({"alpha_pattern": (("hed", 2),)}, "alpha_pattern", "'head'"),
    ],
)
def test_a_rule_that_matches_no_layer_lists_near_paths(fields, field, near):
    lora = LoRA(2, **fields)
    with pytest.raises(ValueError) as e:
        lora.check_targets(LAYERS)
    assert f"LoRA.{field}" in str(e.value)
    assert near in str(e.value)


def test_exclude_that_takes_everything_away_is_an_error():
    with pytest.raises(ValueError, match="takes away every layer"):
        LoRA(2, target="head", exclude=("head", "query")).check_targets(LAYERS)
    LoRA(2, target=".*", exclude="head").check_targets(LAYERS)


def test_train_that_matches_nothing_lists_near_paths():
    leaves = ["body/kernel", "body/lora_a", "classifier/kernel"]
    LoRA(2, train="classifier").check_train(leaves)
    LoRA(2, train=("body",)).check_train(leaves)
    with pytest.raises(ValueError, match=r"LoRA\.train.*'clasifier'.*Near paths: 'classifier'"):
        LoRA(2, train="clasifier").check_train(leaves)
    with pytest.raises(ValueError, match=r"LoRA\.train"):  # factors are trained anyway
        LoRA(2, train="body/lora_a").check_train(leaves)
