"""The trainer in scripts and notebooks: `rmlora_jax.train`, `load_config` and `load`.

What a command may leave behind when it ends, a function must put back: the compilation cache of
jax, hooks and the handlers of signals are the caller's own again once a run has ended.
"""

import contextlib
import dataclasses
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from rmlora_jax import extras
from rmlora_jax.errors import UserError
from rmlora_jax.stopping import Stopped

if TYPE_CHECKING:
    from rmlora_jax.train.config import RunConfig


P = ParamSpec("P")
R = TypeVar("R")


def named(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which names the extra to install where a library of the trainer is missing."""

    @functools.wraps(function)
    def run(*args: P.args, **keywords: P.kwargs) -> R:
        try:
            return function(*args, **keywords)
        except ModuleNotFoundError as error:
            words = extras.lacking(error)
            if words is None:
                raise
            raise UserError(words) from error

    return run


@named
def train(
    config: "str | os.PathLike | Mapping[str, Any] | RunConfig",
    workdir: str | os.PathLike,
    *,
    callbacks: Callable[[dict], object] | Iterable[Callable[[dict], object]] = (),
) -> dict[str, Any]:
    """Trains as a config says and returns what ``summary.json`` in ``workdir`` holds.

    The numbers are those of the command with the same config. The same call again goes on where the
    run stopped, or returns the summary of a run that is finished.

    Args:
      config: the name of a bundled config or a config file; what `load_config` gives; a dict of the
        fields that differ from the defaults, such as ``{"data.name": "digits", "steps": 100}``,
        nested or with dots; or a ``RunConfig`` of `rmlora_jax.train.config`.
      workdir: the folder of the run, made if missing.
      callbacks: a function, or several. Each is called with every line of ``metrics.jsonl``, a dict
        with ``"step"``; a line of a sweep also names its ``"run"``. If one raises, the run saves
        its step and ends, and the exception reaches the caller. Of several processes each calls
        them.

    Raises:
      UserError: the config is wrong, or a file, a library or memory is missing; the words say what
        to change.
      KeyboardInterrupt: Ctrl-C; the step under way is saved. The second Ctrl-C does not wait.

    ::

        config = rmlora_jax.load_config("quickstart")
        config.lora.rank = 4
        summary = rmlora_jax.train(config, "runs/digits", callbacks=print)
        model = rmlora_jax.load("runs/digits")
    """
    from rmlora_jax.sweep import grid
    from rmlora_jax.sweep import train as sweep
    from rmlora_jax.train import loop

    checked = grid.check_config(_given(config), there=True)
    told = [callbacks] if callable(callbacks) else [*callbacks]
    if wrong := next((one for one in told if not callable(one)), None):
        raise UserError(f"callbacks: {wrong!r} is not a function of a dict")
    run = sweep.train if checked.is_sweep else loop.train
    try:
        with _put_back():
            return run(checked, Path(workdir), told)
    except Stopped as stopped:
        if stopped.number != signal.SIGINT:  # it was only put off until all was saved
            signal.raise_signal(stopped.number)
        raise KeyboardInterrupt(str(stopped)) from None


@named
def load_config(name: str | os.PathLike = "") -> "RunConfig":
    """The config of a name or a file, to change and to give to `train`; without one the defaults.

    It is a ConfigDict, whose sections and fields are attributes. Editors complete their names. A
    name that does not exist and a value of another type are refused at once.

    >>> config = load_config("quickstart")
    >>> config.steps, config.lora.rank = 20, 4
    >>> config.lora.rnak = 4  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    AttributeError: 'Key "rnak" does not exist ...Did you mean "rank" instead of "rnak"?'

    Args:
      name: of a bundled config, ``NAME`` or ``NAME:ARGUMENT``, or the path of a config file.

    Raises:
      UserError: the config is unknown or has a mistake; the message names its line.
    """
    from rmlora_jax import config_file
    from rmlora_jax.train.config import default_config

    config: Any = config_file.load(os.fspath(name)) if name else default_config()
    config.lock()
    return config


@named
def load(folder: str | os.PathLike) -> Any:
    """The trained model in a folder, to classify or to write with.

    The folder is that of a run, of an adapter in PEFT's layout, or of a model in that of Hugging
    Face; see `rmlora_jax.hub.load`. Of a run that is not finished it is the best model so far.

    Raises:
      UserError: the folder holds no model, or a part of it is missing.

    ::

        rmlora_jax.load("runs/digits")(["seven.png"])[0].label
    """
    from rmlora_jax.train.finished import model_of

    return model_of(Path(folder))


def _given(config: Any) -> Any:
    """What the checks of a config read: a dataclass, a ConfigDict, or a flat dict of all fields."""
    from rmlora_jax.config import flatten
    from rmlora_jax.train.config import default_config

    if isinstance(config, str | os.PathLike):
        config = load_config(config)
    elif isinstance(config, Mapping):  # which a ConfigDict is not
        if odd := [key for key in flatten(config) if not isinstance(key, str)]:
            raise UserError(f"config: {odd[0]!r} is not the name of a field")
        return flatten(default_config()) | flatten(config)
    elif isinstance(config, type) or not (
        dataclasses.is_dataclass(config) or hasattr(config, "items")
    ):
        raise UserError(f"config is {type(config).__name__} {repr(config)[:80]}: give a name, a "
                        "file, a dict of fields, or what rmlora_jax.load_config gives")
    if hasattr(config, "study"):
        raise UserError("this config is of a study, which has many runs; give it to "
                        "rmlora_jax.study.run.run_study")
    return config


@contextlib.contextmanager
def _put_back() -> Iterator[None]:
    """The block may use another compilation cache than the program around it, and leave hooks."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    late, shown = sys.unraisablehook, threading.excepthook
    compilation_cache.reset_cache()  # jax opens it once, at the first compilation
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = late, shown
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
