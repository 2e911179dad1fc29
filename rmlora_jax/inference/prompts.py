"""What a language model is asked: texts, questions and conversations, in memory and in files."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rmlora_jax.errors import UserError, first_line
from rmlora_jax.inference.inputs import file_of, lines_of

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}, and what else a template knows
KEYS = ("prompt", "messages", "text")
FORMS = ("a string, a conversation (a list of messages with role and content), or a dict with one "
         f"of {', '.join(KEYS)}")


class Prompt(NamedTuple):
    """One thing that a model is asked.

    Attributes:
      name: "prompt", "messages" or "text", see `as_prompt`.
      content: a string, or the messages.
      adapter: the name of the adapter that answers; None where there is one model.
    """

    name: str
    content: Any
    adapter: str | None = None


def as_prompt(given: Any, where: str) -> Prompt:
    """A prompt in any of its forms.

    A string, or ``{"prompt": string}``, is the user's first message to a model that has a chat
    template, and to any other the beginning of a text. ``{"messages": [...]}``, or the list alone,
    is a conversation, whose last answer is asked for: messages of the assistant at its end, such as
    the answers in a file of training data, are left out. ``{"text": string}`` is the beginning of a
    text for any model. A dict may have ``"adapter"``, and what else it has is not read.

    Raises:
      UserError: it has another form; ``where`` names it.

    >>> as_prompt("Why?", "prompt 0")
    Prompt(name='prompt', content='Why?', adapter=None)
    """
    adapter = None
    if isinstance(given, str):
        name, content = "prompt", given
    elif is_conversation(given):
        name, content = "messages", given
    elif isinstance(given, Mapping) and (found := [key for key in KEYS if key in given]):
        if len(found) > 1:
            raise UserError(f"{where} has {' and '.join(found)}; give one of them")
        name, content, adapter = found[0], given[found[0]], given.get("adapter")
    else:
        raise UserError(f"{where} is {repr(given)[:80]}; it must be {FORMS}")
    if name == "messages" and not is_conversation(content):
        raise UserError(f"{where}: messages is {repr(content)[:80]}; it must be a list of objects "
                        "with role and content")
    if name != "messages" and not isinstance(content, str):
        raise UserError(f"{where}: {name} is {repr(content)[:80]}; it must be a string")
    if not (adapter is None or isinstance(adapter, str)):
        raise UserError(f"{where}: adapter is {repr(adapter)[:80]}; it must be a name")
    if name == "messages":
        asked = list(content)
        while asked and asked[-1]["role"] == "assistant":
            asked.pop()
        if not asked:
            raise UserError(f"{where}: there is no message to answer")
        content = asked
    return Prompt(name, content, adapter)


def is_conversation(given: Any) -> bool:
    """Whether this is a list of messages."""
    return isinstance(given, list | tuple) and bool(given) and all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in given
    )


def encode_prompt(tokenizer, prompt: Prompt, where: str) -> list[int]:
    """The tokens that a model reads of a prompt, at least one.

    Messages go through the tokenizer's chat template, up to where the answer begins. A text gets
    the special tokens that the tokenizer puts before texts.

    Raises:
      UserError: there is no chat template for a conversation, or the template refuses it; or the
        text is empty and the tokenizer has no token for its beginning.
    """
    name, content, _ = prompt
    template = getattr(tokenizer, "chat_template", None)
    if name == "messages" and not template:
        raise UserError(f"{where}: the model's tokenizer has no chat template, so it takes no "
                        "messages; give a text")
    if name == "text" or not template:
        tokens = _tokens(tokenizer, content, where)
        # A tokenizer may end texts, too, as for training.
        while len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id:
            tokens = tokens[:-1]
        if not tokens:
            raise UserError(f"{where}: the text is empty; give at least one letter")
        return tokens
    messages = [{"role": "user", "content": content}] if name == "prompt" else content
    try:
        written = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template raises what it likes
        raise UserError(f"{where}: the model's chat template refuses the messages: "
                        f"{first_line(error)[:200]}") from None
    tokens = _tokens(tokenizer, written, where, add_special_tokens=False)
    if not tokens:
        raise UserError(f"{where}: the model's chat template makes nothing of the messages")
    return tokens


def _tokens(tokenizer, text: str, where: str, **options) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} is not UTF-8; convert it") from None
    return tokenizer(text, **options)["input_ids"]


def end_tokens(tokenizer, configs: Sequence[Mapping[str, Any]] = ()) -> frozenset[int]:
    """The tokens that end an answer.

    They are ``eos_token_id`` (a number, or several) of the ``configs``, such as those in
    generation_config.json; the tokenizer's; and the special token that the chat template writes
    after an answer.
    """
    found = [config.get("eos_token_id") for config in configs] + [tokenizer.eos_token_id]
    ends = {number for value in found for number in (value if isinstance(value, list) else [value])
            if type(number) is int and number >= 0}
    if getattr(tokenizer, "chat_template", None):
        ends |= _turn_ends(tokenizer)
    return frozenset(ends)


MARK = "qxjzk"  # letters that no template writes


def _turn_ends(tokenizer) -> set[int]:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    try:
        written = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template that takes no such conversation is told of when it is used
        return set()
    after = tokenizer(written.rpartition(MARK)[2], add_special_tokens=False)["input_ids"]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return set(after[:1]) & special


def prompts_of(values: Sequence[str]) -> list[Prompt]:
    """The prompts that the arguments of ``--predict`` name, in order.

    ``@FILE``, or the name of a file, stands for its prompts, ``-`` for the lines of standard input,
    and any other argument is a prompt. A file .jsonl has on each line an object as `as_prompt`
    takes it, or a string. Any other file has a prompt on each line. Empty lines are left out.

    Raises:
      UserError: a file cannot be read, a line has another form, or there is no prompt.
    """
    found = []
    for value in values:
        file = file_of(value)
        where, lines = lines_of(value, file)
        parsed = file is not None and file.suffix.lower() == ".jsonl"
        for number, line in lines:
            place = f"{where}, line {number}"
            found.append(as_prompt(_parsed(place, line) if parsed else line, place))
    if not found:
        raise UserError(f"there is no prompt in {', '.join(values)}")
    return found


def _parsed(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({first_line(error)})") from None
