"""One bench from its options to its results: everything timed in turns on the first device."""

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from rmlora_jax.bench import models
from rmlora_jax.bench.compiled import Program, compile_variant
from rmlora_jax.bench.flops import step_flops
from rmlora_jax.bench.measure import is_short, measure, product_program, with_memory
from rmlora_jax.bench.options import Options
from rmlora_jax.bench.profile import profile
from rmlora_jax.bench.table import size
from rmlora_jax.bench.variants import make_variant
from rmlora_jax.errors import UserError

BATCHES = 4  # that the steps of a stretch go through in a circle


def bench(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Times what ``options`` name.

    Returns:
      What ``bench.json`` holds: ``options``; ``device`` and versions; ``product``, the repeats of
      the large matrix product; and ``programs``, for each row its name, the repeats in ``ms``,
      memory, flops and what else is known of it. All of it plain numbers, strings and lists.

    Raises:
      UserError: options that do not fit together, or what ``--peft`` needs is not installed.
    """
    if options.peft:
        from rmlora_jax.bench import peft

        peft.check_installed()
    entry = options.entry
    base, batches = _data(options, entry)
    rows, programs = {}, []
    for name in options.variants:
        say(f"compiling {name}")
        method, own = options.of(name)
        flops = step_flops(entry, options.batch, method, options.rank, options.modules)
        row = {"name": name, "framework": "jax", "flops": flops, "error": None}
        rows[name] = row

        def prepare(name=name, method=method, own=own):
            program = _program(method, entry, base, batches, own)
            programs.append(program._replace(name=name))
            say(f"  {_told(programs[-1])}")

        with_memory(row, prepare)
        if row["error"]:
            say(f"  {row['error']}")
    if options.peft:
        for program in peft.programs(options, say):
            rows[program.name] = {"name": program.name}
            programs.append(program)
    product, product_flops = product_program(jnp.dtype(options.dtype))
    timed = [*programs, product]
    times = measure(timed, repeats=options.repeats, steps=options.steps, say=say)
    for program in programs:  # behind the turns: PyTorch tells its memory only then
        rows[program.name] |= program.facts | times[program.name]
        if options.profile and program.facts["framework"] == "jax":
            say(f"tracing {program.name}")
            with_memory(rows[program.name],
                        lambda p=program: rows[p.name].update(profile=profile(p)))
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
    """The parameters and the batches, on the device; those are the same for any ``Options.of``."""
    with _refusals(options):
        try:
            base = models.random_params(_module(options, entry), entry)
            batches = models.random_batches(entry, options.batch, BATCHES, jnp.dtype(options.dtype))
            return jax.block_until_ready((base, batches))
        except Exception as error:
            if not is_short(error):
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
    """What the library or XLA refuses becomes an error of the person's options."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        if is_short(error):
            raise
        if options.attention == "cudnn":
            first = str(error).partition("\n")[0]
            raise UserError(
                f"--attention=cudnn does not run here: {first}\nType --attention=xla"
            ) from error
        if isinstance(error, ValueError):
            raise UserError(str(error)) from error
        raise


def _told(program: Program) -> str:
    """A line about a compiled program."""
    facts = program.facts
    parts = [f"{facts['compile_seconds']:.1f} s"]
    if "memory_bytes" in facts:
        parts.append(size(facts["memory_bytes"]))
    if facts.get("execution"):
        parts.append(facts["execution"])
    return ", ".join(parts)


def _versions(with_torch: bool) -> dict[str, str]:
    names = ["jax", "jaxlib", "flax", "optax", "rmlora-jax"]
    names += ["torch", "transformers", "peft"] if with_torch else []
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
