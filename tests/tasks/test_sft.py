"""Task sft from files to adapter: exact means, the same bits after a stop, what is refused."""

import json
import re

import jax
import numpy as np
import pytest
from faults.small import check_same_end, column, on_one_device, train
from fixtures.peft_decoders import cases
from fixtures.sft.tiny import config_of, write_chats, write_model, write_tokenizer
from marks import slow, slow_but

import rmlora_jax as rm
from rmlora_jax import data, hub
from rmlora_jax.data.tokens import Tokens
from rmlora_jax.errors import UserError
from rmlora_jax.models.family import flat_params
from rmlora_jax.parallel.mesh import all_devices, shard
from rmlora_jax.sweep import many
from rmlora_jax.sweep.grid import runs
from rmlora_jax.tasks import sft_feed
from rmlora_jax.tasks.task import Question, Questions, measured
from rmlora_jax.train import answers, loop, setup
from rmlora_jax.train.config import resolve
from rmlora_jax.train.evaluate import Compiled, Steps, evaluate
from rmlora_jax.train.finished import export_merged, joined, unfinished

STEPS = 30


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    write_model(folder / "model")
    write_model(folder / "tied", tied=True)
    write_chats(folder / "train.jsonl", 200, seed=0)
    write_chats(folder / "other.jsonl", 30, seed=5)
    return folder


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A run on one device, and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        summary = loop.train(e2e(root), workdir)
    return workdir, summary


def e2e(root):
    return config_of(root, STEPS, **{"sft.evaluate": (("other", str(root / "other.jsonl")),)})


def test_what_a_run_leaves(finished, root):
    workdir, summary = finished
    assert summary["task"] == "sft" and summary["metric"] == "loss"
    loss = column(workdir, "train/loss")
    assert len(loss) == STEPS and loss[-5:].mean() < 0.4 * loss[0]
    assert list(summary["test"]) == ["loss", "token_accuracy", "perplexity", "loss_other"]
    assert summary["test"]["perplexity"] == pytest.approx(np.exp(summary["test"]["loss"]))
    assert len(column(workdir, "validation/loss_other")) == 3
    tokens, padding = column(workdir, "train/tokens"), column(workdir, "train/padding")
    np.testing.assert_allclose(padding, 1 - tokens / (8 * 64), atol=1e-6)
    assert 0 < padding.mean() < 0.15 and summary["tokens_per_second"] > 0
    assert json.loads((workdir / "rmlora.json").read_text())["task"] == "sft"
    best = min(column(workdir, "validation/loss"))
    steps = [row for row in column(workdir, "step") if not row % 10]
    at = column(workdir, "validation/loss").tolist().index(best)
    assert summary["test_best"]["step"] == steps[at]


def test_its_adapter_opens_again(finished, root):
    workdir, _ = finished
    found = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
    assert found["task_type"] == "CAUSAL_LM" and found["modules_to_save"] is None
    assert set(found["target_modules"]) == {
        *(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    }
    base = hub.load_pretrained(root / "model")
    params, lora = hub.load_peft(workdir / "adapter", base)
    model = base.family.model(base.config, base.config.vocab_size)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 9)).astype(np.int32)
    factored = jax.jit(rm.adapt(model, lora).apply)({"params": params}, tokens)
    merged = jax.jit(model.apply)({"params": rm.merge(params, lora)}, tokens)
    np.testing.assert_allclose(factored, merged, atol=2e-4)
    plain = jax.jit(model.apply)({"params": base.params}, tokens)
    assert np.abs(np.asarray(plain) - np.asarray(merged)).max() > 0.1


def test_a_run_that_was_killed_ends_with_the_same_bits(finished, root, tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    train(e2e(root), tmp_path, until=20)
    train(e2e(root), tmp_path)
    check_same_end(finished[0], tmp_path, STEPS)


def one_step(root, devices=1, **fields):
    """Metrics and trainable parameters after a step from factors that are not 0."""
    config = resolve(config_of(root, 5, **fields))
    where = all_devices(limit=devices)
    job = setup.build(config, where)
    noise = iter(jax.random.split(jax.random.key(3), 100))
    noisy = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(next(noise), x.shape), job.state.trainable
    )
    state = job.state._replace(trainable=noisy)
    batch = shard(next(iter(job.feed.train(0))), where)
    state, metrics = job.train_step(state, job.constants, batch)
    return jax.device_get(metrics), jax.device_get(state.trainable)


@pytest.fixture(scope="module")
def plain(root):
    return one_step(root)


@pytest.mark.parametrize("devices, accumulate", [
    (1, 8), slow(1, 2), slow(2, 1), slow(4, 1), (4, 2), slow(8, 1),
])  # fmt: skip
def test_the_mean_is_over_the_targets_of_the_global_batch(plain, root, devices, accumulate):
    metrics, trainable = one_step(root, devices, accumulate=accumulate)
    for name in ("loss", "grad_norm", "token_accuracy", "tokens", "padding"):
        np.testing.assert_allclose(metrics[name], plain[0][name], rtol=1e-6, err_msg=name)
    assert metrics["tokens"] == plain[0]["tokens"]
    for a, b in zip(*map(jax.tree.leaves, (trainable, plain[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("method", slow_but(
    ["rm_lora", "lora", "dora", "adalora", "sora", "reg_only", "mask_only", "bitfit", "full"],
    "rm_lora",
))  # fmt: skip
@pytest.mark.parametrize("model", ["model", slow("tied")])
def test_methods_on_every_layer_and_on_embedding_and_head(root, method, model):
    target = "all-linear|embed" + "|head" * (model == "model")
    config = resolve(config_of(root, 5, **{
        "method": method, "model.source": str(root / model), "lora.target": target, "lora.rs": True,
        "optimizer.lora_plus": 4.0 if method not in ("bitfit", "full") else 1.0,
        "adalora.every": 1,
    }))  # fmt: skip
    if method == "bitfit":  # a Llama has no biases
        with pytest.raises(UserError, match="train"):
            setup.build(config, all_devices(limit=1))
        return
    where = all_devices(limit=1)
    job = setup.build(config, where)
    paths = {jax.tree_util.keystr(k, simple=True, separator="/")
             for k, _ in jax.tree.leaves_with_path(job.state.trainable)}  # fmt: skip
    wanted = {"layers/mlp/gate", "embed"} | ({"head"} if model == "model" else set())
    leaf = {"full": "kernel"}.get(method, "lora_b")
    for module in wanted:
        own = "embedding" if (method, module) == ("full", "embed") else leaf
        assert f"{module}/{own}" in paths
    state, losses = job.state, []
    batch = shard(next(iter(job.feed.train(0))), where)
    for _ in range(4):
        state, metrics = job.train_step(state, job.constants, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("fields", [
    {"method": "full"},
    slow({"method": "rm_lora", "lora.train": "norm/.*|embed/.*"}),
    slow({"method": "lora", "lora.init": "pissa", "lora.train": r".*mlp/up/kernel"}),
], ids=["full", "train", "pissa"])  # fmt: skip
def test_weights_of_the_base_are_trained_and_exported(root, tmp_path, monkeypatch, fields):
    """A finished run, the same run before its summary, and its merged model have one set of
    weights; where those themselves were trained, they are written without rounding."""
    on_one_device(monkeypatch)
    loop.train(config_of(root, 4, **fields, **{"sft.samples": 0}), tmp_path)
    merged = flat_params(hub.load_decoder(export_merged(tmp_path)).params)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"
    before = flat_params(hub.load_decoder(root / "model").params)
    assert any((merged[path] != before[path]).any() for path in before)
    (tmp_path / "summary.json").unlink()
    _, params, lora, _ = unfinished(tmp_path)
    plain = flat_params(params if lora is None else rm.merge(hub.on_device(params), lora))
    for path, value in merged.items():
        np.testing.assert_allclose(value, plain[path], rtol=0, atol=2e-6, err_msg=path)


@pytest.mark.slow
def test_a_sweep_has_the_numbers_of_its_single_runs(root):
    where = all_devices(limit=1)
    config = config_of(root, 5, **{"method": "rm_lora", "sweep.seeds": 2})
    config.sweep.grid = "{'learning_rate': (1e-2, 1e-3)}"
    config = resolve(config)
    every, base = runs(config), setup.open_base(config, where)
    job = many.build(every, base)
    state, batches = many.first_state(every, base), base.feed.train(0)
    first = [shard(next(batches), where) for _ in range(3)]
    seen = []
    for batch in first:
        state, metrics = job.train_step(state, job.constants, batch)
        seen.append(jax.device_get(metrics))
    split = shard(next(iter(base.feed.evaluate("validation"))), where)
    outputs = jax.device_get(job.eval_step(state.trainable, job.constants, split))
    for i, run in enumerate(every):
        alone = setup.build(run.config, where)
        own = alone.state
        for batch, metrics in zip(first, seen, strict=True):
            own, found = alone.train_step(own, alone.constants, batch)
            for name in ("loss", "token_accuracy", "kept_fraction", "tokens"):
                np.testing.assert_allclose(metrics[name][i], found[name], rtol=2e-5, err_msg=name)
        theirs = jax.device_get(alone.eval_step(own.trainable, alone.constants, split))
        for name in ("loss", "weight", "token_accuracy"):
            np.testing.assert_allclose(outputs[name][i], theirs[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_groups_of_devices_share_the_base(root, monkeypatch):
    from rmlora_jax.parallel import mesh

    monkeypatch.setattr(mesh, "SMALL", 64)
    config = resolve(config_of(root, 5, fsdp=4))
    where = all_devices(fsdp=4)
    job = setup.build(config, where)
    split = [x for x in jax.tree.leaves(job.constants.frozen) if not x.is_fully_replicated]
    assert len(split) > 5
    _state, metrics = job.train_step(
        job.state, job.constants, shard(next(iter(job.feed.train(0))), where)
    )
    alone = setup.build(resolve(config_of(root, 5)), one := all_devices(limit=1))
    _, theirs = alone.train_step(
        alone.state, alone.constants, shard(next(iter(alone.feed.train(0))), one)
    )
    for name in ("loss", "grad_norm", "tokens"):
        np.testing.assert_allclose(metrics[name], theirs[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("fields, words", [
    ({"sft.files": ()}, "test_file|evaluate"),
    ({"optimizer.label_smoothing": 0.1}, "label_smoothing"),
    ({"lora.train": "head"}, "head/"),
    ({"lora.target": "encoder/layers/.*"}, "all-linear"),
    ({"method": "prefix"}, "such as lora"),
    ({"method": "head", "lora.train": ""}, "regex for head"),
    ({"sft.evaluate": (("a b", "x.jsonl"),)}, "letters"),
    ({"sft.evaluate": ("x.jsonl",)}, "pairs"),
])  # fmt: skip
def test_configs_that_do_not_go_together_are_refused(root, fields, words):
    with pytest.raises(UserError, match=words):
        resolve(config_of(root, 5, **{"sft.test_file": str(root / "other.jsonl")} | fields))


@pytest.mark.parametrize("fields, words", [
    ({"sft.length": 256}, r"sft.length=256.*128.*--config.sft.length=128"),
    ({"sft.template": "chatml_"}, r"sft.template='chatml_'"),
    ({"sft.length": 4, "sft.too_long": "refuse"}, r"train.jsonl, line \d+: \d+ tokens.*length=4"),
    ({"sft.length": 4, "sft.too_long": "skip"}, "no example is left"),
    ({"sft.prompt": "q", "sft.completion": "a"}, "no 'q'; it has 'messages'"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_compiled(root, fields, words, tmp_path):
    with pytest.raises(UserError, match=f"(?s){words}"):
        loop.train(config_of(root, 5, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model_is_refused(root, tmp_path):
    write_model(tmp_path / "model", vocab_size=40)
    config = config_of(root, 5, **{"model.source": str(tmp_path / "model")})
    with pytest.raises(UserError, match=r"'a\d+' of number \d+, but the model's vocab_size is 40"):
        setup.build(resolve(config), all_devices(limit=1))


def test_a_tokenizer_without_padding_trains(root, tmp_path):
    """Llama 3's has none. What fills a row up is token 0, in no segment and no part of the loss."""
    file = write_model(tmp_path / "model") / "tokenizer_config.json"
    raw = json.loads(file.read_text())
    del raw["pad_token"]
    file.write_text(json.dumps(raw))
    config = resolve(config_of(root, 5, **{"model.source": str(tmp_path / "model")}))
    assert hub.load_tokenizer(tmp_path / "model", padding=False).pad_token_id is None
    batch = next(iter(setup.open_base(config, all_devices(limit=1)).feed.train(0)))
    filled = batch["segments"] == 0
    assert filled.any() and not batch["tokens"][filled].any() and not batch["wanted"][filled].any()


@pytest.mark.parametrize("pack", [True, slow(False)])
def test_a_stream_goes_on_from_any_step(root, pack):
    config = config_of(root, 5, **{"data.mode": "stream", "sft.pack": pack})
    base = setup.open_base(resolve(config), all_devices(limit=1))
    plain = [batch for _, batch in zip(range(6), base.feed.train(0), strict=False)]
    later = [batch for _, batch in zip(range(3), base.feed.train(3), strict=False)]
    for one, other in zip(plain[3:], later, strict=True):
        for name in ("tokens", "wanted", "segments", "positions"):
            np.testing.assert_array_equal(one[name], other[name])
    assert plain[0]["tokens"].shape[0] == 8 and (plain[0]["segments"].max() > 1) == pack
    assert base.steps == 5 and base.feed.sizes["train"] == 162
    with pytest.raises(UserError, match=r"config\.steps"):
        resolve(config_of(root, 0, **{"data.mode": "stream"}))


@pytest.mark.slow
def test_a_stream_that_goes_on_reads_nothing_twice(root, tmp_path, monkeypatch):
    monkeypatch.setattr("rmlora_jax.data.streaming.EVERY", 1)
    encode, encoded = hub.encode, []
    monkeypatch.setattr(hub, "encode", lambda *a, **k: encoded.append(0) or encode(*a, **k))

    def batches(step, count, **fields):
        config = config_of(root, 5, **{"data.mode": "stream", "sft.cache": str(tmp_path), **fields})
        feed = setup.open_base(resolve(config), all_devices(limit=1)).feed
        encoded.clear()
        found = [batch for _, batch in zip(range(count), feed.train(step), strict=False)]
        return found, len(encoded)

    whole, all_read = batches(0, 80)
    later, read = batches(79, 1)
    assert (read, all_read) == (1024, 3 * 1024)
    for name, array in later[0].items():
        np.testing.assert_array_equal(array, whole[79][name])
    # What decides the rows names the file; the number of steps does not.
    for field in ({"sft.length": 48}, {"seed": 3}, {"sft.system": "be brief"}):
        assert batches(79, 1, **field)[1] > 1024, field
    assert batches(79, 1, eval_every=3)[1] == 1024


def test_a_stream_whose_first_rows_cannot_be_used(root, tmp_path):
    rows = '{"messages": []}\n' * 40 + (root / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(rows)
    config = config_of(root, 5, **{"data.mode": "stream", "data.bad_records": 500,
                                   "sft.files": (str(tmp_path / "train.jsonl"),)})  # fmt: skip
    base = setup.open_base(resolve(config), all_devices(limit=1))
    assert next(base.feed.train(0))["wanted"].any() and "[[ is a" in "".join(base.problem.notes)


@pytest.mark.parametrize("name", slow_but(["tokens", "whole_tied", "llama_rows"], "tokens"))
def test_an_adapter_of_peft_continues_with_its_embedding(root, tmp_path, name):
    """Its trained rows and whole modules are where the run begins, and are trained on."""
    source = cases.write_base(tmp_path / "base", cases.ADAPTERS[name][0])
    write_tokenizer(source)
    fields = {"model.source": str(source), "model.adapter": str(cases.HERE / name)}
    job = setup.build(resolve(config_of(root, 2, **fields)), all_devices(limit=1))
    base = hub.load_pretrained(source)
    expected = flat_params(hub.load_peft(cases.HERE / name, base)[0])
    assert job.problem.pretrained is not None
    rows = job.problem.pretrained.rows
    found = flat_params(joined(rm.join(job.state.trainable, job.constants.frozen), {}, rows))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    trained = flat_params(job.state.trainable)
    assert ("embed/embedding" in trained) == (name != "tokens") and "head/kernel" not in trained
    assert len(trained.get("new_tokens/embed", ())) == len(rows) == 2 * (name != "whole_tied")


@pytest.mark.slow
def test_one_example_a_row_has_the_figures_of_packed_rows(root):
    where, found = all_devices(limit=1), []
    for pack in (True, False):
        job = setup.build(resolve(config_of(root, 5, **{"sft.pack": pack})), where)
        steps = Steps(Compiled(job.train_step), Compiled(job.eval_step))
        (outputs,) = evaluate(steps, job.state.trainable, job, "validation")
        found.append((measured(outputs, ("loss", "token_accuracy")), job, outputs))
    (packed, job, rows), (single, other, examples) = found
    assert packed == pytest.approx(single, rel=1e-6)
    assert rows.weights.sum() == examples.weights.sum() == 3 * 18
    assert len(examples.ids) == 18 > len(rows.ids) and other.feed.varies and not job.feed.varies
    assert job.feed.sizes == other.feed.sizes and job.feed.train_size < other.feed.train_size == 162
    numbers = job.feed.examples("validation", np.arange(len(rows.ids)))
    assert sorted(numbers) == list(range(18))
    words = "".join(job.problem.notes)
    assert "rows of 64 tokens" in words and "[[ is a" in words


@pytest.mark.parametrize("pack", [True, False])
def test_evaluation_has_each_example_of_a_pass_and_tells_its_number(root, pack):
    config = resolve(config_of(root, 5, **{"sft.pack": pack, "eval_batch_size": 3}))
    lengths = np.array([5, 9, 2, 7])
    offsets = np.cumsum([0, *lengths])
    tokens = Tokens(np.arange(offsets[-1], dtype=np.int32), np.ones(offsets[-1], np.uint8), offsets)
    order = np.array([2, 3, 0, 3])  # one twice, one in another split
    rows = data.pack(lengths[order], 64) if pack else None
    rows = rows and data.Rows(order[rows.examples], rows.starts)
    split = sft_feed.Split(tokens, order, rows)
    seen = []
    for batch in sft_feed.eval_batches(config, split, hub.load_tokenizer(root / "model")):
        for row, number in zip(np.flatnonzero(batch["mask"]), batch["id"], strict=False):
            examples = sft_feed.examples_in(split, np.array([number]))
            for segment, example in enumerate(examples, 1):
                own = batch["tokens"][row][batch["segments"][row] == segment]
                np.testing.assert_array_equal(own, tokens.ids[slice(*offsets[example:][:2])])
            seen += examples.tolist()
    assert sorted(seen) == sorted(order)


def test_a_question_that_is_too_long_is_left_out_alone(root, tmp_path, capsys):
    base = setup.open_base(resolve(config_of(root, 5)), all_devices(limit=1))
    problem = base.problem
    long = {"messages": [{"role": "user", "content": "q1 " * 200}]}
    short = [Question({"prompt": f"q{i}"}, f"is a{i}") for i in range(3)]
    too_long = Question(long, "is a1")

    def asked(*exam, samples=()):
        own = problem._replace(questions=Questions(samples, exam, r"(\w+)", 4))
        found = answers.asked(tmp_path, base.config, own, None, lambda: problem.pretrained.params)
        return found, capsys.readouterr().out

    alone, said = asked(*short)
    assert 0 <= alone["exact_match"] <= 1 and "note" not in said
    found, said = asked(short[0], too_long, *short[1:], too_long, samples=(too_long, short[2]))
    assert found == alone
    assert re.search(r"note: 2 of 5 test questions are left out of the exact match: question 1 has "
                     r"20\d tokens, and .* takes 128", said)
    text = (tmp_path / "samples.md").read_text()
    assert text.count("**asked**") == 1 and "q2" in text
    found, said = asked(too_long)
    assert found == {} and "1 of 1 test questions" in said


@pytest.mark.slow
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_the_trained_model_is_asked(root, tmp_path, monkeypatch, init):
    on_one_device(monkeypatch)
    fields = {"sft.samples": 2, "sft.answer": r"is (a\d+)", "sft.asked": 10,
              "sft.longest_answer": 6, "method": "lora", "lora.init": init}  # fmt: skip
    summary = loop.train(config_of(root, 10, **fields), tmp_path)
    text = (tmp_path / "samples.md").read_text()
    assert text.count("**before**") == text.count("**after**") == 2
    after = [part.split("\n\n")[1] for part in text.split("**after**")[1:]]
    assert all("is a" in words for words in after)  # the form is learnt at once
    fraction = summary["test_best"]["exact_match"] * 10
    assert abs(fraction - round(fraction)) < 1e-9
    model = hub.load(tmp_path)
    assert [f"> {a.text}" for a in model.generate(
        [row["messages"][:1] for row in first_of_test(root)], max_new_tokens=6
    )] == after


def first_of_test(root):
    """The first two chats of the test split."""
    from rmlora_jax.tasks.sft import request

    chats = data.open_chats(request(resolve(config_of(root, 10)))).tests["test"]
    return [chats[0], chats[1]]


@pytest.mark.slow
def test_a_value_that_is_not_finite_is_traced_to_its_layer(root):
    job = setup.build(resolve(config_of(root, 5)), all_devices(limit=1))
    frozen = jax.tree.map(np.array, jax.device_get(job.constants.frozen))
    frozen["layers"]["mlp"]["gate"]["kernel"][1, 0, 0] = np.nan
    constants = job.constants._replace(frozen=frozen)
    words = job.look(job.state.trainable, constants, next(iter(job.feed.train(0))), 0)
    assert words == "first not finite is the output of layers/mlp/gate (__call__, call 2)"
