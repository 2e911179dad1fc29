"""Mistakes on the command line and in a config file, told in a line or two."""

import os
import sys
import traceback
from collections.abc import Iterable
from typing import NoReturn

from absl import flags
from ml_collections import config_flags

from rmlora_jax import errors


def unknown_field(given: list[str], known: Iterable[str], error: BaseException) -> ValueError:
    """The first field on the command line that the config lacks."""
    from rmlora_jax.config import likely

    paths = [a.partition("=")[0].removeprefix("config.") for a in given if a[:7] == "config."]
    sections = [path for path in paths if any(one.startswith(f"{path}.") for one in known)]
    unknown = next((path for path in paths if path not in {*known, *sections}), str(error))
    return ValueError(
        f"the config has no field {unknown}{likely(unknown, known)}\n"
        "--print_config lists the fields"
    )


def wrong_value(error: flags.IllegalFlagValueError, config) -> BaseException:
    """What the field of a flag must be; or the mistake in the config file, which absl wrapped."""
    from rmlora_jax.config_file import kind_of

    if isinstance(error.__context__, errors.UserError):
        return error.__context__
    path, _, value = str(error).partition(": ")[0].removeprefix("flag --config.").partition("=")
    kind = kind_of(config, path)
    return ValueError(f"--config.{path}={value}: must be {kind}") if kind else error


def unknown_flag(name: str, own: Iterable[str], known: Iterable[str]) -> ValueError:
    """What to type for a flag that there is not, among the ``own`` ones and the fields."""
    from rmlora_jax.config import likely

    hint = likely(name, [*own, *(f"config.{field}" for field in known)]).replace("mean ", "mean --")
    return ValueError(
        f"there is no flag --{name}{hint}\nFields of the config are --config.NAME=VALUE; "
        "--print_config lists them, --help the flags"
    )


def with_lines(words: str) -> str:
    """``words`` with the lines of the config file that they are about."""
    if not flags.FLAGS.is_parsed() or flags.FLAGS.config is None:
        return words
    from rmlora_jax import config_file

    flag = flags.FLAGS["config"]
    file = config_file.find(config_flags.get_config_filename(flag))
    return config_file.located(words, file, config_flags.get_override_values(flag))


def stop(error: BaseException, code: int = 1) -> NoReturn:
    """Ends the process with the words of ``error``."""
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    words = with_lines(str(error).strip() or type(error).__name__)
    errors.tell(words, "error" if code == 1 else "stopped")
    # Not sys.exit: threads of data readers or of a checkpoint in flight must not delay the message.
    os._exit(code)
