"""What a person at the terminal reads: errors, hints and progress."""

import difflib
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """Something the person at the terminal can put right.

    The message is one or two plain lines: what is wrong, where, and what to type next. A command
    prints it without a traceback and exits with a code other than 0.
    """


def first_line(error: BaseException) -> str:
    """What an error of another library says, without what follows; its kind if it says nothing.

    >>> first_line(ValueError(" no such axis\\nadvice")), first_line(EOFError())
    ('no such axis', 'EOFError')
    """
    return str(error).strip().partition("\n")[0] or type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean rm_lora?"`` for a word that is near one that is known, else nothing.

    >>> did_you_mean("rm_lore", ["lora", "rm_lora"]), did_you_mean("x", ["lora"])
    ('; did you mean rm_lora?', '')
    """
    near = difflib.get_close_matches(str(word), known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def tell(words: object, kind: str = "error") -> None:
    """Prints ``words`` on standard error, a line each, with ``kind`` in front."""
    lines = str(words).splitlines()
    print("\n".join(f"{kind}: {line}" for line in lines), file=sys.stderr, flush=True)


def progress(total: int, desc: str, unit: str, **options):
    """A tqdm bar on standard error; in a file or a pipe, at most one line every ten seconds."""
    from tqdm import tqdm

    pace = {} if sys.stderr.isatty() else {"mininterval": 10, "maxinterval": 10}
    return tqdm(total=total, desc=desc, unit=unit, **pace, **options)
