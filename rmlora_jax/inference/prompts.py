"""What a language model is asked: texts, questions and conversations, in memory and in files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rmlora_jax.data.chat_examples import Names, example_of
from rmlora_jax.data.chat_files import SUFFIXES, open_rows
from rmlora_jax.errors import UserError
from rmlora_jax.hub.chat_template import NONE, Template, encode_prompt
from rmlora_jax.inference.inputs import file_of, lines_of

KEYS = ("prompt", "messages", "text")
FORMS = ("a string, a conversation (a list of messages with role and content), or an object with "
         f"one of {', '.join(KEYS)}")
PLAIN = Template(NONE, None)


class Prompt(NamedTuple):
    """One thing that a model is asked.

    Attributes:
      example: a dict with one of "prompt", "messages" (beside it maybe "tools") and "text".
      adapter: the name of the adapter that answers; None where there is one model.
    """

    example: Mapping[str, Any]
    adapter: str | None = None


def as_prompt(given: Any, where: str) -> Prompt:
    """A prompt in any of its forms.

    A string, or ``{"prompt": string}``, is the user's first message to a model that has a chat
    template, and to any other the beginning of a text. ``{"messages": [...]}``, or the list alone,
    is a conversation, whose last answer is asked for: messages of the assistant at its end, such as
    the answers in a file of training data, are left out. ``{"text": string}`` is the beginning of a
    text for any model. A dict may have ``"adapter"``; what else it has is not read.

    Raises:
      UserError: it has another form; ``where`` names it.

    >>> as_prompt("Why?", "prompt 0")
    Prompt(example={'prompt': 'Why?'}, adapter=None)
    """
    if isinstance(given, str):
        given = {"prompt": given}
    elif is_conversation(given):
        given = {"messages": list(given)}
    found = [key for key in KEYS if key in given] if isinstance(given, Mapping) else []
    if len(found) != 1:
        told = f"has {' and '.join(found)}" if found else f"is {repr(given)[:80]}"
        raise UserError(f"{where} {told}; it must be {FORMS}")
    (key,), adapter = found, given.get("adapter")
    if not (adapter is None or isinstance(adapter, str)):
        raise UserError(f"{where}: adapter is {repr(adapter)[:80]}; it must be a name")
    if key != "messages":
        if not isinstance(given[key], str):
            raise UserError(f"{where}: {key!r} is {repr(given[key])[:80]}; it must be a string")
        return Prompt({key: given[key]}, adapter)
    example = example_of(given, Names(messages=key), where)
    messages = example["messages"]
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(f"{where}: there is no message to answer")
    return Prompt(example | {"messages": messages}, adapter)


def is_conversation(given: Any) -> bool:
    """Whether this is a list of messages."""
    return isinstance(given, list | tuple) and bool(given) and all(
        isinstance(message, Mapping) and "role" in message for message in given
    )


def tokens_of(
    prompt: Prompt, tokenizer: Any, template: Template, system: str, where: str
) -> list[int]:
    """The tokens that a model goes on from, at least one.

    Args:
      template: that messages go through; see `rmlora_jax.hub.chat_template.encode_prompt`.
      system: the first message of conversations without one; "" for none.

    Raises:
      UserError: there is no chat template, or it refuses the messages; or there are no tokens.
    """
    example = prompt.example
    if "text" in example:
        example, template = {"prompt": example["text"]}, PLAIN
    if "messages" in example and template.text is None:
        raise UserError(f"{where}: the model has no chat template, so it takes no messages; give "
                        "a text")
    try:
        json.dumps(example, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} is not UTF-8; convert it") from None
    try:
        tokens = encode_prompt(tokenizer, example, template, system=system or None).tolist()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not tokens:
        raise UserError(f"{where} has no tokens; give at least one letter")
    return tokens


def prompts_of(values: Sequence[str]) -> list[Prompt]:
    """The prompts that the arguments of ``--predict`` name, in order.

    ``@FILE``, or the name of a file, stands for its prompts, ``-`` for the lines of standard input,
    and any other argument is a prompt. A file .jsonl, .json or .parquet has objects as `as_prompt`
    takes them. Any other file has a prompt on each line. Empty lines are left out.

    Raises:
      UserError: a file cannot be read, a row has another form, or there is no prompt.
    """
    found = [as_prompt(given, where) for value in values for where, given in _rows(value)]
    if not found:
        raise UserError(f"there is no prompt in {', '.join(values)}")
    return found


def _rows(value: str) -> Iterator[tuple[str, Any]]:
    """(what an error calls it, prompt) of all that an argument names."""
    file = file_of(value)
    if file is not None and file.name.lower().endswith(SUFFIXES):
        rows = open_rows(file)
        yield from ((rows.where(i), rows[i]) for i in range(len(rows)))
    else:
        where, lines = lines_of(value, file)
        yield from ((f"{where}, line {number}", line) for number, line in lines)
