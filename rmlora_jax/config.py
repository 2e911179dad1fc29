"""What a field of a config is: its default, its meaning, the values that it may have.

A person edits an ``ml_collections.ConfigDict``. `read` turns it into a frozen dataclass, and
nothing behind that sees a ConfigDict. Tasks, methods and studies own their fields: each declares a
dataclass whose fields are made by `field`.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Model:
    ...     dtype: str = field("bfloat16", "of the computation", choices=("bfloat16", "float32"))
    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     batch_size: int = field(64, "examples a step", least=1)
    ...     model: Model = dataclasses.field(default_factory=Model)
    >>> given = default(Config)
    >>> given.batch_size, given.model.dtype = 0, "float23"
    >>> config, wrong = read(Config, given)
    >>> print("\\n".join(wrong.values()))
    config.batch_size=0: must be at least 1
    config.model.dtype='float23': must be one of bfloat16, float32; did you mean float32?
"""

import dataclasses
import functools
import math
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import ml_collections
import numpy as np
from ml_collections import config_dict

from rmlora_jax.errors import did_you_mean

C = TypeVar("C")

# An ml_collections.ConfigDict. Its attributes have the union of all types that a field may have,
# which no type checker can narrow.
ConfigDict = Any

FIXED = "fixed"  # a run that continues must have the same value
FREE = "free"  # it may have another: the field changes no number
GROWS = "grows"  # it may have more, if no step depends on the number of steps
PLACE = "place"  # a path: it may have another, since the run knows what it found there

LARGE = 2**20  # of widths, ranks, lengths
MOST = 2**31 - 1  # of steps and seeds

Mistake = tuple[str, str]  # the path of a field, and what it must be


class Elements(NamedTuple):
    """What a tuple holds: in words, and whether a value is one of them."""

    words: str
    fits: Callable[[Any], bool]


class Spec(NamedTuple):
    """What stands beside a field's default.

    Attributes:
      help: the meaning, with its unit.
      choices: the allowed values of a text.
      least, most, above, below: the bounds of a number.
      problem: ``value -> words or None`` for what bounds cannot say.
      elements: of a tuple; names by default.
      resume: FIXED, FREE, GROWS or PLACE.
      sweep: its name in ``sweep.grid``, if a sweep can vary it.
      cache: whether it names a folder that the run can do without.
      before: its value in runs from before there was the field; None: its default.
    """

    help: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    problem: Callable[[Any], str | None] | None = None
    elements: Elements | None = None
    resume: str = FIXED
    sweep: str = ""
    cache: bool = False
    before: Any = None


class Leaf(NamedTuple):
    """A field of a config with its place."""

    kind: type  # bool, int, float, str, tuple, or dict for a section that may hold anything
    optional: bool  # whether None is allowed
    default: Any
    spec: Spec

    @property
    def before(self) -> Any:
        """The value of a run from before there was the field."""
        return self.default if self.spec.before is None else self.spec.before


def field(default: Any, help: str, **spec: Any) -> Any:
    """A field of a config dataclass; keywords are those of `Spec`."""
    stored = {"spec": Spec(help, **spec)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=stored)
    return dataclasses.field(default=default, metadata=stored)


@typing.dataclass_transform(eq_default=False, field_specifiers=(dataclasses.field,))
def section(cls: type[C]) -> type[C]:
    """A frozen dataclass. To editors its fields can be set, as those of its ConfigDict can."""
    return dataclasses.dataclass(frozen=True)(cls)


@functools.cache
def leaves(cls: type) -> Mapping[str, Leaf]:
    """Every field of a config dataclass by its path, such as "optimizer.learning_rate"."""
    found = {}
    hints = typing.get_type_hints(cls)
    for own in dataclasses.fields(cls):
        hint = hints[own.name]
        if dataclasses.is_dataclass(hint):
            found |= {f"{own.name}.{path}": leaf for path, leaf in leaves(hint).items()}
            continue
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kind = next(option for option in options if option is not type(None))
        default = own.default
        if default is dataclasses.MISSING and own.default_factory is not dataclasses.MISSING:
            default = own.default_factory()
        found[own.name] = Leaf(
            typing.get_origin(kind) or kind, len(options) > 1, default, own.metadata["spec"]
        )
    return types.MappingProxyType(found)


def sections(entries: Iterable[Any]) -> dict[str, type]:
    """The sections that entries of a registry own, by their names in lower case."""
    owned = dict.fromkeys(entry.section for entry in entries if entry.section is not None)
    return {own.__name__.lower(): own for own in owned}


def flatten(config: Any) -> dict[str, Any]:
    """``{"optimizer.learning_rate": 0.001, ...}`` of a ConfigDict, a mapping or a dataclass."""
    own = vars(config) if dataclasses.is_dataclass(config) else dict(config)
    flat = {}
    for name, value in own.items():
        if hasattr(value, "items") or dataclasses.is_dataclass(value):
            flat |= {f"{name}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The dicts whose `flatten` is ``flat``, names in alphabetical order."""
    found: dict[str, Any] = {}
    for path, value in sorted(flat.items()):
        *parents, name = path.split(".")
        node = found
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return found


def default(cls: type) -> ConfigDict:
    """The fields with their defaults, as a person edits them."""
    values = {}
    for path, leaf in leaves(cls).items():
        unset = leaf.optional and leaf.default is None
        values[path] = config_dict.placeholder(leaf.kind) if unset else leaf.default
    return ml_collections.ConfigDict(nested(values))


def with_values(config: C, values: Mapping[str, Any]) -> C:
    """A copy with other values of these fields, by path."""
    own, deeper = {}, {}
    for path, value in values.items():
        name, _, rest = path.partition(".")
        if rest:
            deeper.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    for name, below in deeper.items():
        own[name] = with_values(getattr(config, name), below)
    return dataclasses.replace(config, **own)  # pyright: ignore[reportArgumentType] (any dataclass)


def read(cls: type[C], given: Any) -> tuple[C, dict[str, str]]:
    """The config that is given (a ConfigDict, a mapping), and what is wrong with it, by field.

    Fields that are missing or hold a value of another kind have their defaults in the result, so
    that the others can still be compared with each other.
    """
    known, flat = leaves(cls), flatten(given)
    free = [path for path, leaf in known.items() if leaf.kind is dict]
    values, wrong, missing = {}, {}, []
    for path, leaf in known.items():
        if path in free:
            inside = f"{path}."
            held = {p.removeprefix(inside): v for p, v in flat.items() if p.startswith(inside)}
            if path in flat:
                wrong[path] = _is(path, flat[path], "must be a section with fields")
            values[path] = held
        elif path not in flat:
            missing.append(path)
            wrong[path] = f"config.{path} is missing; its default is {leaf.default!r}"
        elif words := _other_kind(flat[path], leaf):
            wrong[path] = _is(path, flat[path], f"must be {words}", 80)
        else:
            values[path] = _plain(flat[path], leaf.kind)
    if len(missing) > 3:  # a section or a config was made anew, not filled
        wrong = {path: words for path, words in wrong.items() if path not in missing}
        parts = {path.rpartition(".")[0] for path in missing}
        part = f"config.{parts.pop()}" if len(parts) == 1 and "" not in parts else "config"
        wrong[missing[0]] = (
            f"{part} lacks {len(missing)} fields, such as {', '.join(missing[:3])}; begin with "
            "default_config() or default_study() and set single fields, such as c.lora.rank = 8"
        )
    sections = {path.rpartition(".")[0] for path in known} - {""}
    for path, value in flat.items():
        if path in known or any(path.startswith(f"{one}.") for one in free):
            continue
        wrong[path] = (
            _is(path, value, "must be a section with fields", 80)
            if path in sections
            else f"config.{path}: there is no such field{likely(path, known)}"
        )
    config = with_values(cls(), {path: values[path] for path in known if path in values})
    return config, not_allowed(config) | dict(sorted(wrong.items()))


def likely(path: str, known: Iterable[str]) -> str:
    """The field that was meant: of this name elsewhere, of these initials, or spelt like it.

    >>> likely("lora.lr", ["optimizer.learning_rate"]), likely("seed", ["data.seed"])
    ('; did you mean optimizer.learning_rate?', '; did you mean data.seed?')
    """
    last, names = path.rpartition(".")[2], {one: one.rpartition(".")[2] for one in known}
    same = [one for one, name in names.items() if name == last]
    short = ["".join(word[:1] for word in name.split("_")) == last for name in names.values()]
    initials = [one for one, is_short in zip(names, short, strict=True) if is_short and last[1:]]
    best = (same or initials)[:1]
    return f"; did you mean {best[0]}?" if best else did_you_mean(path, names)


def not_allowed(config: Any, more: Iterable[Mistake] = ()) -> dict[str, str]:
    """What is wrong with the values of a config whose fields are of their kinds: lines, by field.

    Every field is held against its own `Spec`, then come the ``check`` of each section and
    ``more``; of several mistakes of a field the first is told.
    """
    flat, lines = flatten(config), {}
    for path, leaf in leaves(type(config)).items():
        if path in flat and (words := _not_allowed(flat[path], leaf.spec)):
            lines[path] = _is(path, flat[path], words)
    checks: list[Mistake] = []
    for name, value in vars(config).items():
        check = getattr(value, "check", None)
        if check is not None:
            checks += [(f"{name}.{path}", words) for path, words in check()]
    for path, allowed in (*checks, *more):
        lines.setdefault(path, _is(path, flat[path], f"must be {allowed}"))
    return lines


def describe(cls: type, config: Any) -> str:
    """Every field in order with its value, its meaning and what is allowed, for a person."""
    flat, lines, last = flatten(config), [], ""
    for path, leaf in leaves(cls).items():
        part = path.rpartition(".")[0]
        if part != last:
            lines.append("")
            last = part
        inside = f"{path}."
        held = {k.removeprefix(inside): v for k, v in flat.items() if k.startswith(inside)}
        lines.append(f"--config.{path}={held or flat.get(path, leaf.default)!r}")
        allowed = _allowed(leaf)
        words = leaf.spec.help + (f". {allowed[0].upper()}{allowed[1:]}" if allowed else "")
        lines += textwrap.wrap(words, 92, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def is_number(value: Any, *, whole: bool = False) -> bool:
    """Whether a value is a finite number. True and False are not numbers.

    >>> is_number(1), is_number(0.5), is_number(True), is_number(math.nan), is_number("1")
    (True, True, False, False, False)
    """
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return abs(int(value)) < 2**1000  # it can be a float
    return not whole and isinstance(value, float | np.floating) and math.isfinite(value)


def is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def is_names(value: Any) -> bool:
    """Whether it is a tuple of names."""
    return isinstance(value, tuple | list) and all(map(is_name, value))


def is_pair(value: Any, *, whole: bool = False) -> bool:
    """Whether it is a regular expression and a number above 0."""
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and isinstance(value[0], str)
        and is_number(value[1], whole=whole)
        and value[1] > 0
    )


NAMES = Elements("names", is_name)
WHOLE = Elements("whole numbers", functools.partial(is_number, whole=True))
RANKS = Elements("pairs (regex, rank), with ranks above 0", functools.partial(is_pair, whole=True))
ALPHAS = Elements("pairs (regex, alpha), with numbers above 0", is_pair)


def regex_problem(value: str | tuple) -> str | None:
    """What is wrong with a regular expression, or with the first of pairs whose head is one."""
    for regex in (value,) if isinstance(value, str) else (pair[0] for pair in value):
        try:
            re.compile(regex)
        except (re.error, OverflowError, RecursionError) as e:
            return f"not a regular expression: {e}"
    return None


def blank_problem(what: str) -> Callable[[str], str | None]:
    """A `Spec.problem` for texts that must not be blank."""
    return lambda value: None if value.strip() else f"must be {what}"


_KINDS = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text"}


def _other_kind(value: Any, leaf: Leaf) -> str | None:
    """What a value should have been, where it is of another kind than its field."""
    end = ", or None" if leaf.optional else ""
    if value is None and leaf.optional:
        return None
    if leaf.kind is tuple:
        elements = leaf.spec.elements or NAMES
        if not isinstance(value, tuple | list):
            return f"a tuple of {elements.words}"
        return None if all(map(elements.fits, value)) else elements.words
    if leaf.kind in (int, float):
        fits = is_number(value, whole=leaf.kind is int)
    else:
        fits = isinstance(value, leaf.kind)
    return None if fits else _KINDS[leaf.kind] + end


def _plain(value: Any, kind: type) -> Any:
    """The value in its field's own kind: JSON has lists for tuples, and whole floats."""
    if isinstance(value, list | tuple):
        return tuple(_plain(v, tuple) for v in value)
    return kind(value) if kind in (int, float) and value is not None else value


def _not_allowed(value: Any, spec: Spec) -> str | None:
    if value is None:
        return None
    if spec.choices and value not in spec.choices:
        return f"must be one of {', '.join(spec.choices)}{did_you_mean(value, spec.choices)}"
    for words, holds in _bounds(spec):
        if not holds(value):
            return f"must be {words}"
    return spec.problem(value) if spec.problem else None


def _bounds(spec: Spec) -> Iterator[tuple[str, Callable[[Any], bool]]]:
    least, most, above, below = spec.least, spec.most, spec.above, spec.below
    if least is not None and below is not None:
        yield f"in [{least}, {below})", lambda v: least <= v < below
        return
    if least is not None:
        yield ("0 or more" if least == 0 else f"at least {least}"), lambda v: v >= least
    if above is not None:
        yield f"above {above}", lambda v: v > above
    if most is not None:
        yield f"at most {most}", lambda v: v <= most
    if below is not None:
        yield f"below {below}", lambda v: v < below


def _allowed(leaf: Leaf) -> str:
    if leaf.spec.choices:
        return "one of " + ", ".join(leaf.spec.choices)
    # Counts begin where counts begin, and the largest bounds only catch slips of the hand.
    hidden = {"0 or more", "at least 1", f"at most {LARGE}", f"at most {MOST}"}
    return ", ".join(words for words, _ in _bounds(leaf.spec) if words not in hidden)


def _is(path: str, value: Any, words: str, length: int = 200) -> str:
    return f"config.{path}={repr(value)[:length]}: {words}"
