"""The command ``rmlora``, and ``python -m rmlora_jax``: a word, then its arguments.

A word of the trainer stands for a flag of run.py, and takes the same flags.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from rmlora_jax import __version__, called, configs
from rmlora_jax.command import help as help_text
from rmlora_jax.command.start import flagged, start
from rmlora_jax.errors import UserError, did_you_mean


def main() -> None:
    """The command ``rmlora``."""
    start(run)


def run(arguments: Sequence[str]) -> int | None:
    """Does what the first word asks for, with the rest; returns the exit code.

    Raises:
      UserError: the word is unknown, or its arguments are wrong.
    """
    word, *rest = arguments or ["--help"]
    if word in (*help_text.ASKED, "help"):
        print(help_text.of_program())
    elif word == "--version":
        print(f"rmlora-jax {__version__}")
    elif word not in help_text.WORDS:
        raise UserError(_unknown(word))
    elif word == "bench":
        from rmlora_jax.bench.__main__ import main as bench

        return bench(rest)
    elif any(one in help_text.ASKED for one in rest):
        print(help_text.of_word(word, _meanings() if word in called.WORDS else {}))
    elif word == "configs":
        list_configs(rest)
    elif word == "new":
        new(rest)
    else:
        flag = called.WORDS[word].replace("--predict", "--predict=")  # the inputs are words, too
        flagged([*filter(None, [flag]), *rest])


def list_configs(arguments: Sequence[str]) -> None:
    """Prints the name of each bundled config, and what it trains."""
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; type {called.program()} configs")
    width = max(map(len, configs.names()))
    lines = [f"{name:{width}}  {configs.summary(name)}" for name in configs.names()]
    train, copy = called.command("train", "--config=NAME"), f"{called.program()} new my.py"
    print("\n".join([*lines, "", f"{train} trains one; {copy} --config=NAME copies it"]))


def new(arguments: Sequence[str]) -> None:
    """Copies a bundled config to a new file: that of ``--config``, of its name, or the quickstart.

    Raises:
      UserError: the config is unknown, or the file cannot be made.
    """
    usage = f"type {called.program()} new my.py --config=NAME"
    named = [one.partition("=")[2] for one in arguments if one.startswith("--config=")]
    files = [one for one in arguments if not one.startswith("-")]
    if len(files) != 1 or len(files) + len(named) != len(arguments) or len(named) > 1:
        raise UserError(f"new takes a file to make and the config to copy; {usage}")
    target = Path(files[0]).expanduser()
    if target.suffix != ".py":
        raise UserError(f"{files[0]!r}: a config is a Python file; type "
                        f"{called.program()} new {target.stem or 'my'}.py")
    own = target.stem if target.stem in configs.names() else "quickstart"
    name = named[0] if named else own
    source = configs.file_of(name)
    if source is None:
        hint = did_you_mean(name, configs.names())
        raise UserError(f"there is no bundled config {name!r}{hint}\n"
                        f"{called.program()} configs lists them")
    try:
        with source.open("rb") as there, target.open("xb") as copy:
            shutil.copyfileobj(there, copy)
    except FileExistsError:
        raise UserError(f"{target} exists already; give another name") from None
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}; give another place") from None
    print(f"{target}: a copy of the config {source.stem}; change it, then type\n"
          f"{called.command('train', f'--config={target}')}")


def _meanings() -> dict[str, str]:
    from rmlora_jax.command.flags import own_flags

    return own_flags()


def _unknown(word: str) -> str:
    name = called.program()
    if word.startswith("-"):
        return (f"{word}: a command comes first, such as {name} train {word}\n"
                f"{name} --help lists them")
    return (f"there is no command {word!r}{did_you_mean(word, help_text.WORDS)}\n"
            f"{name} --help lists them")
