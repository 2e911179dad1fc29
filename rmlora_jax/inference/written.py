"""The answers of a language model, as lines of JSON and as text for the terminal."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rmlora_jax.inference.generator import Answer, Generator, Options

FILE = "answers.jsonl"
OPTIONS = (*Options._fields, "adapter")
SHOWN = 20  # answers on the terminal


def answered(
    model: Generator, values: Sequence[str], failed: Callable, options: Mapping[str, Any]
) -> tuple[str, str, int]:
    """The answers as JSON lines and as text, and how many prompts there are.

    The option ``adapter`` is for prompts that name none.
    """
    prompts = model.from_arguments(values)
    more = {name: value for name, value in options.items() if name != "adapter"}
    answers = model.generate(prompts, failed=failed, adapters=options.get("adapter"), **more)
    return to_lines(answers), shown(answers), len(prompts)


def to_lines(answers: Sequence[Answer]) -> str:
    r"""An object for each answer: the prompt as it was given, the answer, and how it ended.

    >>> from rmlora_jax.inference.prompts import as_prompt
    >>> to_lines([Answer(as_prompt("Why?", ""), "So.", 2, "stop")])
    '{"prompt": "Why?", "answer": "So.", "tokens": 2, "ended": "stop"}\n'
    """
    def line(answer: Answer) -> str:
        prompt = answer.prompt
        given = {**prompt.example} | ({"adapter": prompt.adapter} if prompt.adapter else {})
        own = {"answer": answer.text, "tokens": answer.tokens, "ended": answer.ended}
        return json.dumps(given | own, ensure_ascii=False) + "\n"

    return "".join(map(line, answers))


def shown(answers: Sequence[Answer]) -> str:
    """The answers for a terminal: one alone, or each below its prompt."""
    if len(answers) == 1:
        return printable(answers[0].text)
    parts = [f"> {printable(asked(answer))}\n{printable(answer.text)}\n"
             for answer in answers[:SHOWN]]
    more = [f"... and {len(answers) - SHOWN:,} more"] if len(answers) > SHOWN else []
    return "\n".join([*parts, *more]).rstrip("\n")


def asked(answer: Answer) -> str:
    """The prompt, or the last message, with the name of the adapter that answered."""
    example, adapter = answer.prompt
    text = next((example[key] for key in ("prompt", "text") if key in example), None)
    text = str(example["messages"][-1].get("content") or "") if text is None else text
    return f"[{adapter}] {text}" if adapter else text


def printable(text: str, kept: str = "\n\t") -> str:
    """A text with a space for what would move the cursor, change a terminal's colours, or could not
    be printed, save what is ``kept``.

    >>> printable("a\\x1b[2Jb\\tc\\n")
    'a [2Jb\\tc\\n'
    """
    return "".join(c if c.isprintable() or c in kept else " " for c in text)
