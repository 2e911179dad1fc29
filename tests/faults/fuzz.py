"""Damages files at random and reads them: ``python tests/faults/fuzz.py READER --inputs=10000``.

    one child process -> inputs numbered from the seed -> read, refused, or a fault
                      -> it died or fell silent: that input is the fault, and a new child goes on

READER is one of readers.py, or several with commas, or ``all``. A fault is: another exception than
UserError, a message that does not name the file or is no plain text, more time or memory than
allowed, something run, fetched, written or read outside of the folder, a crash, a hang. The inputs
of faults are kept under ``--keep``; ``--first=N --inputs=1`` repeats input N.
"""

import argparse
import collections
import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mutate import mutated, pick
from readers import ALONE, READERS

SECONDS = 10  # of a processor that reading one input may take
SILENCE = 120  # seconds after which a child that waits, or could not be interrupted, is killed
MEMORY = 96 << 20  # bytes that reading may take at its peak, and beyond them
MEMORY_A_BYTE = 64  # so many for each of the file
ADDRESSES = 8 << 30  # bytes of address space beyond what the libraries took
LONGEST = 3000  # letters of a message

# What no reader of a file has a reason to do: events of Python's own audit.
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen",
             "pty.spawn", "pickle.find_class", "socket.connect", "socket.getaddrinfo",
             "urllib.Request", "ctypes.dlopen", "os.remove", "os.rename", "shutil.rmtree")


class Fault(BaseException):
    """What a reader must not do; no ``except Exception`` takes it."""


class Watch:
    """Raises at forbidden events while ``folder`` is set."""

    def __init__(self):
        self.folder, self.seen = None, None
        libraries = {sys.prefix, sys.base_prefix, str(Path(__file__).parents[2])}
        self.own = (*libraries, "/proc", "/dev", "/sys", "/usr/share/zoneinfo", "/usr/lib")
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.folder is None:
            return
        if event in FORBIDDEN:
            self.fault(f"{event} {arguments!r}"[:300])
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, _, flags = arguments
            path = os.path.realpath(os.fsdecode(path))
            inside = path.startswith(self.folder)
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            # The folder itself is opened for a file without a name, which is gone when closed.
            if writes and path not in ("/dev/null", self.folder):
                self.fault(f"writes {path}")
            elif not inside and not path.startswith(self.own):
                self.fault(f"opens {path}")

    def fault(self, words):
        self.seen = words
        raise Fault(words)


def interrupted(*_):
    raise Fault(f"more than {SECONDS} s")


def status(name: str) -> int:
    """A figure of this process in bytes: VmRSS, VmHWM (its peak), VmSize."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise KeyError(name)


def child(names: list[str], first: int, inputs: int, start: int, seed: int, keep: Path) -> None:
    """Reads so many inputs of each reader, from ``first`` on, of the first of them from ``start``
    on; a line of JSON for each."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries speak
    signal.signal(signal.SIGPROF, interrupted)
    watch = Watch()
    for name in names:
        several(name, range(start, first + inputs), seed, keep, watch, out)
        start = first


def several(name: str, numbers: range, seed: int, keep: Path, watch: Watch, out) -> None:
    """Reads these inputs of one reader."""
    reader, hard = READERS[name], resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    with tempfile.TemporaryDirectory() as root:
        whole, place = Path(root).resolve() / "whole", Path(root).resolve() / "place"
        whole.mkdir()
        reader.make(whole)
        (Path(root) / "secret").write_text("not to be read")
        files = sorted({p for pattern in reader.files for p in whole.glob(pattern) if p.is_file()})
        shutil.copytree(whole, place)
        fill.last = None
        for path in files if name in ALONE else files[:1]:  # imports, caches, compilation
            fill(whole, place, path, path.read_bytes(), name in ALONE)
            error = attempt(reader, place)
            if path.name != "evil.bin" and error is not None and name != "bin":
                raise SystemExit(f"{name}: {path.name} is refused as it is: {error}")
        warnings.simplefilter("ignore")
        limit = status("VmSize") + ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        for number in numbers:
            rng = np.random.default_rng([seed, number])
            path, other = pick(rng, files), pick(rng, files)
            data = mutated(path.read_bytes(), other.read_bytes(), rng)
            file = fill(whole, place, path, data, name in ALONE)
            kept = keep / f"{name}-{seed}-{number}-{path.name}"
            kept.write_bytes(data)  # before it is read, so that a crash leaves it
            print(json.dumps({"reader": name, "begin": number}), file=out)
            row = one(reader, place, file, len(data), watch)
            if "fault" not in row:
                kept.unlink()
            print(json.dumps({"reader": name, "number": number, **row}), file=out)


def fill(whole: Path, place: Path, path: Path, data: bytes, alone: bool) -> Path:
    """``place`` with this content of one file, and the others whole (``alone``: without them)."""
    if alone:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    elif (old := fill.last) not in (None, path):
        shutil.copyfile(whole / old.relative_to(whole), place / old.relative_to(whole))
    fill.last = path
    file = place / path.relative_to(whole)
    file.write_bytes(data)
    return file


def attempt(reader, place: Path):
    """The UserError that reading ends with, or None."""
    from rmlora_jax.errors import UserError

    try:
        reader.read(place)
    except UserError as error:
        return error
    return None


def one(reader, place: Path, file: Path, size: int, watch: Watch) -> dict:
    """Reads one input: how it ended, how long it took, how much memory at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident, began = status("VmRSS"), time.process_time()
    watch.folder, watch.seen = str(place), None
    # Of the processor's time, which a busy machine does not use up; again, where it is swallowed.
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 1)
    row, error, other = {}, None, None
    try:
        error = attempt(reader, place)
    except BaseException as raised:  # whatever is not for the person who gave the file
        other = raised
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        watch.folder = None
    row["seconds"] = time.process_time() - began
    if other is not None:
        last = traceback.extract_tb(other.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        row["fault"] = f"{type(other).__name__} {str(other)[:300]!r} at {where}"
    else:
        row["end"] = "read" if error is None else "refused"
        words = str(error or "")
        if error and file.name not in words and str(file.parent) not in words:
            row["fault"] = f"the message does not name the file: {words[:300]}"
        elif len(words) > LONGEST:
            row["fault"] = f"a message of {len(words)} letters"
    row["memory"] = max(status("VmHWM") - resident, 0)
    if watch.seen:
        row["fault"] = watch.seen
    elif (place.parent / "ran").exists() or (place / "ran").exists():
        row["fault"] = "something was run"
    elif row["memory"] > MEMORY + MEMORY_A_BYTE * size:
        row["fault"] = f"{row['memory'] >> 20} MiB for a file of {size} bytes"
    return row


def fuzz(
    names: list[str], inputs: int, *, first: int = 0, seed: int = 0, keep: Path | None = None
) -> Iterator[dict]:
    """The figures of each reader; "faults" is a list of (number of the input, words)."""
    keep = keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    keep.mkdir(parents=True, exist_ok=True)
    rows, left, start, began = [], list(names), first, time.monotonic()
    while left:
        for row in run_child(left, first, inputs, start, seed, keep):
            rows.append(row)
            start = row["number"] + 1
            if start == first + inputs:
                yield figures(row["reader"], rows, time.monotonic() - began) | {"seed": seed}
                rows, left, start, began = [], left[1:], first, time.monotonic()


def run_child(names, first, inputs, start, seed, keep) -> Iterator[dict]:
    """The rows of one child; where it dies, the last is of the input at which it did."""
    words = [sys.executable, "-u", __file__, ",".join(names), "--child", f"--inputs={inputs}",
             f"--first={first}", f"--start={start}", f"--seed={seed}", f"--keep={keep}"]
    begun = None
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors)
        try:
            # Between two inputs a reader may be prepared, which takes longer than any input.
            while select.select([process.stdout], [], [], SILENCE if begun else 600)[0]:
                line = process.stdout.readline()
                if not line:
                    break
                row = json.loads(line)
                begun = row if "begin" in row else None
                if begun is None:
                    yield row
            else:
                process.kill()
            code = process.wait()
        finally:
            process.kill()
            process.stdout.close()
        if code == 0:
            return
        errors.seek(0)
        tail = errors.read().decode("utf-8", "replace").strip()[-1500:]
    if begun is None:
        raise RuntimeError(f"a child of {', '.join(names)} ended with {code}: {tail}")
    yield {"reader": begun["reader"], "number": begun["begin"], "seconds": 0.0, "memory": 0,
           "fault": f"died with {code}: {tail}"}


def figures(name: str, rows: list[dict], seconds: float) -> dict:
    ends = collections.Counter(row.get("end", "ended otherwise") for row in rows)
    return {"reader": name, "inputs": len(rows), **ends,
            "faults": [(row["number"], row["fault"]) for row in rows if "fault" in row],
            "slowest_seconds": round(max(row["seconds"] for row in rows), 3),
            "peak_MiB": round(max(row["memory"] for row in rows) / 2**20, 1),
            "minutes": round(seconds / 60, 2)}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reader", help=f"{', '.join(READERS)}, or all")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    names = list(READERS) if a.reader == "all" else a.reader.split(",")
    if a.child:
        child(names, a.first, a.inputs, a.start, a.seed, a.keep)
        return 0
    failed = 0
    for found in fuzz(names, a.inputs, first=a.first, seed=a.seed, keep=a.keep):
        failed += bool(found["faults"])
        print(json.dumps(found | {"faults": len(found["faults"])}), flush=True)
        for number, words in found["faults"][:20]:
            print(f"  input {number}: {words}", flush=True)
    return failed


if __name__ == "__main__":
    faulthandler.enable()
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    sys.exit(main())
