"""Damaged files of every kind: read, or refused by name, in bounded time and memory."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import fuzz  # noqa: E402
import mutate  # noqa: E402
import readers  # noqa: E402

# These build or compile a model for each input, or a data set for their first.
SLOWER = ("vit", "bert", "deberta", "tfds")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent.parent))


def check(names, inputs, least, **more):
    found = list(fuzz.fuzz(names, inputs, **more))
    assert [one["reader"] for one in found] == names
    for one in found:
        assert one["faults"] == [], one
        assert one["read"] + one["refused"] == one["inputs"] == inputs
        assert min(one["read"], one["refused"]) >= least, one


def test_a_few_of_each(tmp_path):
    check([name for name in readers.READERS if name not in SLOWER], 120, 2, seed=1, keep=tmp_path)
    check(list(SLOWER), 25, 2, seed=1, keep=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(readers.READERS))
def test_a_thousand(name, tmp_path):
    check([name], 1_000, 10, seed=2, keep=tmp_path)  # the command's ten thousand take an hour


def test_inputs_are_the_same_each_time():
    data, other = json.dumps({"a": [1, {"b": "c"}], "d": None}).encode(), b"\0\1\2\3" * 20
    different = set()
    for seed in range(300):
        first, again = (
            mutate.mutated(data, other, np.random.default_rng([5, seed])) for _ in range(2)
        )
        assert first == again
        different.add(first)
    assert len(different) > 250


# What a reader must not do, and the words of the fault.
FAULTS = {
    "raises": ("raise KeyError('x')", "KeyError"),
    "names no file": ("raise UserError('it is bad')", "does not name the file"),
    "says too much": ("raise UserError('a.txt' + 5000 * ' ')", "a message of 5005 letters"),
    "runs": ("os.system('true')", "os.system"),
    "unpickles": ("pickle.loads(pickle.dumps(Ran('x')))", "pickle.find_class"),
    "fetches": ("socket.getaddrinfo('localhost', 80)", "socket.getaddrinfo"),
    "reads outside": ("(folder.parent / 'secret').read_text()", "opens "),
    "writes": ("open(folder / 'new', 'w')", "writes "),
    "takes memory": ("bytearray(150 << 20)", "MiB for a file of"),
    "takes all memory": ("bytearray(1 << 45)", "MemoryError"),
    "is slow": ("while True: pass", "more than 1 s"),
    "hangs": ("time.sleep(99)", "died with -9"),
    "crashes": ("ctypes.string_at(0)", "died with -11"),
}

EVIL = """
import ctypes, os, pickle, socket, sys, time
sys.path[:0] = [{here!r}, {root!r}]
import fuzz
from readers import READERS, Reader, Ran
from rmlora_jax.errors import UserError

def make(folder):
    (folder / "a.txt").write_text("abc" * 100)

def reader(body):
    def read(folder):
        if (folder / "a.txt").read_bytes() != b"abc" * 100:
            exec(body, globals() | dict(folder=folder))
    return Reader(make, read, ("a.txt",))

for name, (body, _) in {faults!r}.items():
    READERS[name] = reader(body)
fuzz.SECONDS = 1
sys.exit(fuzz.main())
"""


@pytest.mark.slow
def test_the_harness_finds_every_fault(tmp_path, monkeypatch):
    script = tmp_path / "evil.py"
    root = str(HERE.parent.parent)
    script.write_text(EVIL.format(here=str(HERE), root=root, faults=FAULTS))
    monkeypatch.setattr(fuzz, "__file__", str(script))
    monkeypatch.setattr(fuzz, "SILENCE", 4)
    found = list(fuzz.fuzz(list(FAULTS), 2, keep=tmp_path / "kept"))
    for one, (name, (_, words)) in zip(found, FAULTS.items(), strict=True):
        assert one["reader"] == name and len(one["faults"]) == 2, one
        assert all(words in fault for _, fault in one["faults"]), one
    assert len(list((tmp_path / "kept").iterdir())) == 2 * len(FAULTS)
