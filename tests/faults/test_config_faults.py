"""Mistakes in a config: all told at once, by field, before anything is loaded."""

import json
import math

import pytest

from rmlora_jax.errors import UserError
from rmlora_jax.study.config import check_study, default_study
from rmlora_jax.sweep.grid import check_config
from rmlora_jax.train import loop, setup
from rmlora_jax.train.config import default_config, flatten, mistakes

# What Python says of the regular expression "[[", which is among the hostile values.
pytestmark = pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")

HOSTILE = {
    int: [-1, 0, 7, 2**31, 2**63, 10**30, -(10**30)],
    float: [-1.0, 0.0, 0.3, 1.5, math.nan, math.inf, -math.inf, 1e308, 5e-324],
    bool: [True, False],
    str: ["", "x", "[", "(" * 40, "../x", "\0", "a" * 5000, "{'keep': 1}", "[[", "\ud800"],
    tuple: [(), ("",), (1,), ("a", "a"), ("a", "b", "c"), ((),), (("[", 1),), (("a", -1),),
            (("a", 2),), (("a", math.nan),), ({},), (1, 1), (1, 99)],
}
OTHER = ["x", True, [1], {}, 1.5, 3, b"x", object(), ("a",), {"a": 1}]


def kind_of(c, name):
    *parents, field = name.split(".")
    for parent in parents:
        c = c[parent]
    return c.get_type(field)


def with_field(c, name, value):
    own = c.copy_and_resolve_references()
    *parents, field = name.split(".")
    node = own
    for parent in parents:
        node = node[parent]
    with own.ignore_type(), own.unlocked():
        node[field] = value
    return own


def tasks():
    """A config of each task, each without a mistake but for speech, whose data may not be here."""
    for task in ("image_classification", "text_classification", "text_regression"):
        c = default_config()
        c.task = task
        check_config(c)
        yield c
    c = default_config()
    c.task, c.data.name = "speech_classification", "japanese_vowels"
    yield c


def told_of(c, every):
    """How many values of each field are refused, of every so many that are tried."""
    told, number = {}, 0
    for name in flatten(c):
        for value in HOSTILE[kind_of(c, name)] + OTHER + [None]:
            number += 1
            if number % every:
                continue
            try:
                check_config(with_field(c, name, value))
            except UserError as error:
                lines = str(error).splitlines()
                assert any(name in line for line in lines), (name, value, lines)
                assert len(str(error)) < 10_000, (name, value)
                told[name] = told.get(name, 0) + 1
    return told


def test_whatever_a_field_holds_the_answer_is_words():
    told = told_of(next(tasks()), every=7)
    assert len(told) > 0.9 * len(flatten(default_config())) and sum(told.values()) > 100


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_whatever_every_field_holds(number):
    told = told_of(list(tasks())[number], every=1)
    assert told.keys() == flatten(default_config()).keys()  # no field is without a check
    assert sum(told.values()) > 900


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("batch_size", True, "a whole number"), ("batch_size", 1.5, "a whole number"),
        ("batch_size", "64", "a whole number"), ("batch_size", None, "a whole number"),
        ("accumulate", 0, "at least 1"), ("speech.heads", 0, "at least 1"),
        ("optimizer.learning_rate", math.nan, "a finite number"),
        ("optimizer.learning_rate", "1e-3", "a finite number"),
        ("optimizer.weight_decay", math.inf, "a finite number"),
        ("optimizer.b1", 1.0, "in [0, 1)"), ("optimizer.b2", -0.1, "in [0, 1)"),
        ("optimizer.eps", 0.0, "above 0"), ("steps", 2**31, "at most"),
        ("model.image_size", 10**6, "at most"), ("model.source", "", "a folder"),
        ("data.name", "", "a name"), ("data.validation", 2.5, "a fraction"),
        ("data.validation", -0.1, "above 0"), ("data.data_dir", 5, "text, or None"),
        ("data.bad_records", -1, "0 or more"), ("data.train_split", "", "a split"),
        ("lora.rank_pattern", (("[", 2),), "regular expression"),
        ("lora.rank_pattern", (("a", 0),), "pairs (regex, rank)"),
        ("lora.alpha_pattern", ("a",), "pairs (regex, alpha)"),
        ("text.columns", "text", "a tuple of names"), ("text.columns", (1,), "names"),
        ("text.train_file", "a.csv", "None for image_classification"),
        ("text.test_file", "a.csv", "None for image_classification"),
        ("data.unlabelled_split", "test", "None for image_classification"),
    ],
)
def test_a_field_is_told_by_name(name, value, words):
    with pytest.raises(UserError) as error:
        check_config(with_field(default_config(), name, value))
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"config.{name}=") and words in line


def test_a_mistake_has_no_mistakes_in_its_train(tmp_path):
    """Of an unknown task it is not known what else goes with it."""
    c = with_field(default_config(), "task", "text_clasification")
    c.text.train_file, c.data.name = str(tmp_path / "a.csv"), "mine"
    (tmp_path / "a.csv").write_text("text,label\n")
    c.model.source = "vit-tiny-patch8-64-tinyimagenet"
    with pytest.raises(UserError) as error:
        check_config(c, there=True)
    (line,) = str(error.value).splitlines()
    assert line.endswith("did you mean text_classification?")


def test_fields_that_are_not_there():
    c = default_config()
    c.data.nmae = "digits"
    del c.lora.rank
    assert list(mistakes(c)[1]) == ["data.nmae", "lora.rank"]
    with pytest.raises(UserError) as error:
        check_config(c)
    assert str(error.value).splitlines() == [
        "config.data.nmae: there is no such field; did you mean data.name?",
        "config.lora.rank is missing; its default is 4",
    ]


def test_all_mistakes_are_told_at_once(tmp_path, monkeypatch):
    """Of kind, of value, of places; and nothing was opened for it."""
    monkeypatch.setattr(setup, "build", None)
    c = default_config()
    (tmp_path / "vit-small").mkdir()
    (tmp_path / "file").write_text("")
    wrong = {
        "batch_size": "64", "optimizer.learning_rate": math.nan, "lora.dropout": 2.0,
        "rm.kind": "nrom", "model.source": str(tmp_path / "vit-smal"),
        "model.adapter": str(tmp_path / "vit-small"), "data.name": "cifar1000",
        "data.cache": str(tmp_path / "file" / "images"),
    }
    for name, value in wrong.items():
        c = with_field(c, name, value)
    c.data.data_dir = str(tmp_path)
    with pytest.raises(UserError) as error:
        loop.train(c, tmp_path / "run")
    lines = [line for line in str(error.value).splitlines() if line.startswith("config.")]
    assert sorted(line.partition("=")[0] for line in lines) == sorted(
        f"config.{name}" for name in wrong
    )
    words = str(error.value)
    for hint in ("did you mean norm?", "did you mean vit-small?", "did you mean cifar100",
                 "has no adapter_config.json", "it cannot be written; give another folder, or ''"):
        assert hint in words
    assert not (tmp_path / "run").exists()


def test_places(tmp_path, config):
    check_config(config, there=True)

    def told(words, **fields):
        c = config.copy_and_resolve_references()
        for name, value in fields.items():
            c = with_field(c, name.replace("__", "."), value)
        with pytest.raises(UserError) as error:
            check_config(c, there=True)
        assert words in str(error.value), str(error.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    told(f"model.source={str(empty)!r}: the folder has no config.json", model__source=str(empty))
    told("model.source='./nowhere': model './nowhere' is not a folder", model__source="./nowhere")
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    told(f"type --config.model.adapter={tmp_path / 'run' / 'adapter'}",
         model__adapter=str(tmp_path / "run"))
    told("it is a file; give a folder", data__data_dir=__file__, data__name="cifar10")
    told("not prepared in", data__data_dir=str(empty), data__name="beans")
    told("is not the name of a data set", data__data_dir=str(empty), data__name="my data!")
    (tmp_path / "reviews.csv").write_text("text,label\n")
    text = {"task": "text_classification", "text__columns": ("text",)}
    told("there is no such file; did you mean reviews.csv?", **text,
         text__train_file=str(tmp_path / "review.csv"))
    told("convert it to one", **text, text__train_file=str(tmp_path / "reviews.xlsx"))
    told("None without text.train_file", **text, text__test_file=str(tmp_path / "reviews.csv"))
    told("--config.text.columns", **text | {"text__columns": ()},
         text__train_file=str(tmp_path / "reviews.csv"))
    for field in ("data__cache", "text__cache", "compilation_cache"):
        told(f"config.{field.replace('__', '.')}=", **{field: "/dev/null/x"})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("methods", "lora", "config.methods='lora': must be a tuple of names"),
        ("tasks", "configs/quickstart.py", "config.tasks="),
        ("rates", (1e-3, math.nan), "config.rates="), ("rates", ("1e-3",), "config.rates="),
        ("rates", (True,), "config.rates="), ("rates", 1e-3, "config.rates="),
        ("seeds", "5", "config.seeds="), ("seeds", True, "config.seeds="),
        ("choose_seeds", 0, "config.choose_seeds="), ("at_once", 1.5, "config.at_once="),
        ("variants", ("lora.rank=2",), "config.variants="), ("shared", 1, "config.shared="),
        ("grid", {"penalty": 0.1}, "config.grid.penalty="),
        ("grid", {"penalty": (0.1, 0.1)}, "config.grid.penalty="),
        ("grid", {"penalty": (0.1, math.inf)}, "config.grid.penalty="),
        ("method_set", {"lora": "lora.rank=2"}, "config.method_set.lora="),
        ("pictures", ("table", "table"), "config.pictures="), ("study", "..", "config.study="),
        ("along", ("method",), "config.along="), ("fields", "steps=2", "config.fields="),
    ],
)
def test_studies(field, value, words):
    c = default_study()
    c.study, c.tasks, c.methods = "a", ("configs/quickstart.py",), ("rm_lora",)
    c.rates = (1e-3,)
    check_study(c)
    with pytest.raises(UserError) as error:
        check_study(with_field(c, field, value))
    assert words in str(error.value), str(error.value)


def test_a_studys_mistakes_are_told_at_once():
    c = default_study()
    c.study, c.tasks, c.methods = "a/b", ("configs/quickstart.py",), ("lora", "lroa")
    wrong = with_field(with_field(c, "seeds", "5"), "rates", ())
    wrong.methdos = ("lora",)
    with pytest.raises(UserError) as error:
        check_study(wrong)
    words = str(error.value)
    for part in ("config.study=", "config.seeds=", "config.rates=", "did you mean lora?",
                 "config.methdos: there is no such field; did you mean methods?"):
        assert part in words
    assert len(words.splitlines()) == 5


@pytest.mark.parametrize(
    ("source", "words"),
    [("def get_config(:", "SyntaxError"), ("raise KeyError('x')", "KeyError"),
     ("x = 1", "get_config"), ("def get_config():\n    return 5", "ConfigDict")],
)
def test_a_config_file_that_is_broken(source, words, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(source)
    c = default_study()
    c.study, c.tasks, c.methods = "a", (str(path),), ("lora",)
    with pytest.raises(UserError, match=r"broken\.py") as error:
        check_study(c)
    assert words in str(error.value)
    assert json.dumps(str(error.value))
