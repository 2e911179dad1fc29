"""The command ``python -m rmlora_jax.bench``, from its options to its files.

All programs are timed in turns on the first device.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rmlora_jax.bench import models, torch_peft
from rmlora_jax.bench.measure import (
    Program,
    measure,
    product_program,
    profile,
    with_memory,
)
from rmlora_jax.bench.options import Options, check_folder, parse
from rmlora_jax.bench.picture import bench_figure, sweep_figure
from rmlora_jax.bench.table import cells, footer, markdown, table_rows, what
from rmlora_jax.bench.variants import compile_variant, make_variant, step_flops
from rmlora_jax.errors import UserError, first_line, tell
from rmlora_jax.files import write_bytes_atomic, write_text_atomic
from rmlora_jax.parallel import memory
from rmlora_jax.report.records import amount
from rmlora_jax.report.style import markdown_table, png, text_table

BATCHES = 4  # that the steps of a stretch go through in a circle


def header(options: Options) -> str:
    """What will be timed, in a line."""
    known = {"options": vars(options), "tokens": models.tokens(options.entry)}
    swept = f"; {options.sweep} {', '.join(map(str, options.values))}" if options.sweep else ""
    return f"{what(known)}, on {jax.devices()[0].device_kind}{swept}"


def bench(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Times what ``options`` name.

    Returns:
      What ``bench.json`` holds, all of it plain numbers, strings and lists; ``programs`` has the
      rows, ``product`` the repeats of the large matrix product.

    Raises:
      UserError: options that do not fit together, or what ``--peft`` needs is not installed.
    """
    if options.peft:
        torch_peft.check_installed()
    entry = options.entry
    base, batches = _data(options, entry)
    rows, programs = {}, []

    def prepare(name: str, method: str, own: Options) -> None:
        program = _program(method, entry, base, batches, own)
        programs.append(program._replace(name=name))
        size = program.facts.get("memory_bytes")
        told = [f"{program.facts['compile_seconds']:.1f} s", size and amount(size)]
        say(f"  {', '.join(filter(None, [*told, program.facts['execution']]))}")

    for name in options.variants:
        say(f"compiling {name}")
        method, own = options.of(name)
        flops = step_flops(entry, options.batch, method, options.rank, options.modules)
        row = rows[name] = {"name": name, "framework": "jax", "flops": flops, "error": None}
        with_memory(row, prepare, name, method, own)
        if row["error"]:
            say(f"  {row['error']}")
    if options.peft:
        for program in torch_peft.programs(options, say):
            rows[program.name] = {"name": program.name}
            programs.append(program)
    product, product_flops = product_program(jnp.dtype(options.dtype))
    timed = [*programs, product]
    times = measure(timed, repeats=options.repeats, steps=options.steps, say=say)
    for program in programs:  # behind the turns: PyTorch tells its memory only then
        rows[program.name] |= program.facts | times[program.name]
        if options.profile and program.facts["framework"] == "jax":
            say(f"tracing {program.name}")
            row = rows[program.name]
            with_memory(row, lambda p=program, row=row: row.update(profile=profile(p)))
    return {
        "options": dataclasses.asdict(options) | {"variants": list(options.variants),
                                                  "values": list(options.values)},
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "machine": platform.platform(),
        "versions": _versions(options.peft),
        "parameters": sum(x.size for x in jax.tree.leaves(base)),
        "tokens": models.tokens(entry),
        "product": {**product.facts, "flops": product_flops, **times["product"]},
        "programs": list(rows.values()),
    }


def sweep(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """``{"sweep": name, "values": [...], "benches": [what ``bench`` returned for each]}``.

    The floor is measured at every value, although rank and modules do not change it: a ratio
    compares times that were taken in turns.
    """
    found = []
    for value in options.values:
        say(f"{options.sweep} {value}")
        found.append(bench(dataclasses.replace(options, **{options.sweep: value}), say))
    return {"sweep": options.sweep, "values": list(options.values), "benches": found}


def write(results: Mapping[str, Any], out: str) -> str:
    """Writes ``bench.json``, ``bench.md`` and ``bench.png``; returns what the terminal shows."""
    rows = table_rows(results)
    paths = _write(out, "bench", results, markdown(results), bench_figure(results, rows))
    parts = [text_table(cells(rows)), footer(results), *paths]
    return "\n".join(["", *(part for part in parts if part)])


def write_sweep(found: Mapping[str, Any], out: str) -> str:
    """The same of a sweep: ``bench_sweep.json``, ``bench_sweep.md`` and ``bench_sweep.png``."""
    benches = found["benches"]
    rows = [table_rows(results) for results in benches]
    head, *body = cells([row for own in rows for row in own])
    values = [v for v, own in zip(found["values"], rows, strict=True) for _ in own]
    lines = [(found["sweep"], *head)]
    lines += [(str(value), *line) for value, line in zip(values, body, strict=True)]
    about = f"{what(benches[0])}, on {benches[0]['device']}"
    text = f"{about}\n\n{markdown_table(lines, names=2)}\n"
    paths = _write(out, "bench_sweep", found, text, sweep_figure(found))
    return "\n".join(["", text_table(lines, names=2), *paths])


def _write(out: str, name: str, results, text: str, figure) -> list[str]:
    folder = Path(out)
    paths = [
        write_text_atomic(folder / f"{name}.json", json.dumps(results, indent=1) + "\n"),
        write_text_atomic(folder / f"{name}.md", text),
        write_bytes_atomic(folder / f"{name}.png", png(figure, crop=True)),
    ]
    return list(map(str, paths))


def _module(options: Options, entry: models.Entry):
    return models.build(
        entry,
        dtype=jnp.dtype(options.dtype),
        base_dtype=jnp.dtype(options.base_dtype),
        unroll=options.unroll,
        remat=options.remat,
        attention=options.attention,
    )


def _data(options: Options, entry: models.Entry):
    """The parameters and the batches on the device; all variants share them."""
    with _refusals(options):
        try:
            base = models.random_params(_module(options, entry), entry)
            batches = models.random_batches(entry, options.batch, BATCHES, jnp.dtype(options.dtype))
            return jax.block_until_ready((base, batches))
        except Exception as error:
            if not memory.is_short(error):
                raise
            raise UserError(
                f"{options.model} and {BATCHES} batches of {options.batch} do not fit into the "
                "memory of the device; type a smaller --batch, or another --model"
            ) from None


def _program(method, entry, base, batches, options: Options) -> Program:
    with _refusals(options):
        variant = make_variant(
            method,
            _module(options, entry),
            entry,
            rank=options.rank,
            modules=options.modules,
            execution=options.execution,
        )
        return compile_variant(variant, base, batches)


@contextlib.contextmanager
def _refusals(options: Options) -> Iterator[None]:
    """Turns what the library or XLA refuses into an error of the options."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        if memory.is_short(error):
            raise
        if options.attention == "cudnn":
            raise UserError(
                f"--attention=cudnn does not run here: {first_line(error)}\nType --attention=xla"
            ) from error
        if isinstance(error, ValueError):
            raise UserError(str(error)) from error
        raise


def _versions(with_torch: bool) -> dict[str, str]:
    names = ["jax", "jaxlib", "flax", "optax", "rmlora-jax"]
    names += ["torch", "transformers", "peft"] if with_torch else []
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main(arguments: list[str]) -> int:
    if "--peft" in arguments:
        # JAX would take most of a GPU before PyTorch sees it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    say = functools.partial(print, flush=True)
    try:
        given = parse(arguments)
        check_folder(given.out)
        say(header(given))
        if given.sweep:
            print(write_sweep(sweep(given, say), given.out))
        else:
            print(write(bench(given, say), given.out))
    except UserError as error:
        tell(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
