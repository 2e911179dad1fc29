"""A language model from its folder: prompts in many forms, answers, several adapters."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.peft_decoders import cases
from fixtures.sft.tiny import TEMPLATE, write_model, write_tokenizer

import rmlora_jax as rm
from rmlora_jax import hub
from rmlora_jax.errors import UserError
from rmlora_jax.hub.info import Info, write_info
from rmlora_jax.inference import generator
from rmlora_jax.inference.classifier import NotFinite
from rmlora_jax.inference.generator import Generator
from rmlora_jax.models.decoder import Decoder
from rmlora_jax.parallel import memory

CHAT = [{"role": "user", "content": "q3 q4"}, {"role": "assistant", "content": "is a3"},
        {"role": "user", "content": "q5"}]  # fmt: skip
PROMPTS = ["q1 q2", CHAT, {"text": "q1 is"}, {"prompt": "q7 " * 12}, {"messages": CHAT[:2]}]
NEW = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def model(folder):
    return hub.load(folder)


@pytest.fixture(scope="module")
def answers(model):
    return model.generate(PROMPTS, max_new_tokens=NEW)


def by_whole_passes(model, tokens, forward=None, number=NEW, ends=(5,)):
    """Greedy tokens up to an end token, each from one whole forward pass."""
    base, row = model.base, np.zeros((1, 64), np.int32)
    forward = forward or jax.jit(lambda x: Decoder(base.config, base.num_labels).apply(
        {"params": base.params}, x))  # fmt: skip
    row[0, : len(tokens)] = tokens
    for place in range(len(tokens), len(tokens) + number):
        row[0, place] = forward(row)[0, place - 1].argmax()
        if row[0, place] in ends:
            return row[0, len(tokens) : place].tolist(), "stop"
    return row[0, len(tokens) : len(tokens) + number].tolist(), "length"


def test_answers_are_the_greedy_ones_after_the_template(model, answers):
    tokenizer = model.tokenizer
    chats = {0: [{"role": "user", "content": "q1 q2"}], 1: CHAT, 4: CHAT[:1],
             3: [{"role": "user", "content": "q7 " * 12}]}  # fmt: skip
    ends = set()
    for i, answer in enumerate(answers):
        if i in chats:
            text = tokenizer.apply_chat_template(
                chats[i], tokenize=False, add_generation_prompt=True
            )
        else:
            text = "q1 is"
        tokens, ended = by_whole_passes(model, tokenizer(text)["input_ids"])
        assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert (answer.tokens, answer.ended) == (len(tokens), ended)
        ends.add(ended)
    assert ends == {"stop", "length"}
    assert answers[3].prompt.example == PROMPTS[3]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3},
                                     {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "seed": 1}])
def test_batches_and_streams_answer_alike(model, options):
    every = model.generate(PROMPTS, max_new_tokens=NEW, **options)
    assert model.generate(PROMPTS, max_new_tokens=NEW, batch_size=2, **options) == every
    pieces = list(model.stream(PROMPTS[0], max_new_tokens=NEW, **options))
    assert "".join(pieces) == every[0].text and len(pieces) > 1


def test_seeds(model, answers):
    def texts(**options):
        return [a.text for a in model.generate(PROMPTS, max_new_tokens=NEW, **options)]

    assert texts(temperature=2.0, seed=1) == texts(temperature=2.0, seed=1)
    assert texts(temperature=2.0, seed=1) != texts(temperature=2.0, seed=2)
    assert texts(temperature=2.0, top_k=1) == [answer.text for answer in answers]


def test_what_ends_an_answer(model, answers, folder, tmp_path):
    text = next(answer.text for answer in answers if len(set(answer.text.split())) > 4)
    (prompt,) = [p for p, a in zip(PROMPTS, answers, strict=True) if a.text == text][:1]
    word = text.split()[3]
    before = text.partition(f" {word}")[0]
    found, = model.generate([prompt], max_new_tokens=NEW, stop=[f" {word}"])
    assert (found.text, found.ended) == (before, "stop")
    assert "".join(model.stream(prompt, max_new_tokens=NEW, stop=[f" {word}"])) == before
    # A token that generation_config.json lists.
    other = shutil.copytree(folder, tmp_path / "other")
    number = model.tokenizer.convert_tokens_to_ids(word)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, number]}))
    ended = hub.load(other)
    assert ended.ends == {3, 5, number}
    assert ended.generate([prompt], max_new_tokens=NEW)[0].text == before
    # A special token as a stop string: here the one that is written anyway, and none after it.
    stop = model.generate(["q1 q2"], max_new_tokens=NEW, stop=["<|im_start|>"])[0]
    assert "<|im_start|>" not in stop.text


def test_the_last_position(model, folder):
    room = {"text": "q1 " * 120}
    found, = model.generate([room], max_new_tokens=200, temperature=1.0)
    assert found.tokens <= 8 and (found.tokens == 8) == (found.ended == "length")
    with pytest.raises(UserError) as error:
        model.generate(["a", {"text": "q1 " * 128}])
    assert str(error.value) == (f"prompt 1 has 128 tokens, and {folder} takes 128, of which the "
                                "answer needs one; shorten the prompt")


@pytest.mark.parametrize(("prompts", "options", "words"), [
    ([3], {}, "prompt 0 is 3; it must be a string, a conversation"),
    ([{"prompt": "a", "text": "b"}], {}, "prompt 0 has prompt and text"),
    ([{"prompt": ["a"]}], {}, "prompt 0: 'prompt' is ['a']; it must be a string"),
    ([[{"role": "assistant", "content": "a"}]], {}, "prompt 0: there is no message to answer"),
    (["a", [{"role": "king", "content": "a"}]], {}, "prompt 1"),
    (["\ud800"], {}, "prompt 0 is not UTF-8"),
    ([{"text": ""}], {}, "prompt 0 has no tokens"),
    (["a"], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number from 1"),
    (["a"], {"temperature": -1.0}, "temperature is -1.0"),
    (["a"], {"top_p": 1.5}, "top_p is 1.5"),
    (["a"], {"seed": -1}, "seed is -1"),
    (["a"], {"stop": [""]}, "stop is ['']"),
    (["a"], {"batch_size": 0}, "batch_size is 0"),
    (["a"], {"adapters": "x"}, "prompt 0 names the adapter 'x'; this model has one"),
    (["a"], {"adapters": ["x", "y"]}, "adapters has 2 names for 1 prompts"),
])
def test_what_is_refused(model, prompts, options, words):
    with pytest.raises(UserError) as error:
        model.generate(prompts, **options)
    assert str(error.value).startswith(words)


def test_a_template_that_refuses(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    info = Info("sft", template="{{ raise_exception('no kings here') }}")
    with pytest.raises(UserError, match=r"prompt 0: the chat template of the model ref.*kings"):
        hub.load(_with(other, info)).generate(["a"])


def _with(folder, info):
    write_info(folder, info)
    return folder


def test_template_and_system_of_the_run(model, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    info = Info("sft", template="{% for m in messages %}{{ m['content'] }} {% endfor %}<bos>",
                system="be brief")  # fmt: skip
    write_info(other, info)
    assert hub.read_info(other) == info
    own = hub.load(other)
    tokens, _ = by_whole_passes(model, own.tokenizer("be brief q1 <bos>")["input_ids"])
    assert own.generate(["q1"], max_new_tokens=NEW)[0].text == own.tokenizer.decode(tokens)
    # Trained without a template: a prompt is the beginning of a text, messages are refused.
    plain = hub.load(_with(other, Info("sft", template="")))
    assert plain.generate(["q1 is"], max_new_tokens=NEW)[0].text == model.generate(
        [{"text": "q1 is"}], max_new_tokens=NEW)[0].text  # fmt: skip
    with pytest.raises(UserError, match="no chat template, so it takes no messages"):
        plain.generate([CHAT])
    fields = json.loads((_with(other, Info("sft")) / "rmlora.json").read_text())
    assert "template" not in fields and "system" not in fields


def test_logits_that_are_not_finite(folder):
    base = hub.load_pretrained(folder)
    base.params["embed"]["embedding"][base.config.vocab_size - 1] = np.inf  # the word a19
    model = Generator(base, base.params, None, Info("sft"))
    with pytest.raises(NotFinite, match=r"for 1 of 2 prompts are not finite.*prompt 1'; the model"):
        model.generate(["q1", "a19"], max_new_tokens=2)
    failures = []
    found = model.generate(["q1", "a19"], max_new_tokens=2, failed=failures.append)
    assert [answer.prompt.example["prompt"] for answer in found] == ["q1"] and len(failures) == 1
    with pytest.raises(NotFinite):
        list(model.stream("a19"))


def adapter(folder, base, seed, rank, **fields):
    lora = rm.LoRA(rank=rank, alpha=3 * rank, **fields)
    model = rm.adapt(Decoder(base.config, base.num_labels), lora)
    params = rm.attach(jax.random.key(seed), model, base.params, jnp.ones((1, 2), jnp.int32))
    tree, frozen = rm.split(params, lora)
    rng = np.random.RandomState(seed)
    tree = jax.tree.map(lambda x: np.asarray(x) + np.float32(rng.normal(0, 0.1, x.shape)), tree)
    hub.save_peft(folder, rm.join(tree, frozen), lora, base, info=Info("sft"))


@pytest.mark.slow
def test_a_folder_with_several_adapters(folder, tmp_path, answers):
    base = hub.load_pretrained(folder)
    # A run's folder, and two plain ones; other ranks and targets.
    adapter(tmp_path / "one" / "adapter", base, 1, 2, target="layers/attention/query")
    adapter(tmp_path / "two", base, 2, 3, target="layers/mlp/.*|layers/attention/value")
    adapter(tmp_path / "three", base, 3, 2, target="layers/attention/.*")
    model = hub.load(tmp_path)
    assert model.names == ("one", "three", "two")
    names = ["two", "one", "three", "one", "two"]
    found = model.generate(PROMPTS, adapters=names, max_new_tokens=NEW)
    for name in set(names):
        own = hub.load(tmp_path / name)
        expected = own.generate(PROMPTS, max_new_tokens=NEW)
        for i in [i for i, other in enumerate(names) if other == name]:
            assert found[i].text == expected[i].text != answers[i].text
            assert found[i].prompt.adapter == name
    row = {"prompt": "q1 q2", "adapter": "two"}
    assert model.generate([row], max_new_tokens=NEW)[0].text == found[0].text
    assert "".join(model.stream("q1 q2", adapter="two", max_new_tokens=NEW)) == found[0].text
    with pytest.raises(UserError, match="prompt 0 names no adapter; this model has one, three, t"):
        model.generate(["a"])
    with pytest.raises(UserError, match=r"the adapter 'twa'.*; did you mean two"):
        model.generate(["a"], adapters="twa")


def test_adapters_of_different_templates_do_not_share_a_model(folder, tmp_path):
    base = hub.load_pretrained(folder)
    for number, name in enumerate(("one", "two")):
        adapter(tmp_path / name, base, number, 2, target="layers/attention/query")
    write_info(tmp_path / "two", Info("sft", system="be brief"))
    with pytest.raises(UserError, match="one and two were trained with different chat templates"):
        hub.load(tmp_path)


def test_adapters_with_rows_of_tokens_and_with_a_head_of_their_own_share_a_model(tmp_path):
    """One trains rows of the embedding that is the head, the other factors of the head alone."""
    write_tokenizer(cases.write_base(tmp_path / "base", "llama_tied"))
    for name in ("head", "tokens"):
        file = shutil.copytree(cases.HERE / name, tmp_path / "all" / name) / "adapter_config.json"
        fields = {"base_model_name_or_path": str(tmp_path / "base")}
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    model, texts = hub.load(tmp_path / "all"), [{"text": "q1 q5 q3"}, {"text": "q2 a7"}]
    for name in ("head", "tokens"):
        alone = hub.load(tmp_path / "all" / name).generate(texts, max_new_tokens=NEW)
        shared = model.generate(texts, adapters=name, max_new_tokens=NEW)
        assert [a.text for a in shared] == [a.text for a in alone]


def test_an_adapter_of_the_embedding_alone_of_a_tied_model(tmp_path):
    """PEFT leaves the head as it is."""
    base = shutil.copytree(cases.HERE / "embedding", tmp_path / "adapter").parent / "base"
    write_tokenizer(cases.write_base(base, "llama_tied"))
    file = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}
    file.write_text(json.dumps(fields))
    model, ids = hub.load(tmp_path / "adapter"), cases.inputs_of("llama_tied")["input_ids"][:1]
    logits = jax.jit(model.model.apply)({"params": model.params}, ids)
    expected = np.load(cases.HERE / "embedding" / "logits.npy")
    np.testing.assert_allclose(logits[0], expected, atol=3e-5 * np.sqrt((expected**2).mean()))


def test_a_batch_that_does_not_fit_in_memory(model, answers, monkeypatch, capsys):
    sizes, write = [], model._write

    def short(batch, rows, options):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes.")
        return write(batch, rows, options)

    monkeypatch.setattr(model, "_write", short)
    assert model.generate(PROMPTS, max_new_tokens=NEW) == answers
    assert sizes == [5, 2, 2, 1]
    assert "note: 5 prompts at once need more memory; now 2" in capsys.readouterr().err
    monkeypatch.setattr(memory, "is_short", lambda error: False)
    with pytest.raises(RuntimeError):
        model.generate(PROMPTS, max_new_tokens=NEW)


def test_half_precision(folder, answers):
    base = hub.load_pretrained(folder)
    model = Generator(base, base.params, None, Info("sft", dtype="bfloat16"))
    assert model.params["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert model.params["norm"]["scale"].dtype == jnp.float32
    found = model.generate(PROMPTS, max_new_tokens=NEW)
    # The first tokens agree where the logits are far apart, here in most prompts.
    same = [a.text.split()[:1] == b.text.split()[:1] for a, b in zip(found, answers, strict=True)]
    assert sum(same) >= 4


def test_a_tokenizer_without_a_template(folder, tmp_path, model):
    other = shutil.copytree(folder, tmp_path / "other")
    file = other / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    assert fields.pop("chat_template") == TEMPLATE
    file.write_text(json.dumps(fields))
    found = hub.load(other).generate(["q1 is"], max_new_tokens=NEW)[0].text
    assert found == model.generate([{"text": "q1 is"}], max_new_tokens=NEW)[0].text


def test_ends_of_the_files(tmp_path):
    for value, ends in ((7, {7}), ([1, 106], {1, 106}), (None, set()), ([-1, True, "a"], set())):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
        assert generator.stored_ends(tmp_path) == ends


def test_ends_of_a_gguf_file(tmp_path):
    """A file that names an end of the text and an end of the turn has both."""
    pytest.importorskip("gguf")
    from fixtures.gguf_models import write

    ids = {"eos_token_id": 2, "eot_token_id": 7}
    assert generator.stored_ends(write(tmp_path / "m.gguf", tokenizer=ids)) == {2, 7}
