"""Tokenizers in GGUF files against sentencepiece, and byte-level BPE one merge at a time."""

import functools
import io
import itertools
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import regex  # transformers brings it
import sentencepiece
import tokenizers

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")

from fixtures.gguf_models import write  # noqa: E402

from rmlora_jax.errors import UserError  # noqa: E402
from rmlora_jax.hub import load_tokenizer  # noqa: E402
from rmlora_jax.hub.gguf_tokenizer import CUTS  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
TEXTS = [
    *("", " ", "  ", "\n", " \n\n  x", "\t\tx", "a", " a", "a ", "  a  b  ", "Hello, World!"),
    *("I'm, WE'LL, don't DON'T", "123456 7", "  12", "3.14", "½Ⅷ", "naïve e\u0301", "Привет мир"),
    *("你好世界", "😀👍🏽", "x" * 50, " " * 9 + "x", "\r\n\r\n", "CamelCase/name.py//"),
    *("a<sep>b", "\u0000", "f(x) = [1, 2]; // ok\n    return", "\u00a0x", "A\u030a\n\n3 \n 4"),
]  # fmt: skip


def texts() -> list[str]:
    rng = np.random.default_rng(0)
    words, gaps = PAGES.split(), np.array([" ", "  ", "\n", "", " 7 ", "  42", "\n\n", "'S "])
    return TEXTS + [
        "".join(rng.choice(words) + rng.choice(gaps) for _ in range(rng.integers(1, 12)))
        for _ in range(40)
    ]


# --- byte-level BPE -----------------------------------------------------------------------------

# As in llama.cpp's src/llama-vocab.cpp: one expression after the other cuts what is left. A list
# of runs of white space at its end is what a text has beside the matches.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXPRESSIONS = {
    **dict.fromkeys(("smollm", "starcoder", "refact"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("gpt-2", "default"), (GPT2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (QWEN2,)),
    "tekken": (TEKKEN,),
}
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")  # ignore_merges
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
TYPES = [3, 3, 3, 4]  # control, ..., user-defined


@functools.cache
def learnt():
    """(tokens, merges) of byte-level BPE on this project's pages; a token that no merges make."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(PAGES.splitlines(keepends=True), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return SPECIALS + tokens + ["zqzq"], [" ".join(merge) for merge in model["merges"]]


def gpt2_fields(**more) -> dict:
    tokens, merges = learnt()
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "merges": merges,
        "token_type": TYPES + [1] * (len(tokens) - len(TYPES)),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
        **more,
    }


def pieces(text: str, expressions) -> list[str]:
    found = [text]
    for expression in expressions:
        found = [
            part
            for whole in found
            for cut in regex.split(f"({expression})", whole)
            if (part := cut or "")
        ]
    return found


@functools.cache
def tables():
    tokens, merges = learnt()
    number = {token: i for i, token in enumerate(tokens)}
    return number, {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}


def bpe(text: str, pre: str) -> list[int]:
    """Tokens of a text, by the definition: the best merge of a word first, until none is left."""
    number, rank = tables()
    spelled = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = []
    for part in regex.split("(" + "|".join(map(regex.escape, SPECIALS)) + ")", text):
        if part in SPECIALS:
            ids.append(number[part])
            continue
        for word in pieces(part, EXPRESSIONS[pre]):
            letters = [letter for letter, _ in spelled.pre_tokenize_str(word)]
            letters = list("".join(letters))
            if pre in WHOLE_WORDS and "".join(letters) in number:
                letters = ["".join(letters)]
            while len(letters) > 1:
                pairs = list(itertools.pairwise(letters))
                best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
                if best not in rank:
                    break
                at = pairs.index(best)
                letters[at : at + 2] = ["".join(best)]
            ids += [number[letter] for letter in letters]
    return ids


def test_every_cut_has_an_independent_expression():
    assert CUTS.keys() == EXPRESSIONS.keys()


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "smaug-bpe", "qwen2", "tekken"])
def test_byte_level_tokens(pre, tmp_path):
    path = write(tmp_path / "m.gguf", tokenizer=gpt2_fields(pre=pre, add_bos_token=False))
    tokenizer = load_tokenizer(path)
    rows = [*texts(), "<|im_start|>user\n x<|im_end|>", "a<think> b</think>", "zqzq", " zqzq zqzq"]
    for row in rows:
        # Qwen's own tokenizer composes characters first.
        given = unicodedata.normalize("NFC", row) if pre == "qwen2" else row
        ids = tokenizer(row)["input_ids"]
        assert ids == bpe(given, pre), row
        assert tokenizer.decode(ids) == given
    assert (tokenizer.convert_tokens_to_ids("zqzq") in tokenizer("zqzq")["input_ids"]) == (
        pre in WHOLE_WORDS
    )
    ids = tokenizer("<think>x<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>x"


# --- SentencePiece ------------------------------------------------------------------------------


@functools.cache
def trained():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PAGES.splitlines()), model_writer=model, model_type="bpe",
        vocab_size=900, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, user_defined_symbols=["<sep>"], minloglevel=5,
        allow_whitespace_only_pieces=True, character_coverage=0.99, num_threads=1,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def llama_fields(**more) -> dict:
    model = trained()
    kinds = {"is_unknown": 2, "is_control": 3, "is_unused": 5, "is_byte": 6}
    types = [
        next((kind for name, kind in kinds.items() if getattr(model, name)(i)), 1)
        for i in range(len(model))
    ]
    types[model.piece_to_id("<sep>")] = 4
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(i) for i in range(len(model))],
        "scores": [model.get_score(i) for i in range(len(model))],
        "token_type": types,
        "padding_token_id": 0,
        **more,
    }


def test_sentencepiece_tokens(tmp_path):
    """bos, eos and unk are 1, 2 and 0 where the file does not say, and bos is put in front."""
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", tokenizer=llama_fields()))
    model = trained()
    assert sum("<0x" in token for token in map(model.id_to_piece, range(len(model)))) == 256
    used = set()
    for row in texts():
        # A prefix space is put in front of what follows a special token, as in Llama 2's files.
        expected = model.encode(row) if "<sep>" not in row else [
            *model.encode("a"), model.piece_to_id("<sep>"), *model.encode("b")
        ]  # fmt: skip
        ids = tokenizer(row)["input_ids"]
        assert ids == [1, *expected], row
        if "<sep>" not in row:
            assert tokenizer.decode(ids, skip_special_tokens=True) == row
        used.update(ids)
    assert len(used) > 300 and used & set(range(3, 259))  # bytes, too
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert named == ("<s>", "</s>", "<unk>")


def test_without_a_space_in_front(tmp_path):
    fields = llama_fields(add_space_prefix=False, add_bos_token=False, add_eos_token=True)
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", tokenizer=fields))
    plain = trained()
    for row in texts():
        if row and "<sep>" not in row and row[0] != " ":
            ids = tokenizer(row)["input_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == row and ids[-1] == 2
            # The tokens of the same text after a line's end, where no space is put in front.
            assert ids[:-1] == plain.encode("\n" + row)[len(plain.encode("\n")) :] or row[0] == "\n"


# --- both ---------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_saved_and_opened_again(kind, tmp_path):
    """`save_pretrained` writes the same tokenizer, for a model that is written out whole."""
    fields = gpt2_fields(pre="llama-bpe") if kind == "gpt2" else llama_fields()
    path = write(tmp_path / "m.gguf", tokenizer=fields | {"tokenizer.chat_template": TEMPLATE})
    tokenizer = load_tokenizer(path)
    tokenizer.save_pretrained(tmp_path / "folder")
    again = load_tokenizer(tmp_path / "folder")
    assert tokenizer("x")["input_ids"][0] == 1  # both put bos in front by themselves
    for row in [*texts(), "<|im_start|>x<think>", "</s>"]:
        assert again(row)["input_ids"] == tokenizer(row)["input_ids"]
    talk = [{"role": "user", "content": "Hi"}]
    wanted = "<|im_start|>user\nHi<|im_end|>\n"
    for one in (tokenizer, again):
        assert one.apply_chat_template(talk, tokenize=False) == wanted
        assert one.pad_token_id == 0 and one.eos_token_id == 2 and one.bos_token_id == 1


def test_both_ends_and_pairs(tmp_path):
    fields = gpt2_fields(add_bos_token=True, add_eos_token=True)
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", tokenizer=fields))
    a, b = (bpe(text, "smollm") for text in "ab")
    assert tokenizer("a")["input_ids"] == [1, *a, 2]
    assert tokenizer("a", "b")["input_ids"] == [1, *a, 2, 1, *b, 2]
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == a
    batch = tokenizer(["a", "a b c"], padding=True)["input_ids"]
    assert batch[0][-1] == 0 and len(batch[0]) == len(batch[1])


TOKENS = ["<s>", "</s>", "a", "b", "ab"]
SMALL = {
    "model": "llama",
    "tokens": TOKENS,
    "scores": [0.0] * 5,
    "token_type": [3, 3, 1, 1, 1],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "padding_token_id": 1,
    "unknown_token_id": 0,
}


def without(name: str) -> dict:
    return {other: value for other, value in SMALL.items() if other != name}


REFUSED = {
    "no tokenizer": ({}, "has no tokenizer.ggml.tokens, so no tokenizer"),
    "another kind": (SMALL | {"model": "t5"}, "model is 't5'; known are gpt2, llama"),
    "no scores": (without("scores"), "has no tokenizer.ggml.scores"),
    "fewer scores": (SMALL | {"scores": [0.0]}, "5 tokens, but 1 scores"),
    "fewer types": (SMALL | {"token_type": [1]}, "5 tokens, but 1 types"),
    "a token twice": (SMALL | {"tokens": ["a"] * 5}, "it has a token twice"),
    "tokens of numbers": (SMALL | {"tokens": [1, 2, 3, 4, 5]}, "tokens is not a list of one kind"),
    "tokens of one text": (SMALL | {"tokens": "abcde"}, "tokenizer.ggml.tokens is 'abcde'"),
    "bos beyond": (SMALL | {"bos_token_id": 5}, "its bos_token_id is 5, of 5 tokens"),
    "a template of numbers": (SMALL | {"tokenizer.chat_template": 3}, "template is not a text"),
    "no padding": (without("padding_token_id"), "has no token for padding"),
    "words cut in no known way": (
        SMALL | {"model": "gpt2", "merges": ["a b"], "pre": "smolm"},
        r"is 'smolm'; known are smollm, .*did you mean smollm\?",
    ),
    "words cut in no way": (
        SMALL | {"model": "gpt2", "merges": ["a b"]}, "is missing, as in files of early 2024"
    ),
    "no merges": (SMALL | {"model": "gpt2", "pre": "smollm"}, "has no tokenizer.ggml.merges"),
    "a merge of three": (
        SMALL | {"model": "gpt2", "pre": "smollm", "merges": ["a b ab"]}, "is not of two tokens"
    ),
    "a merge of no tokens": (
        SMALL | {"model": "gpt2", "pre": "smollm", "merges": ["x y"]}, "tokenizer that can be read"
    ),
    "eos that is not named": (
        {"model": "gpt2", "pre": "smollm", "tokens": ["a", "b"], "merges": ["a b"],
         "add_eos_token": True, "padding_token_id": 0},
        "no tokenizer that can be read|asks for the token eos",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path):
    fields, said = REFUSED[case]
    path = write(tmp_path / "m.gguf", tokenizer=fields)
    with pytest.raises(UserError, match=said) as error:
        load_tokenizer(path)
    assert "m.gguf" in str(error.value) and "\n" not in str(error.value)
