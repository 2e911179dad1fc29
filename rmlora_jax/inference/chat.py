"""``rmlora chat --workdir=DIR``: a conversation with a language model on the terminal.

Ctrl-C stops an answer, and between answers it ends the program. Ctrl-D leaves.
"""

import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

import jax

from rmlora_jax import called, stopping
from rmlora_jax.errors import UserError
from rmlora_jax.inference.generator import Generator, Options
from rmlora_jax.inference.loading import load
from rmlora_jax.inference.predict import CACHE
from rmlora_jax.inference.written import printable
from rmlora_jax.parallel.mesh import use_compilation_cache

RESET, EXIT, ADAPTER = "/reset", "/exit", "/adapter"
PROMPT = "> "


def chat(
    workdir: str | None,
    *,
    find: Callable[[str], Any] = load,
    source: TextIO | None = None,
    out: TextIO | None = None,
    adapter: str | None = None,
    **options: Any,
) -> None:
    """Talks until there is nothing more to read, or ``/exit``; ``/reset`` forgets what was said,
    and ``/adapter NAME`` lets another adapter of several answer.

    Args:
      workdir: what `load` accepts; the folder of a language model with a chat template.
      find: workdir -> the model.
      source, out: where messages come from, a line each, and answers go; the terminal.
      adapter: where there are several, the one that answers first; None: the first by name.
      options: of `generator.Options`.

    Raises:
      UserError: there is no such model, or an option is not known.
    """
    if not workdir:
        raise UserError(f"chat with which model? Type {called.command('chat', '--workdir=DIR')}")
    if unknown := [option for option in options if option not in Options._fields]:
        raise UserError(f"--{unknown[0]} does not go with a chat; it takes "
                        f"{', '.join(f'--{option}' for option in (*Options._fields, 'adapter'))}")
    if jax.config.jax_compilation_cache_dir is None:
        use_compilation_cache(CACHE)
    model = find(workdir)
    if not isinstance(model, Generator):
        predict = called.command("predict", f"--workdir={workdir}", "...")
        raise UserError(f"the model in {workdir} does not write text; type\n{predict}")
    if model.template.text is None:
        predict = called.command("predict", f"--workdir={workdir}", '"a text"')
        raise UserError(f"the model in {workdir} has no chat template, so it continues texts and "
                        f"does not talk; type\n{predict}")
    asked = Options(**options).checked()
    if adapter is None and model.names:
        adapter = model.names[0]
    adapter = model.adapter_of(adapter, "--adapter")
    assert sys.stdin is not None and sys.stdout is not None
    _talk(model, asked, adapter, source or sys.stdin, out or sys.stdout)


def _talk(
    model: Generator, options: Options, adapter: str | None, source: TextIO, out: TextIO
) -> None:
    """Reads lines and answers them."""
    print(f"{RESET} begins anew, {EXIT} or Ctrl-D leaves, Ctrl-C stops an answer", file=out)
    if adapter is not None:
        print(f"{adapter} answers; {ADAPTER} NAME chooses among {', '.join(model.names)}", file=out)
    messages: list[dict[str, str]] = []
    while (line := _read(source, out)) is not None:
        if line == EXIT:
            return
        if line == RESET:
            messages = []
        elif model.names and line.partition(" ")[0] == ADAPTER:
            adapter = _chosen(model, line.partition(" ")[2].strip(), adapter, out)
        elif line.startswith("/") and line[1:].isalpha():
            print(f"there is no command {line}; {RESET}, {EXIT}", file=out)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _answer(model, messages, options, adapter, out)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def _chosen(model: Generator, name: str, before: str | None, out: TextIO) -> str | None:
    """The adapter of this name; that of ``before`` where there is none."""
    try:
        chosen = model.adapter_of(name, ADAPTER)
    except UserError as error:
        print(f"error: {error}", file=out)
        return before
    print(f"{chosen} answers", file=out)
    return chosen


def _read(source: TextIO, out: TextIO) -> str | None:
    """The next line; None at the end. Not input(), whose line editor leaves a terminal without an
    echo when a signal ends the process."""
    out.write(PROMPT)
    out.flush()
    try:
        line = source.readline()
    except UnicodeDecodeError:
        print("this line is not UTF-8; type it again", file=out)
        return ""
    if line:
        return line.strip()
    print(file=out)
    return None


def _answer(
    model: Generator, messages: list, options: Options, adapter: str | None, out: TextIO
) -> str | None:
    """Prints the answer as it comes, and returns it; None where there is none."""
    said = ""
    try:
        with stopping.watch("the answer stops", alone=True) as stop:
            for piece in model.stream(messages, adapter=adapter, **options._asdict()):
                said += piece
                out.write(printable(piece))
                out.flush()
                if stop(len(messages)):
                    break
    except stopping.Stopped as stopped:
        if stopped.number != signal.SIGINT:
            stopping.end(stopped.number)
    except UserError as error:
        print(f"error: {error}; {RESET} begins anew", file=out)
        return None
    print(file=out, flush=True)
    return said
