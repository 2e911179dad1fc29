"""A config file: Python with a function ``get_config()``, and the lines at which it is wrong."""

import ast
import importlib.util
import inspect
import re
import runpy
import sys
import traceback
from collections.abc import Collection
from pathlib import Path

import ml_collections

from rmlora_jax import called, configs
from rmlora_jax.config import ConfigDict
from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.files import near

DATA = (".json", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".ipynb", ".csv", ".tsv", ".txt")
KINDS = {
    "int": "a whole number", "float": "a number", "str": "text", "bool": "True or False",
    "tuple": "a tuple, such as ('a',)", "ConfigDict": "a section: set its fields one by one",
}  # fmt: skip


def example() -> str:
    """Where a person sees a config that is right."""
    name = called.config("quickstart")
    return name if called.is_script() else f"the copy that {called.program()} new {name}.py makes"


def find(text: str) -> Path:
    """The file of ``FILE`` or ``FILE:ARGUMENT``; a bundled config is also found by its name.

    Raises:
      UserError: the file is missing, or is not Python.
    """
    name = text.partition(":")[0]
    path = Path(name).expanduser()
    file = path if name and path.is_file() else configs.file_of(name)
    if file is None:
        if name and path.is_dir():
            raise UserError(f"{name!r} is a folder; give a config file, such as {example()}")
        known = ", ".join(map(called.config, configs.names()))
        hint = near(path) or did_you_mean(path.stem, configs.names()) or f"; there are {known}"
        raise UserError(f"there is no config file {name!r}{hint}")
    if file.suffix.lower() in DATA:
        raise UserError(f"{name}: a config is a Python file with get_config(), as {example()}, "
                        f"not {file.suffix}")
    return file


def load(text: str) -> ConfigDict:
    """What ``get_config()`` of ``FILE``, or ``get_config(ARGUMENT)`` of ``FILE:ARGUMENT``, returns.

    Raises:
      UserError: the file is missing; or it is wrong, and the error names the line.
    """
    file, (name, _, argument) = find(text), text.partition(":")
    if importlib.util.find_spec("configs") is None:  # a config may build on another by this name
        sys.modules["configs"] = configs
    get_config = None
    try:
        found = runpy.run_path(str(file))
        get_config = found.get("get_config")
        if not callable(get_config):
            functions = [key for key, value in found.items() if callable(value)]
            hint = did_you_mean("get_config", functions) or f"; see {example()}"
            raise UserError(f"{name} has no function called get_config{hint}")
        given, where = [argument] if argument else [], f"{name}{_line(get_config)}"
        try:
            inspect.signature(get_config).bind(*given)
        except TypeError:
            words = (
                f"get_config() takes no argument; leave out {':' + argument!r}"
                if argument else f"get_config() needs an argument: {name}:ARGUMENT"
            )
            raise UserError(f"{where}: {words}") from None
        config = get_config(*given)
    except (Exception, SystemExit) as error:  # whatever is wrong in a file that someone wrote
        if isinstance(error, UserError) and not _lines(error, file):
            raise
        raise UserError(f"{name}{_place(error, file)}: {_words(error)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        words = (
            "nothing; does it end with 'return c'?" if config is None
            else f"{type(config).__name__!r}, not the ConfigDict of default_config()"
        )  # fmt: skip
        raise UserError(f"{where}: get_config() returns {words}")
    return config


def located(words: str, file: Path, elsewhere: Collection[str] = ()) -> str:
    """``words`` with the line of ``file`` behind each line about a field that is set there.

    Fields ``elsewhere`` have their value from another place.
    """
    try:
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, SyntaxError, RecursionError):
        return words
    places = {}
    for node in nodes:
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            dotted = re.sub(r"\[['\"](\w+)['\"]\]", r".\1", ast.unparse(node))
            places[dotted.partition(".")[2]] = node.lineno

    def line(text: str) -> str:
        path = re.match(r"config\.([\w.]*\w)", text)
        number = path and path[1] not in elsewhere and places.get(path[1])
        return f"{text} ({file.name}, line {number})" if number else text

    return "\n".join(map(line, words.splitlines()))


def kind_of(config: ConfigDict, path: str) -> str | None:
    """What the value of a field must be, in words; None for a field that is not there."""
    try:
        kind = config
        for name in path.split("."):
            config, kind = config.get(name), config.get_type(name)
    except (AttributeError, KeyError):
        return None
    return KINDS.get(kind.__name__)


def _line(function) -> str:
    code = getattr(function, "__code__", None)
    return f", line {code.co_firstlineno}" if code else ""


def _lines(error: BaseException, file: Path) -> list[int]:
    """The lines of the file that were under way."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.lineno for frame in frames if frame.filename == str(file) and frame.lineno]


def _place(error: BaseException, file: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f", line {error.lineno}" if error.lineno else ""
    lines = _lines(error, file)
    return f", line {lines[-1]}" if lines else ""


def _words(error: BaseException) -> str:
    """What is wrong, in a line. ml_collections hides line ends in names of keys."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    if isinstance(error, UserError):
        return text
    unknown = re.search(r'Did you mean "(.*)" instead of "(.*)"\?', text)
    if unknown:
        return f"there is no field {unknown[2]}; did you mean {unknown[1]}?"
    kind = re.match(
        r"Could not override field '(.*?)' \(reference\)\. (.*) is of original type "
        r"<class '(?:.*\.)?(\w+)'> and cannot be casted to type <class '(?:.*\.)?(\w+)'>",
        text, re.DOTALL,
    )  # fmt: skip
    if kind:
        return f"{kind[1]} is {kind[3]} {kind[2][:80]!r}: must be {KINDS.get(kind[4], kind[4])}"
    if isinstance(error, SyntaxError):
        text = error.msg
    first = re.split(r"\n|\\n", text)[0][:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
