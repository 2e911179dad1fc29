"""Tokens against the tokenizer one by one, their cache, and batches against plain padding."""

import numpy as np
import pytest
from fixtures.text.tiny import write_model, write_texts

from rmlora_jax.data import batch_ids, load_texts, tokenise
from rmlora_jax.data.tokens import (
    WINDOW,
    Tokens,
    buckets,
    check_tables,
    eval_text_batches,
    text_batches,
)
from rmlora_jax.errors import UserError
from rmlora_jax.hub import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    path = write_texts(tmp_path_factory.mktemp("texts") / "a.jsonl", 150, seed=0)
    return load_texts("a", columns=("text",), train_file=path, validation=25).train


def examples(tokens):
    return [tokens.ids[a:b].tolist() for a, b in zip(tokens.offsets, tokens.offsets[1:],
                                                       strict=False)]


def test_tokens_are_the_tokenizers(tokenizer, split):
    tokens = tokenise(split.texts, tokenizer, 16)
    assert examples(tokens) == [
        tokenizer(text, truncation=True, max_length=16)["input_ids"] for text in split.texts[0]
    ]
    assert tokens.lengths.max() == 16 and tokens.lengths.min() < 16
    assert tokens.ids.dtype == np.int32 and tokens.types.max() == 0
    pairs = (split.texts[0], split.texts[0][::-1])
    tokens = tokenise(pairs, tokenizer, 12)
    rows = [tokenizer(a, b, truncation=True, max_length=12) for a, b in zip(*pairs, strict=True)]
    assert examples(tokens) == [row["input_ids"] for row in rows]
    assert tokens.types.tolist() == [t for row in rows for t in row["token_type_ids"]]


def test_the_cache_is_read_and_depends_on_everything(tokenizer, split, tmp_path):
    class Counting:
        calls = 0

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *args, **kwargs):
            Counting.calls += 1
            return tokenizer(*args, **kwargs)

    def run(texts=split.texts, length=16):
        before = Counting.calls
        tokens = tokenise(texts, Counting(), length, cache_dir=tmp_path)
        return tokens, Counting.calls > before

    first, made = run()
    again, anew = run()
    assert made and not anew and examples(first) == examples(again)
    np.testing.assert_array_equal(first.types, again.types)
    assert run(length=15)[1]  # another length
    assert run(texts=(split.texts[0][1:],))[1]  # other texts
    assert run(texts=(["ab"], ["c"]))[1] and run(texts=(["a"], ["bc"]))[1]
    tokenizer(["something"], padding="max_length", max_length=5, truncation=True)
    assert not run()[1]  # what an earlier call asked for is not part of it
    (file,) = (p for p in tmp_path.iterdir() if np.load(p)["offsets"][-1] == first.offsets[-1])
    file.write_bytes(file.read_bytes()[:-40])
    damaged, made = run()
    assert made and examples(damaged) == examples(first)
    assert not run()[1]
    assert not list(tmp_path.glob(".*"))


def test_buckets():
    assert buckets(128) == (16, 32, 48, 64, 96, 128)
    assert buckets(10) == (10,)
    assert buckets(300) == (16, 32, 48, 64, 96, 128, 192, 256, 300)


def check(batch, tokens, labels, pad):
    """Every row is its example, padded on the right."""
    for i, example in enumerate(batch["id"]):
        ids = examples(tokens)[example]
        length = batch["input_ids"].shape[1]
        assert batch["input_ids"][i].tolist() == ids + [pad] * (length - len(ids))
        assert batch["attention_mask"][i].tolist() == [j < len(ids) for j in range(length)]
        assert batch["label"][i] == labels[example]
    assert batch["input_ids"].dtype == batch["token_type_ids"].dtype == np.int32


@pytest.mark.parametrize("grouped", [False, True])
def test_any_number_of_processes_sees_the_same_batches(tokenizer, split, grouped):
    tokens = tokenise(split.texts, tokenizer, 32)
    options = {"seed": 3, "pad_id": 0, "max_length": 32, "group_by_length": grouped}

    def batches(start=0, count=90, **parts):
        found = text_batches(tokens, split.labels, 8, start_step=start, **options, **parts)
        return [next(found) for _ in range(count)]

    whole = batches()
    for batch in whole[:6]:
        check(batch, tokens, split.labels, 0)
    for processes in (2, 4):
        shares = [batches(process_index=i, process_count=processes) for i in range(processes)]
        for step, batch in enumerate(whole):
            for name in batch:
                parts = np.concatenate([share[step][name] for share in shares])
                np.testing.assert_array_equal(parts, batch[name])
    for start in (1, 63, 64, 70):
        for ours, theirs in zip(batches(start, 5), whole[start:], strict=False):
            np.testing.assert_array_equal(ours["id"], theirs["id"])
    longest = [tokens.lengths[batch["id"]].max() for batch in whole]
    assert [b["input_ids"].shape[1] for b in whole] == [
        min(n for n in buckets(32) if n >= x) for x in longest
    ]
    order = batch_ids(100, 8, seed=3)
    plain = np.concatenate([next(order) for _ in range(WINDOW)])
    ids = np.concatenate([batch["id"] for batch in whole[:WINDOW]])
    if grouped:
        assert sorted(ids) == sorted(plain)
        waste = [1 - batch["attention_mask"].mean() for batch in whole[:WINDOW]]
        even = [1 - b["attention_mask"].mean() for b in
                (next(x) for x in [text_batches(tokens, split.labels, 8,
                                                 **options | {"group_by_length": False})] * WINDOW)]
        assert np.mean(waste) < 0.8 * np.mean(even)
        lengths = [b["input_ids"].shape[1] for b in whole[:WINDOW]]
        assert lengths != sorted(lengths)  # short and long in turns, not by length
    else:
        np.testing.assert_array_equal(ids, plain)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_sees_each_example_once(tokenizer, split, processes):
    tokens = tokenise(split.texts, tokenizer, 40)
    shares = [
        list(eval_text_batches(tokens, split.labels, 16, pad_id=0, max_length=40, process_index=i,
                          process_count=processes))
        for i in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    seen = [i for share in shares for b in share for i in b["id"][b["mask"]]]
    assert sorted(seen) == list(range(100))
    for step in range(len(shares[0])):
        assert len({share[step]["input_ids"].shape for share in shares}) == 1
    check(shares[0][0], tokens, split.labels, 0)
    check(shares[-1][-1], tokens, split.labels, 0)
    assert {b["input_ids"].shape[1] for b in shares[0]} == {32, 40}


def test_one_length_pads_all_to_it(tokenizer, split):
    tokens = tokenise(split.texts, tokenizer, 40)
    options = {"pad_id": 0, "max_length": 40, "one_length": True}
    batches = [*eval_text_batches(tokens, split.labels, 16, **options)]
    found = text_batches(tokens, split.labels, 8, seed=3, **options)
    batches += [next(found) for _ in range(20)]
    assert {batch["input_ids"].shape[1] for batch in batches} == {40}
    check(batches[0], tokens, split.labels, 0)
    check(batches[-1], tokens, split.labels, 0)


def test_folders_without_a_tokenizer(tmp_path, tokenizer):
    folder = write_model(tmp_path / "m")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"m has no tokenizer; copy its files \(tokenizer.json"):
        load_tokenizer(folder)


def test_padding_beyond_the_table():
    class Tokenizer:
        pad_token, pad_token_id = "[PAD]", 7

    class Config:
        vocab_size, type_vocab_size = 7, 0

    tokens = Tokens(np.array([1, 2]), np.array([0, 9]), np.array([0, 2]))
    with pytest.raises(UserError, match=r"padding '\[PAD\]' has number 7, .* vocab_size is 7"):
        check_tables(tokens, Tokenizer, Config, str)
    Tokenizer.pad_token_id = 0
    check_tables(tokens, Tokenizer, Config, str)  # no table of token types: they are not looked up
