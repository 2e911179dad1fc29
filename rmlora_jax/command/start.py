"""Where a command begins: Ctrl-C is heard, and a library that is missing is told in two lines."""

import sys
from collections.abc import Callable, Sequence

from rmlora_jax import extras, stopping
from rmlora_jax.errors import UserError, tell


def start(run: Callable[[Sequence[str]], int | None]) -> None:
    """Ends the process with the exit code of ``run(arguments)``."""
    stopping.heed()
    try:
        sys.exit(run(sys.argv[1:]))
    except UserError as error:
        tell(error)
    except ModuleNotFoundError as error:
        words = extras.lacking(error)
        if words is None:
            raise
        tell(words)
    sys.exit(1)


def flagged(arguments: Sequence[str]) -> None:
    """Does what the flags of run.py ask for, and ends the process."""
    from absl import app

    from rmlora_jax.command import actions, flags

    app.run(actions.main, [sys.argv[0], *arguments], flags_parser=flags.parse)


def script() -> None:
    """The command run.py."""
    start(flagged)
