"""Chats as tokens: a chat template writes the text, and the loss covers what the assistant says.

An example is a dict of one of three forms, as `data.chat` makes them:

* ``{"messages": [{"role": ..., "content": ...}, ...]}``, with ``"tools"`` where there are some;
  ``"given": n`` says that the first n messages are no targets;
* ``{"prompt": str, "completion": str}``;
* ``{"text": str}``.

Templates are Jinja. transformers runs them in its sandbox.
"""

import functools
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax.errors import UserError, did_you_mean, first_line
from rmlora_jax.files import given_path, near
from rmlora_jax.hub.source import ASSETS

# Templates of this package -> the tokens that they write.
KNOWN = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),  # older tokenizers have [INST] as letters
}
NONE = "none"
LOSSES = ("assistant", "last", "all")
FIELD, LOSS_FIELD = "--config.sft.template", "--config.sft.loss"

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Some templates write today's date. A run that is resumed tomorrow must see the tokens of today,
# so they get one date: that which Llama 3's template writes where it cannot know the day.
DATE = {"%d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024", "%y": "24", "%A": "Friday",
        "%a": "Fri", "%H": "00", "%M": "00", "%S": "00"}  # fmt: skip
ONE_DATE = "{%- macro strftime_now(format) -%}{{ format" + "".join(
    f" | replace({key!r}, {value!r})" for key, value in DATE.items()
) + " }}{%- endmacro -%}\n"

Encoded = tuple[np.ndarray, np.ndarray]  # tokens int32 (n,), wanted bool (n,)


class Template(NamedTuple):
    """A chat template.

    Attributes:
      name: what errors call it.
      text: Jinja; of a tokenizer with several, their names and texts. None: prompts and completions
        follow each other as they are.
    """

    name: str
    text: str | dict[str, str] | None

    def jinja(self, tools: Any = None) -> str:
        """The text for a conversation with or without tools."""
        text = self.text or ""
        if isinstance(text, dict):
            text = text.get("tool_use" if tools else "default") or text.get("default", "")
        return ONE_DATE + text if "strftime_now" in text else text


def find_template(tokenizer, name: str = "") -> Template:
    """The chat template that a config names.

    Args:
      tokenizer: of transformers.
      name: "" for the tokenizer's own, or none where it has none; "none"; one of `KNOWN`; or a file
        with Jinja.

    Raises:
      UserError: there is no such template, or the tokenizer lacks a token that it writes.
    """
    if name == NONE:
        return Template(NONE, None)
    if not name:
        own = getattr(tokenizer, "chat_template", None)
        return Template("of the tokenizer", own or None)
    if name in KNOWN:
        vocabulary = tokenizer.get_vocab()
        if lacking := [mark for mark in KNOWN[name] if mark not in vocabulary]:
            raise UserError(
                f"chat template {name!r} writes {' and '.join(map(repr, lacking))}, which the "
                "tokenizer does not have as a token\n"
                f"Name another template with {FIELD}"
            )
        return Template(name, (ASSETS / "chat_templates" / f"{name}.jinja").read_text("utf-8"))
    path = given_path(name)
    if not path.is_file():
        hint = near(path) or did_you_mean(name, KNOWN)
        raise UserError(f"{FIELD[2:]}={name!r}: there is no such file{hint}; give a file with "
                        f"Jinja, {', '.join(KNOWN)}, or {NONE!r}")
    try:
        return Template(name, Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{FIELD[2:]}={name!r} cannot be read: {first_line(error)}") from None


def encode(
    tokenizer,
    example: Mapping[str, Any],
    template: Template,
    *,
    loss: str = "assistant",
    system: str | None = None,
) -> Encoded:
    """The tokens of an example, and which of them are targets of the loss.

    A conversation goes through the template whole. The assistant's tokens are those inside
    ``{% generation %}``, where the template has that. Otherwise message i covers what the text of
    the whole conversation has after that of the messages before it and the generation prompt. The
    token that ends a turn is a target, the line break after it is not. A prompt and its completion
    are a conversation of two messages. Without a template their tokens follow each other, with the
    tokenizer's special tokens before and its end token after them.

    Args:
      tokenizer: a fast tokenizer of transformers.
      example: see this module.
      template: from `find_template`.
      loss: "assistant"; "last", its last message alone; or "all", every token.
      system: the system message of conversations without one.

    Returns:
      tokens int32 (n,), wanted bool (n,). A text is all target.

    Raises:
      UserError: the template refuses the conversation, or it writes earlier messages differently
        in a longer conversation, so that they cannot be told apart.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"<eos>": 0, "?": 1, "7": 2, "8": 3}, unk_token="?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    >>> encode(tokenizer, {"prompt": "7 7", "completion": "8"}, find_template(tokenizer))
    (array([2, 2, 3, 0], dtype=int32), array([False, False,  True,  True]))

    Source: https://huggingface.co/docs/transformers/chat_templating
    """
    if "text" in example:
        tokens = _ended(tokenizer, example["text"], _whole(tokenizer, example["text"]))
        return tokens, np.ones(len(tokens), bool)
    if template.text is None and "prompt" in example:
        prompt = _whole(tokenizer, example["prompt"])
        rest = _ended(tokenizer, example["completion"], _tokens(tokenizer, example["completion"]))
        tokens = np.concatenate([np.array(prompt, np.int32), rest])
        return tokens, (np.arange(len(tokens)) >= len(prompt)) | (loss == "all")
    messages = _messages(example, system)
    given = int(example.get("given", 0)) + len(messages) - len(example.get("messages", messages))
    write = functools.partial(_render, tokenizer, template, example.get("tools"))
    text, marked = write(messages)
    if loss == "all":
        ids = _tokens(tokenizer, text)
        return np.array(ids, np.int32), np.ones(len(ids), bool)
    if marked is None:
        turns = [i for i, one in enumerate(messages) if one["role"] == "assistant" and i >= given]
        spans = [_turn(write, messages, i, text) for i in (turns[-1:] if loss == "last" else turns)]
    else:
        before = len(write(messages[:given])[0]) if "given" in example else 0
        spans = [span for span in marked if span[0] >= before]
        spans = spans[-1:] if loss == "last" else spans
    cuts = []
    for start, end in spans:
        cuts += [start, start + len(_trimmed(tokenizer, text[start:end]))]
    parts = _parts(tokenizer, text, cuts)
    tokens = np.array([token for part in parts for token in part], np.int32)
    return tokens, np.repeat(np.arange(len(parts)) % 2 == 1, [len(part) for part in parts])


def encode_prompt(
    tokenizer, example: Mapping[str, Any], template: Template, *, system: str | None = None
) -> np.ndarray:
    """The tokens int32 (n,) that a model goes on from: messages, or a prompt alone.

    They are those that `encode` puts before the assistant's answer.

    Raises:
      UserError: as `encode`.
    """
    if template.text is None and "prompt" in example:
        return np.array(_whole(tokenizer, example["prompt"]), np.int32)
    write = functools.partial(_render, tokenizer, template, example.get("tools"))
    text, _ = write(_messages(example, system), add_generation_prompt=True)
    return np.array(_tokens(tokenizer, text), np.int32)


def end_tokens(tokenizer, template: Template) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's own, and the one that the template writes."""
    ends = {tokenizer.eos_token_id} - {None}
    if template.text is not None:
        tokens, wanted = encode(tokenizer, {"prompt": "a", "completion": "b"}, template)
        if wanted.any():
            last = int(tokens[np.flatnonzero(wanted)[-1]])
            ends |= {last} & set(tokenizer.added_tokens_decoder)
    return tuple(sorted(ends))


def fingerprint(tokenizer, template: Template, **options: Any) -> str:
    """Hexadecimal SHA-256 of all that decides what `encode` returns, beside the example."""
    import tokenizers
    import transformers

    backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None}
    facts = [1, tokenizers.__version__, transformers.__version__, backend | {"padding": None},
             tokenizer.special_tokens_map, template.text, options]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


# From messages to text


def _messages(example: Mapping[str, Any], system: str | None) -> list[dict]:
    if "messages" in example:
        messages = list(example["messages"])
    else:
        messages = [{"role": "user", "content": example["prompt"]}]
        if "completion" in example:
            messages.append({"role": "assistant", "content": example["completion"]})
    if system and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _render(
    tokenizer,
    template: Template,
    tools: Sequence[dict] | None,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]] | None]:
    """The text of messages, and the assistant's parts where the template marks them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if template.text is None:
        raise UserError(f"conversations need a chat template, and the tokenizer has none; name one "
                        f"with {FIELD}: {', '.join(KNOWN)}, or a file with Jinja")
    jinja = template.jinja(tools)
    marks = bool(MARKED.search(jinja))
    # Many templates write "None" for a key that is there without a value.
    chat = [{key: value for key, value in one.items() if value is not None} for one in messages]
    try:
        texts, spans = render_jinja_template(
            conversations=[chat],
            tools=list(tools) if tools else None,
            chat_template=jinja,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except ImportError as error:
        raise UserError(f"{first_line(error)}\npip install -U jinja2") from None
    except Exception as error:  # a template may raise anything that Jinja or Python can
        line = getattr(error, "lineno", None)
        if line is not None:
            raise UserError(f"chat template {template.name} is not Jinja: line "
                            f"{line - jinja.startswith(ONE_DATE)}: {first_line(error)}") from None
        roles = ", ".join(str(one["role"]) for one in messages[:6])
        raise UserError(
            f"the chat template {template.name} refuses the messages of {roles}"
            f"{', ...' * (len(messages) > 6)}: {first_line(error)[:300]}"
        ) from None
    return texts[0], [(int(first), int(last)) for first, last in spans[0]] if marks else None


def _turn(write: Callable, messages: list[dict], i: int, text: str) -> tuple[int, int]:
    """Where in ``text``, that of all messages, message i begins and ends."""
    before, _ = write(messages[:i], add_generation_prompt=True)
    upto, _ = write(messages[: i + 1])
    start = len(before)
    if text.startswith(before):
        if text.startswith(upto) and len(upto) > start:
            return start, len(upto)
        # Some templates write the last message more fully than earlier ones, with its reasoning
        # say. What both have in common is then the longest end of one that begins the other.
        size = _overlap(text[start:], upto)
        said = str(messages[i].get("content") or "").strip().splitlines()[-1:]
        if said and said[0].strip() in text[start : start + size]:
            return start, start + size
    raise UserError(
        f"message {i + 1}: the chat template writes it, or what comes before it, differently in "
        "the whole conversation, so that its tokens cannot be told apart\n"
        f"Name a template that marks them with {{% generation %}}, such as {FIELD}=chatml, or "
        f"learn from the last message alone, {LOSS_FIELD}=last, or all tokens, {LOSS_FIELD}=all"
    )


def _overlap(after: str, before: str) -> int:
    """The length of the longest beginning of ``after`` with which ``before`` ends."""
    size = min(len(after), len(before))
    while size and not before.endswith(after[:size]):
        size = after.rfind(before[-1], 0, size - 1) + 1
    return size


# From text to tokens


def _tokens(tokenizer, text: str) -> list[int]:
    """The tokens of a text as it stands: what a template writes has its special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _whole(tokenizer, text: str) -> list[int]:
    """The tokens of a text, and before them what the tokenizer puts before a text, once."""
    bare, full = _tokens(tokenizer, text), tokenizer(text, verbose=False)["input_ids"]
    for k in range(1, len(full) - len(bare) + 1):
        if full[k : k + len(bare)] == bare and full[:k] != bare[:k]:
            return full[:k] + bare
    return bare


def _ended(tokenizer, text: str, ids: list[int]) -> np.ndarray:
    """The tokens and the tokenizer's end token, unless the text ends in it."""
    end = tokenizer.eos_token
    more = [] if end is None or text.rstrip().endswith(end) else [tokenizer.eos_token_id]
    return np.array(ids + more, np.int32)


def _trimmed(tokenizer, text: str) -> str:
    """A turn without the white space after the token that ends it; no model writes that."""
    short = text.rstrip()
    return short if short.endswith(_added(tokenizer, len(tokenizer))) else text


@functools.lru_cache(8)
def _added(tokenizer, size: int) -> tuple[str, ...]:
    return tuple(str(token) for token in tokenizer.added_tokens_decoder.values())


def _parts(tokenizer, text: str, cuts: list[int]) -> list[list[int]]:
    """The tokens of a text, in parts that begin at these places of it.

    Where a token of the whole text would cross a cut, each part has its own tokens instead: what
    comes before an answer then is what generation goes on from.
    """
    texts = [text[first:last] for first, last in itertools.pairwise([0, *cuts, len(text)])]
    ids, *parts = tokenizer([text, *texts], add_special_tokens=False, verbose=False)["input_ids"]
    together = list(itertools.chain.from_iterable(parts))
    if together == ids:
        return parts
    # Some tokenizers begin every text with a space: only the beginnings of the whole agree.
    heads = [_tokens(tokenizer, text[:cut]) for cut in cuts]
    if all(ids[: len(head)] == head for head in heads):
        edges = itertools.pairwise([0, *map(len, heads), len(ids)])
        return [ids[first:last] for first, last in edges]
    if tokenizer.decode(together) != tokenizer.decode(ids):
        wrong = next(cut for cut, head in zip(cuts, heads, strict=True)
                     if ids[: len(head)] != head)  # fmt: skip
        around = text[max(0, wrong - 12) : wrong], text[wrong : wrong + 12]
        raise UserError(
            f"a token holds the end of {around[0]!r} and the beginning of {around[1]!r}, only one "
            "of them the assistant's\nCorrect the white space there, or learn from all tokens, "
            f"{LOSS_FIELD}=all"
        )
    return parts


# For the terminal


def describe(
    tokens: np.ndarray, wanted: np.ndarray, tokenizer, *, colour: bool | None = None,
    limit: int = 2000,
) -> str:
    """The text of an example, in which the targets of the loss are green, or in ``[[ ]]``.

    Args:
      tokens, wanted: (n,), of `encode`.
      tokenizer: that made them.
      colour: None: where the standard output is a terminal.
      limit: letters; the middle of a longer text is left out.
    """
    if colour is None:
        colour = sys.stdout.isatty()
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("[[", "]]")
    edges = [0, *(np.flatnonzero(np.diff(wanted.astype(np.int8))) + 1).tolist(), len(tokens)]
    parts, done = [], ""
    for first, last in itertools.pairwise(edges):
        # A part by itself could lose the space that it begins with.
        text = tokenizer.decode(tokens[:last].tolist(), clean_up_tokenization_spaces=False)
        part, done = text[len(done) :], text
        if len(part) > limit // 2:
            part = f"{part[: limit // 4]} ... {part[-limit // 4 :]}"
        # Data must not move the cursor or set colours of its own.
        part = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in part)
        parts.append(f"{begin}{part}{end}" if len(wanted) and wanted[first] else part)
    if len(parts) > 8:
        parts = [*parts[:4], f"\n... {len(parts) - 8} more parts ...\n", *parts[-4:]]
    return "".join(parts)
