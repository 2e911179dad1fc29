"""Rows of chats in every kind of file, what an error names, and what becomes of long examples."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from test_data_tfds import make

from rmlora_jax.data import (
    Request,
    cache_file,
    chat_reader,
    content_of,
    encode_chats,
    load_chats,
    missing,
    open_chats,
)
from rmlora_jax.data.chat import chats_of
from rmlora_jax.data.chat_examples import ROLES, Names, example_of
from rmlora_jax.data.chat_files import open_rows
from rmlora_jax.data.chat_tokens import Counts, fit
from rmlora_jax.data.dataset import BadRecord, Skipped
from rmlora_jax.errors import UserError

ROWS = [{"q": f"{i} + 1 is what? ü", "a": f"It is {i + 1}.", "id": i} for i in range(20)]
NAMES = {"prompt": "q", "completion": "a"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def lines(path, rows, end="\n"):
    path.write_bytes("".join(json.dumps(row) + end for row in rows).encode())
    return path


def encode(example):
    """A token a letter; the completion, the assistant's words or a whole text are targets."""
    if "text" in example:
        parts = [(example["text"], True)]
    elif "prompt" in example:
        parts = [(example["prompt"], False), (example["completion"], True)]
    else:
        parts = [(one["content"], one["role"] == "assistant") for one in example["messages"]]
    ids = [ord(letter) for text, _ in parts for letter in text]
    wanted = [target for text, target in parts for _ in text]
    return np.array(ids, np.int32), np.array(wanted, bool)


# Files


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return datasets


def test_each_kind_of_file(tmp_path, own_cache):
    (whole := tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1))
    own_cache.Dataset.from_list(ROWS).to_parquet(parquet := str(tmp_path / "c.parquet"))
    (zipped := tmp_path / "d.jsonl.gz").write_bytes(
        gzip.compress(lines(tmp_path / "d.jsonl", ROWS).read_bytes())
    )
    (zipped_whole := tmp_path / "e.json.gz").write_bytes(gzip.compress(whole.read_bytes()))
    crlf = lines(tmp_path / "f.jsonl", ROWS, "\r\n")
    (marked := tmp_path / "g.json").write_bytes(  # JSON lines under the name of JSON
        b"\xef\xbb\xbf" + lines(tmp_path / "x.jsonl", ROWS).read_bytes().rstrip()
    )
    files = [lines(tmp_path / "a.jsonl", ROWS), whole, parquet, zipped, zipped_whole, crlf, marked]
    for file in files:
        rows = open_rows(file)
        assert [rows[i] for i in range(len(rows))] == ROWS, file
    train = load_chats(*map(str, files), names=NAMES, validation=3, apart=False).train
    assert len(train) == 7 * 20 - 3


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\n  \n", "\n{}", " \t\r\n \n\n"])
def test_blank_lines_are_left_out(tmp_path, end):
    path = tmp_path / "a.jsonl"
    text = lines(tmp_path / "b.jsonl", ROWS).read_bytes()[:-1]
    path.write_bytes(b"\r\n  \n" + text + end.encode())
    rows = open_rows(path)
    assert [rows[i] for i in range(len(rows))] == ROWS + [{}] * end.endswith("{}")


def test_rows_are_read_by_number_from_any_thread(tmp_path):
    big = [{"q": f"{i} " + "x" * (i % 300), "a": "b"} for i in range(3000)]
    path = tmp_path / "a.jsonl"
    text = "\n\n" + "".join(json.dumps(row) + "\n" * (1 + i % 2) for i, row in enumerate(big))
    path.write_text(text)
    rows = open_rows(path)
    assert len(rows) == 3000
    numbered = {n: line for n, line in enumerate(text.split("\n"), 1) if line}
    for i, n in enumerate(numbered):
        assert rows.where(i) == f"{path}, line {n}"
    wrong: list[int] = []

    def look(seed):
        for i in random.Random(seed).choices(range(3000), k=1000):
            if rows[i] != big[i]:
                wrong.append(i)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_blocks_of_a_file_do_not_show(tmp_path, monkeypatch):
    path = lines(tmp_path / "a.jsonl", ROWS)
    monkeypatch.setattr("rmlora_jax.data.chat_files.BLOCK", 7)
    assert [open_rows(path)[i] for i in range(20)] == ROWS
    (short := tmp_path / "b.jsonl").write_bytes(b"{}\n{}")
    assert len(open_rows(short)) == 2


def test_files_that_cannot_be_read(tmp_path):
    def says(why, name, content=b"{}"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=why):
            open_rows(tmp_path / name)

    says("files of chats end in .jsonl", "a.csv")
    says("has no rows", "a.jsonl", b"\n \n"[:1])
    says("has no rows", "a.json", b"[]")
    says(r"a.json: not JSON", "a.json", b"[1, 2")
    says("cannot read .*a.jsonl.gz: ", "a.jsonl.gz", b"not gzip")
    says("cannot read .*a.jsonl.gz: ", "a.jsonl.gz", gzip.compress(b"{}" * 999)[:20])
    with pytest.raises(UserError, match=r"there is no such file; did you mean a\.jsonl\?"):
        open_rows(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match=r"a\.json, row 1: a int, not an object"):
        load_chats(str(lines(tmp_path / "a.json", [[1, 2]])))


def test_files_are_known_by_what_they_hold(tmp_path, own_cache):
    def known(name, rows):
        path = tmp_path / name
        if name.endswith(".parquet"):
            own_cache.Dataset.from_list(rows).to_parquet(str(path))
        else:
            path.write_text(json.dumps(rows) if name.endswith(".json") else
                            "".join(f"{json.dumps(row)}\n" for row in rows))
        return chats_of([open_rows(path)], Names()).identity()

    other = [*ROWS[:-1], {"q": "9?", "a": ROWS[-1]["a"]}]
    for kind in (".jsonl", ".json", ".parquet"):
        same = known(f"a{kind}", ROWS), known(f"b{kind}", ROWS)
        assert same[0] == same[1] != known(f"a{kind}", other), kind
    rows = chats_of([open_rows(tmp_path / "b.jsonl")], Names())
    assert rows.at([1, 0]).identity() != rows.at([0, 1]).identity()
    assert chats_of(rows.sources, Names(text="q")).identity() != rows.identity()


MEMORY = """
import sys, threading, time
import datasets, pyarrow.dataset, pyarrow.parquet
from rmlora_jax.data.chat_files import open_rows

def own():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

def watch():
    while True:
        seen.append(own())
        time.sleep(0.002)

datasets.config.HF_DATASETS_CACHE = sys.argv[2]
before, seen = own(), [0]
threading.Thread(target=watch, daemon=True).start()
rows = open_rows(sys.argv[1])
assert all(len(rows[i]["a"]) == 1000 for i in range(0, len(rows), 997))
print(max(*seen, own()) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_parquet_file_is_never_whole_in_memory(tmp_path, own_cache):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    file, drawn = tmp_path / "a.parquet", random.Random(0)
    one = {"q": arrow.string(), "a": arrow.string()}
    with parquet.ParquetWriter(file, arrow.schema(one), compression="none") as writer:
        for _ in range(300):
            texts = [drawn.randbytes(500).hex() for _ in range(1000)]
            writer.write_table(arrow.table({"q": ["?"] * 1000, "a": texts}))
    size = file.stat().st_size / 2**10
    done = subprocess.run([sys.executable, "-c", MEMORY, str(file), str(tmp_path / "cache")],
                          capture_output=True, text=True, check=True,
                          # Its other pools keep what is free.
                          env=os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"})
    assert size > 250_000 and int(done.stdout) < 0.5 * size


def test_a_damaged_parquet_file(tmp_path, own_cache):
    own_cache.Dataset.from_list(ROWS).to_parquet(str(file := tmp_path / "c.parquet"))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match=r"c\.parquet cannot be read"):
        open_rows(file)


def test_parquet_keeps_conversations_and_drops_the_keys_of_other_rows(tmp_path, own_cache):
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": "x"},
                      {"role": "assistant", "content": "b", "name": None}],
         "tools": json.dumps(TOOLS)},
        {"messages": [{"role": "user", "content": "c", "name": None},
                      {"role": "assistant", "content": "d", "name": None}],
         "tools": None},
    ]  # fmt: skip
    own_cache.Dataset.from_list(rows).to_parquet(file := str(tmp_path / "c.parquet"))
    data = load_chats(file, validation=1)
    examples = {len(one["messages"][0]): one for one in (data.train[0], data.validation[0])}
    assert examples[3]["tools"] == TOOLS and examples[3]["messages"][0]["name"] == "x"
    assert examples[2] == {"messages": [{"role": "user", "content": "c"},
                                        {"role": "assistant", "content": "d"}]}


def test_tfds(tmp_path):
    import tensorflow_datasets as tfds

    features = {"q": tfds.features.Text(), "a": tfds.features.Text(), "n": np.int64}
    rows = [{"q": row["q"], "a": row["a"], "n": row["id"]} for row in ROWS]
    make(tmp_path, "sums", features, {"train": rows, "test": rows[:4]})
    request = Request("sums", tmp_path, names=NAMES, validation=5, test_splits={"test": "test"})
    assert not missing("chats", request)
    data = open_chats(request)
    assert (len(data.train), len(data.validation), len(data.tests["test"])) == (15, 5, 4)
    assert data.tests["test"][2] == {"prompt": ROWS[2]["q"], "completion": ROWS[2]["a"]}
    chat = {"chat": tfds.features.Sequence({"role": tfds.features.Text(),
                                            "content": tfds.features.Text()})}  # fmt: skip
    talk = {"chat": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}]}
    make(tmp_path, "talks", chat, {"train": [talk] * 3})
    data = open_chats(Request("talks", tmp_path, names={"messages": "chat"}, apart=False))
    assert data.train[0] == {"messages": talk["chat"]}
    with pytest.raises(UserError, match=r"talks.*record 0 of 'train': no 'q'; it has 'chat'"):
        open_chats(Request("talks", tmp_path, names=NAMES))


# From a row to an example


def test_forms_of_a_row():
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    usual = Names()
    assert example_of({"messages": talk, "x": 1}, usual, "") == {"messages": talk}
    assert example_of({"text": " a "}, usual, "") == {"text": " a "}
    assert example_of({"prompt": "a", "completion": "b"}, usual, "") == {
        "prompt": "a", "completion": "b"}  # fmt: skip
    assert example_of({"prompt": talk[:1], "completion": talk[1:]}, usual, "") == {
        "messages": talk, "given": 1}  # fmt: skip
    older = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert example_of({"conversations": older}, usual, "") == {"messages": talk}
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"},
                                          {"type": "text", "text": "b"}]}]
    assert example_of({"messages": parts}, usual, "")["messages"][0]["content"] == "ab"
    alpaca = Names(prompt=("instruction", "input"), completion="output")
    row = {"instruction": "a", "input": "b", "output": "c"}
    assert example_of(row, alpaca, "")["prompt"] == "a\n\nb"
    assert example_of({**row, "input": ""}, alpaca, "")["prompt"] == "a"
    assert example_of({**row, "input": None}, alpaca, "")["prompt"] == "a"
    # A named column comes before the usual ones.
    assert example_of({"messages": talk, "q": "a"}, Names(text="q"), "") == {"text": "a"}
    # Tools: arguments become objects, calls need no words beside them.
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": [1]}'}}
    chat = [talk[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    found = example_of({"messages": chat, "tools": TOOLS}, usual, "")
    assert found["tools"] == TOOLS
    assert found["messages"][1]["content"] == ""
    assert found["messages"][1]["tool_calls"] == [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": [1]}}}
    ]
    assert call["function"]["arguments"] == '{"a": [1]}'  # the row stays as it was


@pytest.mark.parametrize(
    ("row", "names", "why"),
    [
        ({"x": 1}, {}, "no 'messages', 'prompt' with 'completion', or 'text'; it has 'x'\nName"),
        ({"x": 1}, NAMES, "no 'q'; it has 'x'\nName"),
        ({"q": 1, "a": "b"}, NAMES, "'q' is a number, not a text"),
        ({"q": ["b"], "a": "b"}, NAMES, "'q', message 1 is a str, not an object"),
        ({"q": "b", "a": ["b"]}, NAMES, "'a' is a list, not a text"),
        ({"q": "b", "a": None}, NAMES, "'a' is empty; fill it in"),
        ({"q": " ", "a": "b"}, NAMES, "'q' is empty; fill it in"),
        ({"messages": []}, {}, "'messages' is an empty conversation"),
        ({"messages": None}, {}, "'messages' is empty, not a list of messages"),
        ({"messages": {"role": "user"}}, {}, "'messages' is an object, not a list"),
        ({"messages": ["a"]}, {}, "message 1 is a str, not an object"),
        ({"messages": [{"content": "a"}]}, {}, "message 1 has no role; roles are system,"),
        ({"messages": [{"role": "usr", "content": "a"}]}, {}, "role 'usr';.*did you mean user"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, {}, "has the role"),
        ({"messages": [{"role": "user", "content": 5}]}, {}, "its content is a number, not a text"),
        ({"messages": [{"role": "user"}]}, {}, "message 1: its content is missing, not a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "a list with image"),
        ({"messages": [{"role": "assistant", "tool_calls": "a"}]}, {}, "tool_calls are a str"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, {}, "a call has no name"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": "a"}, {}, "'tools' is a str"),
        ({"text": "\ud800"}, {}, "not UTF-8"),
    ],
)
def test_what_an_error_names(row, names, why):
    with pytest.raises(BadRecord, match=f"^a.jsonl, line 7: (.*){why}") as error:
        example_of(row, Names(**names), "a.jsonl, line 7")
    assert str(error.value).count("\n") <= 1 and len(str(error.value)) < 500


def test_names_make_one_form():
    for names, why in (
        ({"messages": "a", "text": "b"}, "one of these forms"),
        ({"prompt": "a"}, "config.sft.completion='': name that column"),
        ({"completion": "a"}, "config.sft.prompt='': name that column"),
    ):
        assert why in missing("chats", Request("x", files=("a.jsonl",), names=names))[0]
        with pytest.raises(UserError, match=why):
            load_chats("a.jsonl", names=names)


def test_fuzzed_rows_are_examples_or_bad_records():
    draw = random.Random(0)
    keys = ["messages", "role", "content", "prompt", "completion", "text", "tools", "tool_calls",
            "function", "name", "arguments", "type", "from", "value", "conversations"]  # fmt: skip
    words = [*ROLES, "", " ", "a", "text", "human", "[1]", '{"a": 1}', "\ud800", "\x00"]

    def value(depth=0):
        kind = draw.randrange(9 if depth < 5 else 5)
        if kind < 2:
            return draw.choice(words)
        if kind < 5:
            return draw.choice([None, 0, -1.5, True, float("nan"), 10**30])
        if kind < 7:
            return [value(depth + 1) for _ in range(draw.randrange(4))]
        return {draw.choice(keys): value(depth + 1) for _ in range(draw.randrange(5))}

    good = 0
    for _ in range(20_000):
        row = {draw.choice(keys): value() for _ in range(draw.randrange(1, 6))}
        try:
            example = example_of(row, Names(), "line 1")
        except BadRecord as error:
            assert str(error).startswith("line 1: ")
            continue
        good += 1
        assert set(example) <= {"messages", "tools", "given", "prompt", "completion", "text"}
        for message in example.get("messages", []):
            assert message["role"] in ROLES and isinstance(message["content"], str)
    assert good > 100


def test_fuzzed_lines_are_rows_or_bad_records(tmp_path):
    draw = random.Random(1)
    pieces = [b'{"text": "a"}', b"{", b"}", b'"', b"\n", b"\r\n", b"\xff", b" ", b"[" * 2000,
              b'{"text": "\\ud800"}', b"null", b'{"a": 1, "a": 2}', b"\x00", b"\xef\xbb\xbf"]
    for _ in range(100):
        (path := tmp_path / "a.jsonl").write_bytes(b"".join(draw.choices(pieces, k=12)) + b"{}\n\n")
        rows = open_rows(path)
        for i in range(len(rows)):
            try:
                example_of(rows[i], Names(), rows.where(i))
            except BadRecord as error:
                assert str(error).startswith(f"{path}, line ")


# Splits


def test_held_out_by_content(tmp_path):
    # Each question twice, under other numbers.
    path = lines(tmp_path / "a.jsonl", [row | {"id": n} for n in range(2) for row in ROWS])
    data = load_chats(str(path), names=NAMES, validation=10, seed=1)
    train = {data.train[i]["prompt"] for i in range(len(data.train))}
    held = {data.validation[i]["prompt"] for i in range(len(data.validation))}
    assert (len(data.train), len(data.validation)) == (30, 10)
    assert not train & held and len(train) == 15 and len(held) == 5
    loose = load_chats(str(path), names=NAMES, validation=10, seed=1, apart=False)
    assert {loose.train[i]["prompt"] for i in range(30)} & {
        loose.validation[i]["prompt"] for i in range(10)}  # fmt: skip
    again = load_chats(str(path), names=NAMES, validation=10, seed=1)
    assert (again.validation.ids == data.validation.ids).all()
    assert len(load_chats(str(path), names=NAMES, validation=10, limit=4).train) == 4
    with pytest.raises(UserError, match=r"validation=0.*sft.validation_file"):
        load_chats(str(path), names=NAMES, validation=0)
    given = load_chats(str(path), names=NAMES, validation_file=path, test_files={"old": path})
    assert (len(given.train), len(given.validation), len(given.tests["old"])) == (40, 40, 40)
    assert given.notes[1] == "40 of 40 examples of 'old' are training examples, too"
    other = lines(tmp_path / "b.jsonl", [*ROWS[:2], {"q": "a", "a": "b"}, {"q": "c", "a": "d"}])
    mixed = load_chats(str(path), names=NAMES, validation_file=other, test_files={"new": other})
    assert mixed.notes[0] == "2 of 4 examples of 'validation' are training examples, too"
    assert not load_chats(str(path), names=NAMES).notes
    # What is held out for validation is no training example.
    data = load_chats(str(path), names=NAMES, validation=10, seed=1, test_files={"old": path})
    assert data.notes == ("30 of 40 examples of 'old' are training examples, too",)
    # A test split that is asked for and not given is held out, too.
    data = load_chats(str(path), names=NAMES, validation=10, test_splits={"test": None})
    assert [len(part) for part in (data.train, data.validation, data.tests["test"])] == [20, 10, 10]
    prompts = [{part[i]["prompt"] for i in range(len(part))}
               for part in (data.train, data.validation, data.tests["test"])]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    for field, options in (("validation_file", {}), ("test_file", {"test_splits": {"test": None}})):
        with pytest.raises(UserError, match=f"validation=0(.|\\n)*sft.{field}"):
            load_chats(str(path), names=NAMES, validation=0, **options)
    for name, field in (("test", "test_file"), ("mine", "evaluate")):
        with pytest.raises(UserError, match=f"config.sft.{field}: 'no.jsonl': there is no such"):
            load_chats(str(path), names=NAMES, test_files={name: "no.jsonl"})


def test_one_conversation_in_several_forms_is_held_out_as_one(tmp_path):
    def forms(q, a):
        asked, said = {"role": "user", "content": q}, {"content": a, "role": "assistant"}
        return [
            {"prompt": q, "completion": a},
            {"completion": a, "prompt": q},
            {"messages": [asked, said]},
            {"conversations": [{"value": q, "from": "human"}, {"from": "gpt", "value": a}]},
            {"prompt": [asked], "completion": [said]},
            {"messages": [{"content": [{"type": "text", "text": q}], "role": "user"}, said]},
        ]

    rows = [row for one in ROWS for row in forms(one["q"], one["a"])]
    random.Random(0).shuffle(rows)
    data = load_chats(str(lines(tmp_path / "a.jsonl", rows)), validation=30)

    def asked(chats):
        return {str(example.get("prompt") or example["messages"][0]["content"])
                for example in (chats[i] for i in range(len(chats)))}

    assert (len(data.train), len(data.validation)) == (90, 30)
    assert not asked(data.train) & asked(data.validation) and len(asked(data.validation)) == 5
    # Another answer, another role or a text makes another example.
    q, a = ROWS[0]["q"], ROWS[0]["a"]
    others = [{"prompt": q, "completion": q}, {"text": f"{q}\n{a}"}, {"messages": [
        {"role": "system", "content": q}, {"role": "assistant", "content": a}]}]  # fmt: skip
    other = lines(tmp_path / "b.jsonl", [*others, *forms(q, a)])
    data = load_chats(str(tmp_path / "a.jsonl"), validation=30, test_files={"new": other})
    given = 6 if asked(data.train) & {q} else 0
    assert "".join(data.notes) == (f"{given} of 9 examples of 'new' are training examples, too"
                                   if given else "")


def test_weights_of_files(tmp_path):
    files = [str(lines(tmp_path / f"{n}.jsonl", [row | {"q": f"{n} {row['q']}"} for row in ROWS]))
             for n in "abc"]
    data = load_chats(*files, names=NAMES, weights=(2, 0.75, 1), validation=6)
    kept = [sum(one.startswith(n) for one in map(data.train.where, range(len(data.train))))
            for n in map(str, (tmp_path / "a", tmp_path / "b", tmp_path / "c"))]
    rows = [sum(data.validation.where(i).startswith(str(tmp_path / n)) for i in range(6))
            for n in "abc"]
    assert kept == [2 * (20 - rows[0]), round(0.75 * (20 - rows[1])), 20 - rows[2]]
    assert len(np.unique(data.train.ids)) == kept[0] // 2 + kept[1] + kept[2]
    for weights, why in (((1, 2), "give one for each of the 3"), ((1, 0, 1), "above 0")):
        with pytest.raises(UserError, match=why):
            load_chats(*files, names=NAMES, weights=weights)
    # Each different row is encoded once.
    skipped = Skipped()
    encoded = encode_chats(data.train, chat_reader(data.train, encode, 99), skipped)
    assert len(encoded.tokens.offsets) - 1 == len(np.unique(data.train.ids))
    for place, number in enumerate(encoded.order):
        first, last = encoded.tokens.offsets[number : number + 2]
        assert encoded.tokens.ids[first:last].tolist() == encode(data.train[place])[0].tolist()


def test_bad_records(tmp_path):
    rows: list = list(ROWS)
    rows[3], rows[8] = {"q": "a"}, {"q": "a", "a": 5}
    path = str(lines(tmp_path / "a.jsonl", rows))
    with pytest.raises(UserError, match=r"a.jsonl, line 4: no 'a'; it has 'q'"):
        load_chats(path, names=NAMES)
    with pytest.raises(UserError, match=r"2 records cannot be used.*line 4.*line 9"):
        load_chats(path, names=NAMES, bad_records=1)
    data = load_chats(path, names=NAMES, bad_records=2)
    assert len(data.skipped.records) == 2 and len(data.train) + len(data.validation) == 18
    # A template's refusal counts, too.
    def refuse(example):
        if example["prompt"].startswith("5 "):
            raise UserError("the template says no")
        return encode(example)

    with pytest.raises(UserError, match="3 records"):
        encode_chats(data.train, chat_reader(data.train, refuse, 99), data.skipped)
    data = load_chats(path, names=NAMES, bad_records=3)
    found = encode_chats(data.train, chat_reader(data.train, refuse, 99), data.skipped)
    assert found.counts == Counts(len(data.train) - 1, 0, 0, 0)
    assert len(found.order) == len(data.train) - 1
    assert re.search(r"line 6: the template says no", data.skipped.records[-1])


# Tokens


def test_a_wrong_column_is_no_bad_record(tmp_path):
    path = str(lines(tmp_path / "a.jsonl", ROWS))
    wrong = {"prompt": "q", "completion": "answer"}
    for more in ({}, {"bad_records": 5}, {"bad_records": 99, "apart": False}):
        for options in ({"names": wrong}, {}, {"names": NAMES, "test_files": {
                "new": lines(tmp_path / "b.jsonl", [{"x": "a"}])}}):  # fmt: skip
            with pytest.raises(UserError) as told:
                load_chats(path, validation=2, **options, **more)
            first, *advice = str(told.value).splitlines()
            assert ", line 1: no '" in first and "; it has '" in first
            assert len(advice) == 1 and advice[0].startswith("Name the columns: --config.sft.")
    # Rows that lack a column of the others are.
    rows: list = [{"q": "a"}, {"q": "b"}, *ROWS]
    path = str(lines(tmp_path / "a.jsonl", rows))
    with pytest.raises(UserError, match=r"(?s)line 1: no .a.; it.*--config.data.bad_records"):
        load_chats(path, names=NAMES, validation=2)
    assert len(load_chats(path, names=NAMES, validation=2, bad_records=2).train) == 18


def test_what_does_not_fit(tmp_path):
    pairs = [("p" * 5, "c" * 3), ("p" * 9, "c" * 3), ("p" * 9, "c" * 12), ("p", "c")]
    path = lines(tmp_path / "a.jsonl", [{"q": q, "a": a} for q, a in pairs])
    data = load_chats(str(path), names=NAMES, validation_file=path)
    chats = data.train

    def encoded(**options):
        read = chat_reader(chats, encode, 8, **options)
        found = encode_chats(chats, read, Skipped())
        text = [
            "".join(map(chr, found.tokens.ids[a:b])) + str(found.tokens.types[a:b].sum())
            for a, b in zip(found.tokens.offsets, found.tokens.offsets[1:], strict=False)
        ]
        return text, found.counts

    assert encoded() == (["pppppccc3", "pppppccc3", "cccccccc8", "pc1"], Counts(4, 2, 1, 0))
    assert encoded(bos=ord("p")) == (
        ["pppppccc3", "pppppccc3", "pccccccc7", "pc1"], Counts(4, 2, 1, 0))  # fmt: skip
    assert encoded(too_long="skip") == (["pppppccc3", "pc1"], Counts(2, 0, 0, 2))
    with pytest.raises(UserError, match=r"a.jsonl, line 2: 12 tokens, where .*length=8\nType"):
        encoded(too_long="refuse")
    chats = chats.at([1, 2])
    with pytest.raises(UserError, match="no example is left of 2"):
        encoded(too_long="skip")


def test_a_cut_keeps_targets():
    draw = np.random.RandomState(0)
    for _ in range(300):
        n, length = draw.randint(2, 40), draw.randint(2, 20)
        tokens, wanted = np.arange(n), draw.rand(n) < 0.1
        wanted[draw.randint(1, n)] = True
        short, left = fit(tokens, wanted, length, bos=0)
        assert len(short) == len(left) <= length and left[1:].any()
        assert (wanted[short] == left).all() and (np.diff(short) > 0).all()
        if n > length:
            last = np.flatnonzero(wanted)[-1]
            assert short[0] == 0 or n - 1 == last < length or short[0] > 0
            assert short[-1] == last and (np.diff(short[1:]) == 1).all()
            assert len(short) == min(length, last + 1) and short[0] == 0


def test_no_target_tokens(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "a"}]}] * 2)
    chats = load_chats(str(path), validation_file=path).train
    why = r"a.jsonl, line 1: no target tokens: it has no message of the assistant; delete the row"
    with pytest.raises(UserError, match=why):
        encode_chats(chats, chat_reader(chats, encode, 8), Skipped())


def test_the_cache_depends_on_everything(tmp_path):
    path = lines(tmp_path / "a.jsonl", ROWS)
    chats = load_chats(str(path), names=NAMES, validation=2).train
    calls = []

    def counted(example):
        calls.append(1)
        return encode(example)

    def tokens(chats, key="k", **options):
        file = cache_file(tmp_path, chats, key, **{"length": 12, **options})
        read = chat_reader(chats, counted, **{"length": 12, **options})
        return encode_chats(chats, read, Skipped(), cache=file)

    first = tokens(chats)
    assert len(calls) == 18 and first.counts.cut == 18
    again = tokens(chats)
    assert len(calls) == 18 and again.counts == first.counts
    for a, b in zip((*first.tokens, first.order), (*again.tokens, again.order), strict=True):
        assert a.dtype == b.dtype and (a == b).all()
    tokens(chats, key="other")
    tokens(chats, length=13)
    tokens(chats, too_long="skip", length=50)
    assert len(calls) == 18 * 4
    tokens(chats.at(range(9)))
    assert len(calls) == 18 * 4 + 9
    # The place of the files and the columns that are not used do not matter; the words do.
    moved = lines(tmp_path / "b.jsonl", [row | {"id": 0} for row in ROWS])
    chats = load_chats(str(moved), names=NAMES, validation=2).train
    tokens(chats)
    assert len(calls) == 18 * 4 + 9
    assert content_of(chats) == content_of(load_chats(str(path), names=NAMES, validation=2).train)
    for file in tmp_path.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    tokens(chats)
    assert len(calls) == 18 * 5 + 9


def test_without_files_the_chats_of_the_package():
    chats = open_chats(Request("chats", test_splits={"test": None}, validation=0.1))
    assert (len(chats.train), len(chats.validation), len(chats.tests["test"])) == (180, 20, 20)
    assert "no sft.files were given: the model learns the 200 answers" in chats.notes[0]
    given = [split[i]["prompt"] for split in (chats.train, chats.validation, chats.tests["test"])
             for i in range(len(split))]
    assert len(set(given)) == 220
