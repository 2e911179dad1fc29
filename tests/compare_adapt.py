"""How rmlora_jax, Qwix, flax.nnx.LoRA and plain merging do on every row of what ``adapt`` promises.

    python tests/compare_adapt.py                         # prints the table
    python tests/compare_adapt.py --write                 # and writes it into the README
    python tests/compare_adapt.py --only "Dense" --long   # some rows, whole error messages

Every verdict comes from running the row on the installed packages. Each library runs in processes
of its own, so that a row that crashes or hangs costs its own verdict only.
"""

import argparse
import importlib.metadata
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fake_devices import xla_flags

ROOT = Path(__file__).parent.parent
README = ROOT / "rmlora_jax" / "adapt" / "README.md"
COMMAND = "python tests/compare_adapt.py --write"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
COLUMNS = {
    ("ours", "linen"): "rmlora_jax Linen",
    ("ours", "nnx"): "rmlora_jax NNX",
    ("qwix", "linen"): "Qwix Linen",
    ("qwix", "nnx"): "Qwix NNX",
    ("flax", "nnx"): "flax.nnx.LoRA NNX",
    ("hand", "linen"): "merged by hand Linen",
    ("hand", "nnx"): "merged by hand NNX",
}
SECONDS_PER_ROW = 90
REASON_LENGTH = 70


def verdict(row, library, framework: str, length: int = REASON_LENGTH) -> str:
    """``yes``, or ``no:`` and the reason."""
    from compare.checks import Failed
    from compare.libraries import NotOffered

    try:
        row.check(row.case, library, framework)
    except NotOffered:
        return "no: not offered"
    except Failed as error:
        return f"no: {_first_words(str(error), length)}"
    except Exception as error:
        if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
            return "no: not offered"
        return f"no: {type(error).__name__}: {_first_words(str(error), length)}"
    return "yes"


def _first_words(text: str, length: int) -> str:
    text = " ".join(re.sub(r"0x[0-9a-f]+|\bid=\d+", "…", text).split())
    if len(text) <= length:
        return text
    return text[:length].rsplit(" ", 1)[0] + " …"


def work(library: str, framework: str, names: list[str], length: int):
    """The worker's side: one JSON line a row."""
    from compare.libraries import LIBRARIES
    from compare.rows import all_rows

    by_name = {row.name: row for row in all_rows()}
    for name in names:
        found = verdict(by_name[name], LIBRARIES[library], framework, length)
        print(json.dumps([name, found]), flush=True)


def run_column(library: str, framework: str, names: list[str], length: int) -> dict[str, str]:
    """Verdicts of one column, from as many processes as it takes."""
    verdicts, left = {}, list(names)
    while left:
        command = [sys.executable, __file__, "--worker", library, framework, str(length)]
        process = subprocess.Popen(
            [*command, json.dumps(left)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        lines = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        while left:
            try:
                line = lines.get(timeout=SECONDS_PER_ROW)
            except queue.Empty:
                verdicts[left.pop(0)] = f"no: does not end within {SECONDS_PER_ROW} s"
                break
            if line is None:
                verdicts[left.pop(0)] = f"no: the process ends with {process.wait()}"
                break
            name, found = json.loads(line)
            left.remove(name)
            verdicts[name] = found
        process.kill()
        reader.join()
        process.communicate()
    return verdicts


def _read(stream, lines):
    for line in stream:
        if line.startswith("["):
            lines.put(line)
    lines.put(None)


ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir(), f"compare_adapt_{os.getuid()}")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": xla_flags(4),
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
}


def run(only: str = "", length: int = REASON_LENGTH, columns=COLUMNS, processes: int = 2):
    """{(row name, library, framework): verdict} of the rows whose name ``only`` matches."""
    from compare.rows import all_rows

    rows = [row for row in all_rows() if re.search(only, row.name)]
    found = {}
    with ThreadPoolExecutor(processes) as pool:
        jobs = {
            (library, framework): pool.submit(
                run_column,
                library,
                framework,
                [row.name for row in rows if framework in row.frameworks],
                length,
            )
            for library, framework in columns
        }
        for (library, framework), job in jobs.items():
            for name, said in job.result().items():
                found[name, library, framework] = said
    return found


def table(verdicts) -> str:
    """The verdicts in Markdown, with what they were found with."""
    from compare.rows import all_rows

    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "flax", "qwix"))
    lines = [f"Made by `{COMMAND}` with {versions}.", ""]
    lines += ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    section = None
    for row in all_rows():
        if not any((row.name, *column) in verdicts for column in COLUMNS):
            continue
        if row.section != section:
            section = row.section
            lines.append(f"| **{section}** |" + " |" * len(COLUMNS))
        cells = [verdicts.get((row.name, *column), "") for column in COLUMNS]
        lines.append("| " + " | ".join([row.name, *(_cell(cell) for cell in cells)]) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def with_table(text: str, made: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {README.relative_to(ROOT)}")
    parser.add_argument("--only", default="", help="a regular expression on the rows' names")
    parser.add_argument("--library", help="one of ours, qwix, flax, hand")
    parser.add_argument("--long", action="store_true", help="whole error messages")
    args = parser.parse_args()
    if args.write and (args.only or args.library or args.long):
        parser.error("--write writes the whole table: leave out --only, --library and --long")
    began = time.perf_counter()
    columns = [c for c in COLUMNS if args.library in (None, c[0])]
    verdicts = run(args.only, 2000 if args.long else REASON_LENGTH, columns)
    if args.long:
        for key, said in verdicts.items():
            print(*key, said, sep=" | ")
    else:
        print(table(verdicts))
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    if args.write:
        README.write_text(with_table(README.read_text(), table(verdicts)))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    if "--worker" in sys.argv:
        library, framework, length, names = sys.argv[2:]
        work(library, framework, json.loads(names), int(length))
    else:
        main()
