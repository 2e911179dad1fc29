"""How the person called this program, so that messages name the command that they have.

The installed package has the command ``rmlora``; a checkout also has ``python run.py``.
"""

import sys
from pathlib import Path

PACKAGE = Path(__file__).parent
SCRIPT = PACKAGE.parent / "run.py"
SCRIPT_CALL = f"python {SCRIPT.name}"

# What rmlora has as a word is a flag of run.py.
WORDS = {"train": "", "predict": "--predict", "chat": "--chat", "export": "--export=merged"}


def program() -> str:
    """``rmlora``, ``python -m rmlora_jax`` or ``python run.py``; that which is there for a library.

    >>> import unittest.mock
    >>> with unittest.mock.patch("sys.argv", ["/usr/bin/rmlora"]):
    ...     program()
    'rmlora'
    """
    called = Path(sys.argv[0] if sys.argv else "")
    if called.stem == "rmlora":
        return "rmlora"
    if called == PACKAGE / "__main__.py":
        return f"python -m {PACKAGE.name}"
    return SCRIPT_CALL if SCRIPT.is_file() else "rmlora"


def is_script() -> bool:
    """Whether the person has run.py: it was called, or a library is used in its checkout."""
    return program() == SCRIPT_CALL


def command(word: str, flags: str = "", inputs: str = "") -> str:
    """What to type for one of ``WORDS``.

    >>> import unittest.mock
    >>> with unittest.mock.patch("sys.argv", ["/usr/bin/rmlora"]):
    ...     command("predict", "--workdir=runs/a", "photos/")
    'rmlora predict --workdir=runs/a photos/'
    >>> with unittest.mock.patch("sys.argv", ["run.py"]):  # in a checkout
    ...     command("predict", "--workdir=runs/a", "photos/")
    'python run.py --workdir=runs/a --predict photos/'
    """
    name = program()
    parts = (name, flags, WORDS[word]) if is_script() else (name, word, flags)
    return " ".join(filter(None, (*parts, inputs)))


def bench() -> str:
    """What to type to time training steps."""
    return f"python -m {PACKAGE.name}.bench" if is_script() else f"{program()} bench"


def config(name: str) -> str:
    """How a bundled config is given, ``NAME`` or ``NAME:ARGUMENT``; run.py knows its path, too.

    >>> import unittest.mock
    >>> with unittest.mock.patch("sys.argv", ["run.py"]):  # in a checkout
    ...     config("speech:base")
    'configs/speech.py:base'
    """
    file, colon, argument = name.partition(":")
    return f"configs/{file}.py{colon}{argument}" if is_script() else name
