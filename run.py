"""Fine-tune a pretrained model: ``python run.py --config=configs/NAME.py --workdir=DIR``.

A config with a field ``study`` describes many runs; ``rmlora_jax.study`` trains them.

Use a trained model: ``python run.py --workdir=DIR --predict photos/``, or ``--predict "a prompt"``
and ``--chat`` for a language model.
"""

# ruff: noqa: E402 (Ctrl-C is heard before the imports that take seconds)

import os
import re
import signal
import sys
import threading


def heed_ctrl_c():
    """Has a thread wait for Ctrl-C, from now on: no KeyboardInterrupt, which a callback can lose.

    Threads and processes that start later leave SIGINT to it.
    """

    def heard(number, frame=None):
        stopping = sys.modules.get("rmlora_jax.stopping")
        if stopping is None or not hasattr(stopping, "watch"):  # not yet imported
            os.write(2, b"\nstopped: nothing has begun\n")
            os._exit(128 + number)
        stopping.ask(number)

    def wait():
        while True:
            heard(signal.sigwait([signal.SIGINT]))

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    signal.signal(signal.SIGINT, heard)  # where a library unblocks it
    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    heed_ctrl_c()

import traceback
from datetime import datetime
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.py"

IN_HOME = re.compile(r"\A(--?(?:config|workdir|out)=)(~[^:]*)")

CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="a Python file with get_config() (default: configs/quickstart.py); set any field "
    "with --config.a.b=value",
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "folder of the run; with a folder that has a run, that run continues. Default: a new folder "
    "under runs/",
)
PRINT_CONFIG = flags.DEFINE_bool(
    "print_config", False, "print every field with its value and its meaning, and exit"
)
PREDICT = flags.DEFINE_multi_string(
    "predict",
    None,
    "classify, or answer, with the model in --workdir (a run, an adapter or a model). Inputs are "
    "images, folders or patterns, separated by commas; or a text, @FILE for a file (.csv, .tsv and "
    ".jsonl by the model's columns, others with one text on each line), - for stdin. A language "
    "model reads prompt, messages or text in a .jsonl. Words without a flag are further inputs",
)
CHAT = flags.DEFINE_bool("chat", False, "talk with the language model in --workdir")
TOP = flags.DEFINE_integer("top", 1, "with --predict: classes shown for each input", lower_bound=1)
AT_ONCE = flags.DEFINE_integer(
    "at_once",
    None,
    "with --predict: inputs in one batch; fewer need less memory (default: 64, or 16 prompts)",
    lower_bound=1,
)
OUT = flags.DEFINE_string(
    "out", None, "with --predict: file to write (default: predictions.csv in --workdir, or "
    "answers.jsonl of a language model)"
)
# Of --predict and --chat with a language model; `rmlora_jax.inference` checks their ranges.
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "the most tokens of an answer")
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "of the draws of tokens; 0: always the most probable token"
)
TOP_K = flags.DEFINE_integer("top_k", 0, "draw from the k most probable tokens; 0: from all")
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "draw from the most probable tokens that have this much of the probability"
)
SEED = flags.DEFINE_integer("seed", 0, "of the draws of tokens")
STOP = flags.DEFINE_multi_string("stop", [], "a text that ends an answer; may be given repeatedly")
ADAPTER = flags.DEFINE_string(
    "adapter", None, "of several adapters in --workdir, each in a folder: the one that answers"
)
USES = (TOP, ADAPTER, MAX_NEW_TOKENS, TEMPERATURE, TOP_K, TOP_P, SEED, STOP)
EXPORT = flags.DEFINE_enum(
    "export",
    None,
    ["merged"],
    "write the whole model of the run in --workdir, at its best step, into its folder merged/, for "
    "transformers in PyTorch",
)
EXPORT_DTYPE = flags.DEFINE_enum(
    "export_dtype", None, ["float32", "bfloat16", "float16"],
    "with --export: of a language model's weights (default: that of its base's files)",
)
COMPILE_ONLY = flags.DEFINE_bool(
    "compile_only",
    False,
    "compile the training step, print its memory, flops and collectives, and exit, with code 1 if "
    "it does not fit in memory. Needs neither data nor weights",
)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "with --compile_only: an absent TPU to compile for, such as v5e:4x4"
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "join the processes of a cluster through jax.distributed first"
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, if jax cannot detect the cluster"
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "with --coordinator: their number")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "with --coordinator: the number of this one")
DEBUG = flags.DEFINE_bool("debug", False, "show the traceback of an error")


def main(argv):
    logging.set_verbosity(logging.WARNING)  # jax and TFDS tell of every file and backend at INFO
    # Imported here: --help and a mistyped flag need not wait for jax.
    from rmlora_jax import stopping
    from rmlora_jax.errors import UserError

    try:
        code = command(argv[1:])
        stopping.done()
        return code
    except UserError as e:
        stop(e)
    except stopping.Stopped as e:
        stop(e, stopping.RESUME)
    except KeyboardInterrupt:
        stop(KeyboardInterrupt("stopped outside of a step; the same command goes on"), 130)


def command(words):
    """Does what the flags ask for; ``words`` are the arguments without a flag."""
    from rmlora_jax.errors import UserError

    if PREDICT.value is not None:
        from rmlora_jax.inference.predict import predict
        from rmlora_jax.train.finished import model_of

        values = [*PREDICT.value, *words]
        shared = {"at_once": AT_ONCE.value, "out": OUT.value, "find": model_of}
        return predict(WORKDIR.value, values, **shared, **given_uses())
    if CHAT.value:
        from rmlora_jax.inference.chat import chat
        from rmlora_jax.train.finished import model_of

        return chat(WORKDIR.value, find=model_of, **given_uses())
    if named := list(given_uses()):
        raise UserError(f"--{named[0]} is for a trained model; add --predict or --chat")
    if EXPORT.value is not None:
        return export()
    if EXPORT_DTYPE.value:
        raise UserError("--export_dtype is for a merged model; add --export=merged")
    if words:
        flag = f"--config={words[0]}" if words[0].endswith(".py") else "--config.NAME=VALUE"
        raise UserError(f"unexpected argument {words[0]!r}; did you mean {flag}?")
    if PRINT_CONFIG.value:
        return print_config()
    if "study" in CONFIG.value:
        return study(CONFIG.value)
    if COMPILE_ONLY.value or TOPOLOGY.value:
        return compile_only()
    train()


def given_uses() -> dict[str, Any]:
    """The flags on how a trained model is used, as far as they are given."""
    return {flag.name: flag.value for flag in USES if flag.present}


def train():
    from rmlora_jax.sweep import grid
    from rmlora_jax.sweep import train as sweep
    from rmlora_jax.train import loop

    joins = bool(DISTRIBUTED.value or COORDINATOR.value)
    # Looking for files may ask jax which process this is, which it knows once they have joined.
    config = grid.check_config(CONFIG.value, there=not joins)
    if joins:
        join_processes()
    (sweep.train if config.is_sweep else loop.train)(config, workdir())


def print_config():
    from rmlora_jax import config
    from rmlora_jax.study.plan import Study
    from rmlora_jax.train.config import RunConfig

    print(config.describe(Study if "study" in CONFIG.value else RunConfig, CONFIG.value))


def export():
    from rmlora_jax.errors import UserError
    from rmlora_jax.train.finished import export_merged

    if not WORKDIR.value:
        raise UserError("--export needs the --workdir of a run")
    print(f"merged model: {export_merged(Path(WORKDIR.value), EXPORT_DTYPE.value)}")


def study(config):
    from rmlora_jax.errors import UserError
    from rmlora_jax.study.run import run_study

    if DISTRIBUTED.value or COORDINATOR.value:
        raise UserError("a study trains in one process; leave out --distributed")
    # No date in the folder's name: the same command goes on where it stopped.
    run_study(config, Path(WORKDIR.value or Path("runs", config.study)))


def compile_only():
    from rmlora_jax.aot.compile_only import compile_only
    from rmlora_jax.errors import UserError
    from rmlora_jax.sweep import grid

    if not COMPILE_ONLY.value:
        raise UserError("--topology is to compile for, not to train on; add --compile_only")
    if DISTRIBUTED.value or COORDINATOR.value:
        raise UserError("--compile_only needs one process; leave out --distributed")
    compile_only(grid.check_config(CONFIG.value), TOPOLOGY.value)


def join_processes():
    import jax

    from rmlora_jax.errors import UserError

    if not WORKDIR.value:
        raise UserError("several processes need one --workdir, on a disk that all of them see")
    try:
        jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    except (ValueError, RuntimeError) as e:
        raise UserError(
            f"the processes cannot be joined: {e}\n"
            "Give each --coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from e


def workdir() -> Path:
    if WORKDIR.value:
        return Path(WORKDIR.value)
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    return Path("runs", f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}")


class ConfigFile(flags.ArgumentParser):
    """Reads the file that --config names; its mistakes are told with their lines."""

    def __init__(self):
        self.config: Any = {}  # the one that was read last

    def parse(self, path):
        from rmlora_jax import config_file

        self.config = config_file.load(path)
        self.config.lock()
        return self.config

    def flag_type(self):
        return "config file"


PARSER = flags.FLAGS["config"].parser = ConfigFile()


def parse(argv):
    """Parses the flags; a mistake in them or in the config file is a line or two, no traceback."""
    # A shell expands ~ at the beginning of a word alone.
    argv = [IN_HOME.sub(lambda m: m[1] + os.path.expanduser(m[2]), a) for a in argv]
    try:  # ml_collections looks for fields in sys.argv, and does not open a --flagfile there
        argv = sys.argv[:] = [argv[0], *flags.FLAGS.read_flags_from_files(argv[1:])]
    except flags.Error as e:
        stop(e)
    given = [a.lstrip("-") for a in argv]
    predicting = any(a.partition("=")[0] == "predict" for a in given)
    using = predicting or any(a.partition("=")[0] in ("export", "chat") for a in given)
    flags.FLAGS.set_gnu_getopt(predicting)  # flags may follow the inputs
    if not using and not any(a.partition("=")[0] == "config" for a in given):
        # Not the flag's default: absl would apply the overrides to it even where another is named.
        argv = [argv[0], f"--config={QUICKSTART}", *argv[1:]]
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as e:  # how ml_collections reports an unknown field
        stop(unknown_field(given, e))
    except flags.UnrecognizedFlagError as e:
        stop(unknown_flag(e))
    except flags.IllegalFlagValueError as e:
        stop(wrong_value(e))
    except (flags.Error, TypeError, ValueError, OSError) as e:
        stop(e)


def fields_of_config() -> dict[str, Any]:
    from rmlora_jax.config import flatten

    return flatten(PARSER.config)


def unknown_field(given: list[str], error: BaseException) -> ValueError:
    """The first field on the command line that the config lacks."""
    from rmlora_jax.config import likely

    known = fields_of_config()
    paths = [a.partition("=")[0].removeprefix("config.") for a in given if a[:7] == "config."]
    sections = [path for path in paths if any(one.startswith(f"{path}.") for one in known)]
    unknown = next((path for path in paths if path not in {*known, *sections}), str(error))
    return ValueError(
        f"the config has no field {unknown}{likely(unknown, known)}\n"
        "--print_config lists the fields"
    )


def wrong_value(error: flags.IllegalFlagValueError) -> BaseException:
    """What the field of a flag must be; or the mistake in the config file, which absl wrapped."""
    from rmlora_jax.config_file import kind_of
    from rmlora_jax.errors import UserError

    if isinstance(error.__context__, UserError):
        return error.__context__
    path, _, value = str(error).partition(": ")[0].removeprefix("flag --config.").partition("=")
    kind = kind_of(PARSER.config, path)
    return ValueError(f"--config.{path}={value}: must be {kind}") if kind else error


def unknown_flag(error: flags.UnrecognizedFlagError) -> ValueError:
    """What to type for a flag that there is not."""
    from rmlora_jax.config import likely

    name, known = error.flagname, fields_of_config()
    own = [one.name for one in globals().values() if isinstance(one, flags.FlagHolder)]
    hint = likely(name, [*own, *(f"config.{field}" for field in known)]).replace("mean ", "mean --")
    return ValueError(
        f"there is no flag --{name}{hint}\nFields of the config are --config.NAME=VALUE; "
        "--print_config lists them, --help the flags"
    )


def with_lines(words: str) -> str:
    """``words`` with the lines of the config file that they are about."""
    if not flags.FLAGS.is_parsed() or CONFIG.value is None:
        return words
    from rmlora_jax import config_file

    flag = flags.FLAGS["config"]
    file = config_file.find(config_flags.get_config_filename(flag))
    return config_file.located(words, file, config_flags.get_override_values(flag))


def stop(error: BaseException, code: int = 1):
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    kind = "error" if code == 1 else "stopped"
    lines = with_lines(str(error).strip() or type(error).__name__).splitlines()
    print("\n".join(f"{kind}: {line}" for line in lines), file=sys.stderr, flush=True)
    # Not sys.exit: threads of data readers or of a checkpoint in flight must not delay the message.
    os._exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
