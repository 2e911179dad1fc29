"""What a trained language model says: answers before and after training, and how many are right."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import rmlora_jax as rm
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.files import write_text_atomic
from rmlora_jax.inference.generator import Generator
from rmlora_jax.inference.loading import use
from rmlora_jax.inference.prompts import Prompt
from rmlora_jax.parallel import memory
from rmlora_jax.tasks.task import Problem, Question
from rmlora_jax.train.setup import cast
from rmlora_jax.train.terminal import format_table

FILE = "samples.md"


def asked(
    folder: Path,
    config: Run,
    problem: Problem,
    lora: rm.LoRA | None,
    params: Callable[[], dict],
) -> dict[str, float]:
    """Asks a trained model what `Problem.questions` want to know, and writes ``samples.md``.

    Questions that it cannot be asked, such as one of more tokens than it takes, are left out
    and counted. A device without room for the model beside the run is reported, and the model is
    not asked: what was trained is more than its answers.

    Args:
      params: makes those of the trained model, on the host; with factors where ``lora`` is given.

    Returns:
      ``{"exact_match": fraction}`` where answers are compared, else {}.
    """
    questions, base = problem.questions, problem.pretrained
    if questions is None or base is None:
        return {}

    def opened(params: dict, lora: rm.LoRA | None) -> Generator:
        params = cast(params, jnp.dtype(config.model.base_dtype))
        return use(base, params, lora, problem.info)

    def answers(model: Generator, of: Sequence[Question]) -> list[str]:
        prompts = [question.prompt for question in of]
        return [a.text for a in model.generate(prompts, max_new_tokens=questions.longest)]

    try:
        model = opened(params(), lora)
        samples, _ = askable(model, questions.samples)
        exam, why = askable(model, questions.exam)
        if why:
            all_of = len(questions.exam)
            print(f"note: {all_of - len(exam):,} of {all_of:,} test questions are left out of the "
                  f"exact match: {why}", flush=True)
        after = answers(model, [*samples, *exam])
        del model  # two have no room beside the run
        if samples:
            before = answers(opened(base.params, None), samples)
            write_text_atomic(folder / FILE, table(samples, before, after[: len(samples)]))
            said = zip(("asked", "before", "after"),
                       (words_of(samples[0].prompt), before[0], after[0]), strict=True)
            print(format_table(f"answers, all in {folder / FILE}",
                               [(name, in_a_line(text)) for name, text in said]), flush=True)
    except Exception as error:
        if not (memory.is_short(error) or isinstance(error, UserError)):
            raise
        why = "it needs more memory" if memory.is_short(error) else str(error)
        print(f"note: the trained model was not asked anything: {why}", flush=True)
        return {}
    if not exam:
        return {}
    right = [question.answer for question in exam]
    return {"exact_match": exact_match(questions.pattern, right, after[len(samples) :])}


def askable(model: Generator, questions: Sequence[Question]) -> tuple[list[Question], str]:
    """The questions that a model can be asked, and why it cannot be asked the first other one."""
    kept, why = [], ""
    for number, question in enumerate(questions):
        try:
            model.tokens_of(Prompt(question.prompt), f"question {number}")
            kept.append(question)
        except UserError as error:
            why = why or str(error)
    return kept, why


def exact_match(pattern: str, right: Sequence[str], given: Sequence[str]) -> float:
    """The fraction of answers in which ``pattern`` finds what it finds in the right ones.

    The pattern has one group; of several places in a text the last counts.

    >>> exact_match(r"= (\\d+)", ["2 + 3 = 5", "= 7"], ["it is = 5", "I do not know"])
    0.5
    """

    def found(text: str) -> str | None:
        places = re.findall(pattern, text)
        return places[-1].strip() if places else None

    same = [found(a) is not None and found(a) == found(b)
            for a, b in zip(right, given, strict=True)]
    return sum(same) / len(same)


def table(samples: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> str:
    """Markdown with the answers to each question before and after training."""
    parts = ["# Answers before and after training"]
    for number, (question, old, new) in enumerate(zip(samples, before, after, strict=True), 1):
        parts.append(f"## {number}")
        rows = {"asked": words_of(question.prompt), "before": old, "after": new}
        parts += [f"**{name}**\n\n{_quoted(text)}" for name, text in
                  (rows | {"right": question.answer}).items()]
    return "\n\n".join(parts) + "\n"


def words_of(prompt: Mapping[str, Any]) -> str:
    """What is asked, as a person reads it.

    >>> asked, called = {"role": "user", "content": "2 + 3?"}, {"role": "assistant"}
    >>> print(words_of({"messages": [asked, called | {"tool_calls": ["add(2, 3)"]}]}))
    user: 2 + 3?
    assistant: ['add(2, 3)']
    """
    if "messages" in prompt:
        return "\n".join(
            f"{one['role']}: {one.get('content') or one.get('tool_calls') or ''}"
            for one in prompt["messages"]
        )
    return str(prompt["prompt"])


def in_a_line(text: str, most: int = 300) -> str:
    """The beginning of a text for the terminal, without line breaks and control characters.

    >>> in_a_line("one\\n  two three\\x1b[1m", 12)
    'one two thr ...'
    """
    line = "".join(c for c in " ".join(text.split()) if c.isprintable())
    return line if len(line) <= most else f"{line[: most - 1]} ..."


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines()) or ">"
