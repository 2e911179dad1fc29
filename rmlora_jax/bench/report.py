"""What the command leaves: tables on the terminal, JSON, Markdown and pictures in a folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from rmlora_jax.bench import picture, profile, table
from rmlora_jax.bench.options import Options
from rmlora_jax.errors import UserError
from rmlora_jax.files import write_bytes_atomic, write_text_atomic
from rmlora_jax.train.terminal import format_table


def check_folder(out: str) -> None:
    """Raises a UserError where the results could not be written, before anything is timed."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror}; type another folder") from None


def header(options: Options) -> str:
    """The table that the command begins with."""
    devices = jax.devices()
    others = f", the first of {len(devices)}" if len(devices) > 1 else ""
    dtypes = options.dtype
    if options.base_dtype != options.dtype:
        dtypes += f", base in {options.base_dtype}"
    swept = ", ".join(map(str, options.values))
    return format_table("rmlora_jax.bench", [
        ("device", devices[0].device_kind + others),
        ("model", options.model),
        ("batch", options.batch),
        ("rank", f"{options.rank}, on {options.modules}"),
        ("dtype", dtypes),
        ("layers", f"unroll {options.unroll}, remat {options.remat}"),
        (options.sweep or "sweep", swept or None),
        ("variants", ", ".join(options.variants) + (", PEFT" if options.peft else "")),
        ("out", options.out),
    ])


def write(results: Mapping[str, Any], out: str) -> str:
    """Writes ``bench.json``, ``bench.md`` and ``bench.png``; returns what the terminal shows."""
    rows = table.table_rows(results)
    figure = picture.bench_figure(results, rows)
    paths = _write(out, "bench", results, table.markdown(results) + _kernels(results), figure)
    parts = [table.text_table(table.cells(rows)), table.footer(results), *paths]
    return "\n".join(["", *(part for part in parts if part)])


def _kernels(results: Mapping[str, Any]) -> str:
    """What ``--profile`` found, a table for each row."""
    traced = [p for p in results["programs"] if p.get("profile")]
    return "".join(f"\n{p['name']}:\n\n{profile.text(p['profile'])}\n" for p in traced)


def write_sweep(found: Mapping[str, Any], out: str) -> str:
    """The same of a sweep: ``bench_sweep.json``, ``bench_sweep.md`` and ``bench_sweep.png``."""
    rows = [table.table_rows(results) for results in found["benches"]]
    head, *body = table.cells([row for own in rows for row in own])
    values = [v for v, own in zip(found["values"], rows, strict=True) for _ in own]
    lines = [(found["sweep"], *head)]
    lines += [(str(value), *line) for value, line in zip(values, body, strict=True)]
    about = f"{table.what(found['benches'][0])}, on {found['benches'][0]['device']}"
    markdown = f"{about}\n\n{table.markdown_table(lines, names=2)}\n"
    figure = picture.sweep_figure(found)
    parts = [table.text_table(lines, names=2), *_write(out, "bench_sweep", found, markdown, figure)]
    return "\n".join(["", *parts])


def read(path: str | os.PathLike) -> dict[str, Any]:
    """What ``bench.json`` or ``bench_sweep.json`` holds."""
    return json.loads(Path(path).read_text())


def _write(out: str, name: str, results, markdown: str, figure) -> list[str]:
    folder = Path(out)
    paths = [
        write_text_atomic(folder / f"{name}.json", json.dumps(results, indent=1) + "\n"),
        write_text_atomic(folder / f"{name}.md", markdown),
        write_bytes_atomic(folder / f"{name}.png", picture.png(figure)),
    ]
    return list(map(str, paths))
