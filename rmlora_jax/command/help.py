"""What ``--help`` prints: of ``rmlora``, of each of its words, and of run.py."""

import textwrap
from collections.abc import Iterable
from typing import NamedTuple

from rmlora_jax import called

ASKED = ("--help", "-help", "-h", "-?", "--helpshort")

ANSWERING = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")


class Word(NamedTuple):
    """A word of ``rmlora``.

    Attributes:
      line: what it does.
      typed, inputs: the arguments, as in a usage line.
      flags: those that it takes.
    """

    line: str
    typed: str = ""
    flags: tuple[str, ...] = ()
    inputs: str = ""


WORDS = {
    "train": Word(
        "fine-tune a model as a config says, or go on with a run",
        "--config=NAME --workdir=DIR --config.FIELD=VALUE",
        ("config", "workdir", "print_config", "compile_only", "topology", "distributed",
         "coordinator", "num_processes", "process_id", "debug"),
    ),
    "predict": Word(
        "classify images or texts, or answer prompts, with a trained model",
        "--workdir=DIR", ("workdir", "top", "at_once", "out", *ANSWERING), "INPUT ...",
    ),
    "chat": Word(
        "talk with a trained language model", "--workdir=DIR", ("workdir", *ANSWERING)
    ),
    "export": Word(
        "write the whole model of a run, for transformers in PyTorch", "--workdir=DIR",
        ("workdir",),
    ),
    "bench": Word("time a training step of each method on this device", "--model=NAME"),
    "configs": Word("list the bundled configs"),
    "new": Word("copy a bundled config, to make one's own from it", "FILE.py --config=NAME"),
}  # fmt: skip

AFTER = """
The fields of a config are flags, too, such as --config.steps=100. --print_config prints all of
them with their meanings."""


def of_program() -> str:
    """All words, a line each."""
    name = called.program()
    lines = [f"  {name} {word:9}{known.line}" for word, known in WORDS.items()]
    return "\n".join([
        "Fine-tune pretrained models in JAX, and use them.", "", *lines, "",
        f"{name} WORD --help tells more of each. To begin: {name} train",
    ])  # fmt: skip


def of_word(word: str, meanings: dict[str, str]) -> str:
    """One word of ``rmlora`` with the flags that it takes."""
    known = WORDS[word]
    lines = [f"{known.line[0].upper()}{known.line[1:]}:", "", _usage(word)]
    if known.flags:
        lines += ["", *_listed(meanings, known.flags)]
    if known.inputs:
        lines += [f"  {known.inputs}", _indented(meanings[word])]
    if "config" in known.flags:
        lines += [AFTER, f"{called.program()} configs lists the bundled configs."]
    return "\n".join(lines)


def of_script(meanings: dict[str, str]) -> str:
    """The uses of run.py, then all its flags."""
    uses = [(_usage(word), WORDS[word].line) for word in called.WORDS]
    width = max(len(usage) for usage, _ in uses)
    lines = [f"{usage:{width}}  {line}" for usage, line in uses]
    return "\n".join([*lines, "", *_listed(meanings, meanings), AFTER])


def _usage(word: str) -> str:
    known = WORDS[word]
    if word in called.WORDS:
        return f"  {called.command(word, known.typed, known.inputs)}"
    return f"  {called.program()} {word} {known.typed}".rstrip()


def _listed(meanings: dict[str, str], names: Iterable[str]) -> list[str]:
    """Each flag on a line of its own, its meaning below it."""
    return [line for name in names for line in (f"  --{name}", _indented(meanings[name]))]


def _indented(text: str) -> str:
    return textwrap.fill(text, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
