"""What a run starts from, and what it refuses: classes by name, numbers beside a table, nan."""

import json
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest
from fixtures.text.tiny import SPECIAL, WORDS, config_of, write_head, write_model
from safetensors.numpy import load_file, save_file

import rmlora_jax as rm
from rmlora_jax.errors import UserError
from rmlora_jax.hub import Info, load_text, save_peft
from rmlora_jax.parallel.mesh import all_devices
from rmlora_jax.report.run import facts
from rmlora_jax.tasks.task import Opening, Outputs, check_labels, classification
from rmlora_jax.tasks.text import CLASSIFICATION
from rmlora_jax.train import evaluate, setup
from rmlora_jax.train.config import resolve


@pytest.fixture
def root(tmp_path):
    """A classifier of (neg, pos), and forty texts of which ten are neg."""
    names(write_head(write_model(tmp_path / "model"), 2), "neg", "pos")
    return write_rows(tmp_path)


def names(folder, *labels, **fields):
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"id2label": dict(enumerate(labels))} | fields
    (folder / "config.json").write_text(json.dumps(raw))


def write_rows(root, last="w3"):
    rows = [{"text": f"w{i % 7} {'good' if i % 4 else 'bad'}", "label": ["neg", "pos"][i % 4 > 0]}
            for i in range(40)]
    rows[-1]["text"] = last
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def given(root, fields):
    config = config_of(root, 2)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return resolve(config)


def opened(root, **fields):
    return setup.open_base(given(root, fields), all_devices(limit=1))


def problem_of(root, **fields):
    """The data and the model alone: nothing is adapted or tokenised."""
    opening = Opening(all_devices(limit=1), jax.random.key(0), cast(Any, None))
    return CLASSIFICATION.open(given(root, fields), opening)


def head_of(base):
    return jax.device_get(base.trainable["head"])


def test_a_run_starts_from_the_head_of_its_classes(root):
    kept = problem_of(root).params["head"]
    names(root / "model", "pos", "neg")
    base = opened(root)
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(head_of(base)[leaf], kept[leaf][..., ::-1])
    assert "in another order; it is put into theirs" in "\n".join(base.problem.notes)
    names(root / "model", "cat", "dog")
    said = "\n".join(problem_of(root).notes)
    assert "is for 2 classes (cat, dog), the data has 2 classes (neg, pos); a new one" in said


def write_adapter(root, labels, train=None, target=r"encoder/.*/query"):
    """An adapter of the model whose every leaf is drawn, for these classes."""
    base = load_text(root / "model")
    lora = rm.LoRA(rank=2, alpha=2.0, target=target, train=train)
    model = rm.adapt(base.family.model(base.config, 2), lora)
    example = np.zeros((1, 4), np.int32)
    params = rm.attach(jax.random.key(0), model, base.params, example)
    random = np.random.default_rng(0)
    params["head"] = {k: random.normal(size=x.shape).astype("f4") if k != "bias" or train else x
                      for k, x in params["head"].items()}
    if not train:
        params["head"]["kernel"] = base.params["head"]["kernel"]
    info = Info("text_classification", labels=labels)
    save_peft(root / "adapter", params, lora, base, info=info, overwrite=True)
    return params["head"]


def test_the_head_of_an_adapter_follows_its_names(root):
    for labels, order in ((("neg", "pos"), [0, 1]), (("pos", "neg"), [1, 0])):
        saved = write_adapter(root, labels, train="head")
        base = opened(root, model__adapter=str(root / "adapter"))
        for leaf in ("kernel", "bias"):
            np.testing.assert_array_equal(head_of(base)[leaf], saved[leaf][..., order])
        assert ("in another order" in "\n".join(base.problem.notes)) == (order == [1, 0])
    write_adapter(root, ("cat", "dog"), train="head")
    base = opened(root, model__adapter=str(root / "adapter"))
    stored = load_file(root / "model" / "model.safetensors")["classifier.weight"]
    np.testing.assert_array_equal(head_of(base)["kernel"], stored.T)
    assert "adapter is for 2 classes (cat, dog)" in "\n".join(base.problem.notes)


def test_the_head_of_an_adapter_without_names_has_those_of_its_base(root):
    names(root / "model", "pos", "neg")
    saved = write_adapter(root, None, train="head")
    (root / "adapter" / "rmlora.json").unlink()
    found = head_of(opened(root, model__adapter=str(root / "adapter")))
    np.testing.assert_array_equal(found["kernel"], saved["kernel"][:, ::-1])


def test_factors_of_a_head_follow_its_names(root):
    """Both the model and its adapter say (pos, neg); what they compute must stay."""
    names(root / "model", "pos", "neg")
    saved = write_adapter(root, ("pos", "neg"), target="head")
    found = head_of(opened(root, model__adapter=str(root / "adapter")))
    delta = saved["lora_a"] @ saved["lora_b"]
    np.testing.assert_allclose(found["lora_a"] @ found["lora_b"], delta[:, ::-1], rtol=1e-6)


def test_the_class_that_f1_is_of(root):
    chosen = [
        ({}, "neg", "the rarer"), ({"text__positive_label": "pos"}, "pos", "positive_label says"),
        ({"text__positive_label": "#1"}, "pos", "positive_label says"),  # as runs of before
    ]  # fmt: skip
    for fields, label, why in chosen:
        problem = problem_of(root, text__metrics=("f1",), **fields)
        assert problem.positive_label == label == problem.info.labels[problem.positive]
        assert f"f1 is of class '{label}', " in problem.notes[-1] and why in problem.notes[-1]
    assert problem_of(root).positive_label is None
    with pytest.raises(UserError, match="positive_label='yes': it must be a class, one of 'neg'"):
        problem_of(root, text__metrics=("f1",), text__positive_label="yes")
    shown = facts([{"step": 1}], {}, {"task": "text_classification", "positive_label": "neg"})
    assert ("F1 is of", "class neg") in shown


def test_f1_of_three_classes_is_refused_before_a_model_is_loaded(root):
    with open(root / "train.jsonl", "a") as file:
        file.write('{"text": "w1", "label": "so-so"}\n' * 9)
    (root / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"f1 is of two classes, and the data has 3; .*f1_macro"):
        problem_of(root, text__metrics=("f1",))


@pytest.mark.parametrize("fields, words", [
    ({"text.metrics": ("pearson",)}, "text.metrics=.*accuracy, matthews, f1, f1_macro, f1_micro"),
    ({"text.metrics": ("f1",), "task": "text_regression"}, "text.metrics=.*pearson, spearman, mse"),
    ({"text.positive_label": "pos"}, "positive_label='pos': must be '' unless text.metrics has f1"),
    ({"data.name": "glue/cola", "task": "text_regression", "text.train_file": None},
     "task='text_regression': must be text_classification for glue/cola"),
])  # fmt: skip
def test_metrics_of_another_task(root, fields, words):
    config = config_of(root, 2)
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=words):
        resolve(config)


def with_word(root, number, word="<user>"):
    """Gives the tokenizer of the model a word of this number, which its table may not have."""
    (root / "model" / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "BertTokenizer",
        "added_tokens_decoder": {
            str(number): {"content": word, "lstrip": False, "rstrip": False, "normalized": False,
                          "single_word": False, "special": False}}}))


def test_words_beyond_the_table_are_refused_where_they_are_used(root):
    with_word(root, len(SPECIAL + WORDS))
    feed_of = lambda **fields: problem_of(root, **fields).open_feed()  # noqa: E731
    assert feed_of().train_size  # nothing has that word
    write_rows(root, "w1 <user> w2")
    with pytest.raises(UserError, match=r"train.jsonl, row 40 \('w1 <user> w2'\): token '<user>' "
                                        r"has number 47, but the model's vocab_size is 47"):
        feed_of()
    write_rows(root, "w1 " * 60 + "<user>")  # cut off
    assert feed_of().train_size


@pytest.mark.parametrize("label, names, words", [
    (2, ("a", "b"), "x: example 1 has label 2, but the data set declares 2 classes, 0 to 1"),
    (-1, ("a", "b"), "x: example 1 has label -1"),
    (np.nan, None, "x: example 1 has label nan, not a number"),
])  # fmt: skip
def test_labels_beside_the_head(label, names, words):
    with pytest.raises(UserError, match=words):
        check_labels(np.array([0, label]), names, "x")


def test_no_class_is_made_of_logits_that_are_not_finite():
    logits = np.array([[1, 2], [np.nan, 1], [3, np.inf], [-np.inf, 0], [2, 1]], np.float32)
    found = classification().predict(lambda: logits, np.zeros(5, np.int32))
    assert found["prediction"].tolist() == [1, -1, -1, -1, 0]


def test_an_evaluation_without_an_answer_ends_the_run(root, capsys, monkeypatch):
    fine = Outputs(np.arange(3), np.array([0, 1, 0]), np.array([0, 1, 1]), np.zeros(3))
    lost = fine._replace(predictions=np.array([0, -1, -1]))
    values = fine._replace(predictions=np.array([0, np.inf, 1], np.float32))
    job: Any = SimpleNamespace(runs=(resolve(config_of(root, 2)),) * 2, stacked=True)

    def final(*outputs):
        monkeypatch.setattr(evaluate, "evaluate", lambda *_: outputs)
        return evaluate.final(cast(Any, None), None, job, "test")

    assert final(fine, lost) == (fine, lost)  # one run of a sweep stays as it is
    assert "seed 0: test: the outputs of 2 of 3 examples" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"test: the outputs of 2 of 3 .*: examples 1, 2"):
        final(lost, lost)
    with pytest.raises(UserError, match=r"1 of 3 .*: examples 1"):
        final(values, values)


@pytest.mark.slow
def test_a_run_with_a_broken_row_of_its_table_says_so(root, tmp_path):
    from rmlora_jax.train import loop

    file = root / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["bert.embeddings.word_embeddings.weight"][len(SPECIAL) + WORDS.index("w39")] = (
        np.nan)
    save_file(tensors, file)
    (root / "test.jsonl").write_text('{"text": "w39 good", "label": "pos"}\n' * 3)
    config = config_of(root, 2)
    config.text.test_file, config.compilation_cache = str(root / "test.jsonl"), ""
    with pytest.raises(UserError, match="test: the outputs of 3 of 3 examples are not finite"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
