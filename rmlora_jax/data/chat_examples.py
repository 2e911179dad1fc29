"""From a row of a data set to an example: a conversation, a prompt with its completion, or a text.

An example is a dict as ``hub.chat_template`` takes it. What is wrong with a row is said with its
place and its column.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from rmlora_jax.data.dataset import BadRecord
from rmlora_jax.errors import UserError, did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# What a widespread older layout calls them: {"from": "human", "value": ...}.
OLDER = {"human": "user", "gpt": "assistant", "observation": "tool"}
NAME_COLUMNS = (
    "Name the columns: --config.sft.prompt=question --config.sft.completion=answer, or "
    "--config.sft.messages or --config.sft.text"
)


class NoSuchColumn(BadRecord):
    """A row lacks a column that is asked for."""


class Names(NamedTuple):
    """The columns of a data set. Where all but ``tools`` are "", a row may have the usual ones:
    messages, or prompt and completion, or text.

    Attributes:
      messages: a list of objects with "role" and "content".
      prompt: a text, or several columns whose texts are joined by an empty line; or messages.
      completion: a text; or messages.
      text: a text that is learnt whole.
      tools: what a conversation may call, a list of JSON schemas.
    """

    messages: str = ""
    prompt: str | tuple[str, ...] = ""
    completion: str = ""
    text: str = ""
    tools: str = "tools"

    def check(self) -> None:
        """Raises a UserError where the names do not make one form of example."""
        forms = [bool(self.messages), bool(self.prompt or self.completion), bool(self.text)]
        if sum(forms) > 1:
            raise UserError("name messages, or prompt and completion, or text: a data set has one "
                            "of these forms")
        if bool(self.prompt) != bool(self.completion):
            lacking = "completion" if self.prompt else "prompt"
            raise UserError(f"config.sft.{lacking}='': name that column, too")


USUAL = (
    Names(messages="messages"),
    Names(messages="conversations"),
    Names(prompt="prompt", completion="completion"),
    Names(text="text"),
)


def example_of(row: Mapping[str, Any], names: Names, where: str) -> dict[str, Any]:
    """The example that a row holds.

    Args:
      row: column -> value.
      names: of its columns.
      where: what an error calls the row.

    Returns:
      ``{"messages": [...]}``, where "tools" may be added, and "given", the number of first messages
      that are no targets; ``{"prompt": str, "completion": str}``; or ``{"text": str}``.

    Raises:
      BadRecord: a column is missing, or its value is not such a thing.

    >>> example_of({"q": "1 + 1?", "a": "2", "id": 5}, Names(prompt="q", completion="a"), "line 1")
    {'prompt': '1 + 1?', 'completion': '2'}
    """
    names = _names_of(row, names, where)
    if names.text:
        example: dict[str, Any] = {"text": _text(row, names.text, where)}
    elif names.messages:
        example = {"messages": _messages(row, names.messages, where)}
    else:
        example = _pair(row, names, where)
    if "messages" in example and row.get(names.tools):
        example["tools"] = _tools(row[names.tools], f"{where}: {names.tools!r}")
    try:
        json.dumps(example, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRecord(f"{where}: not UTF-8; convert it") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRecord(f"{where}: not plain JSON ({error})") from None
    return example


def conversation_of(example: Mapping[str, Any]) -> dict[str, Any]:
    """What an example says, in one form: messages, beside them maybe tools; or a text.

    >>> conversation_of({"prompt": "1 + 1?", "completion": "2"})["messages"][1]
    {'role': 'assistant', 'content': '2'}
    """
    if "completion" in example:
        asked = {"role": "user", "content": example["prompt"]}
        return {"messages": [asked, {"role": "assistant", "content": example["completion"]}]}
    return {name: value for name, value in example.items() if name != "given"}


def _names_of(row: Mapping[str, Any], names: Names, where: str) -> Names:
    """The names, or else the usual ones that the row has."""
    own = any(names[:4])
    for one in (names,) if own else USUAL:
        lacking = [name for name in _columns(one) if name not in row]
        if not lacking:
            return one._replace(tools=names.tools)
    what = repr(lacking[0]) if own else "'messages', 'prompt' with 'completion', or 'text'"
    has = ", ".join(map(repr, row))[:200] or "nothing"
    raise NoSuchColumn(f"{where}: no {what}; it has {has}\n{NAME_COLUMNS}")


def _columns(names: Names) -> list[str]:
    prompt = (names.prompt,) if isinstance(names.prompt, str) else names.prompt
    return [name for name in (names.messages, *prompt, names.completion, names.text) if name]


def _pair(row: Mapping[str, Any], names: Names, where: str) -> dict[str, Any]:
    columns = [names.prompt] if isinstance(names.prompt, str) else list(names.prompt)
    if len(columns) == 1 and isinstance(row[columns[0]], list):
        prompt = _messages(row, columns[0], where)
        completion = _messages(row, names.completion, where)
        return {"messages": prompt + completion, "given": len(prompt)}
    # Such as Alpaca's "input", which most rows leave empty beside "instruction".
    filled = [name for name in columns if row[name] not in (None, "")] or columns[:1]
    prompt = "\n\n".join(_text(row, name, where) for name in filled)
    return {"prompt": prompt, "completion": _text(row, names.completion, where)}


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str) and value is not None:
        raise BadRecord(f"{where}: {name!r} is {_kind(value)}, not a text")
    if not value or not value.strip():
        raise BadRecord(f"{where}: {name!r} is empty; fill it in or delete the row")
    return value


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", bool: "true or false", int: "a number",
             float: "a number"}  # fmt: skip
    return kinds.get(type(value), f"a {type(value).__name__}")


def _messages(row: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    value, where = row[name], f"{where}: {name!r}"
    if not isinstance(value, list):
        what = "empty" if value is None else _kind(value)
        raise BadRecord(f"{where} is {what}, not a list of messages")
    if not value:
        raise BadRecord(f"{where} is an empty conversation; delete the row")
    return [_message(one, f"{where}, message {n}") for n, one in enumerate(value, 1)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecord(f"{where} is {_kind(value)}, not an object with a role and its content")
    message = dict(value)
    if "role" not in message and {"from", "value"} <= set(message):
        message = {"role": message.pop("from"), "content": message.pop("value"), **message}
        role = message["role"]
        message["role"] = OLDER.get(role, role) if isinstance(role, str) else role
    role = message.get("role")
    if role not in ROLES:
        hint = did_you_mean(str(role), ROLES)
        found = "no role" if "role" not in message else f"the role {str(role)[:60]!r}"
        raise BadRecord(f"{where} has {found}; roles are {', '.join(ROLES)}{hint}")
    if calls := message.get("tool_calls"):
        message["tool_calls"] = _calls(calls, f"{where}, its tool_calls")
    elif "tool_calls" in message:
        del message["tool_calls"]
    message["content"] = _content(message.get("content"), where, empty=bool(calls))
    return message


def _content(value: Any, where: str, empty: bool) -> str:
    if isinstance(value, list) and value and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in value
    ):
        return "".join(part["text"] for part in value)
    if isinstance(value, str):
        return value
    if value is None and empty:
        return ""
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        kinds = {str(part.get("type"))[:40] for part in value if isinstance(part, dict)} - {"text"}
        what = f"a list with {', '.join(sorted(kinds)) or 'something else than texts'}"
    else:
        what = "missing" if value is None else _kind(value)
    raise BadRecord(f"{where}: its content is {what}, not a text")


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls of tools, their arguments as objects: templates write these as JSON themselves."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise BadRecord(f"{where} are {_kind(value)}, not a list of objects")
    calls = []
    for call in value:
        call, inner = dict(call), call.get("function")
        holder = call["function"] = dict(inner) if isinstance(inner, dict) else {}
        if not holder:
            del call["function"]
            holder = call
        if not isinstance(holder.get("name"), str):
            raise BadRecord(f"{where}: a call has no name")
        arguments = _loaded(holder.get("arguments"))
        if arguments is not None:
            holder["arguments"] = arguments
        calls.append(call)
    return calls


def _tools(value: Any, where: str) -> list[dict[str, Any]]:
    tools = _loaded(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord(f"{where} is {_kind(tools)}, not a list of objects")
    return tools


def _loaded(value: Any) -> Any:
    """What a text holds as JSON, where it does: a column of a table has one type in all rows."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict | list) else value
