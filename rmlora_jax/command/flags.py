"""The flags of a command, and their parsing."""

import os
import re
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from rmlora_jax import configs
from rmlora_jax.command import help as help_text
from rmlora_jax.command.mistakes import stop, unknown_field, unknown_flag, wrong_value

QUICKSTART = configs.FOLDER / "quickstart.py"

IN_HOME = re.compile(r"\A(--?(?:config|workdir|out)=)(~[^:]*)")

CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="a bundled config by its name, or a Python file with get_config(); default: "
    "quickstart. --config.a.b=VALUE sets a field",
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
    "what to classify, or to answer, with the model in --workdir (a run, an adapter or a model): "
    "images, folders or patterns, separated by commas; or a text, @FILE for a file (.csv, .tsv and "
    ".jsonl by the model's columns, others with one text on each line), - for stdin. A language "
    "model reads prompt, messages or text in a .jsonl. Words without a flag are further inputs",
)
CHAT = flags.DEFINE_bool("chat", False, "talk with the language model in --workdir")
TOP = flags.DEFINE_integer("top", 1, "classes shown for each prediction", lower_bound=1)
AT_ONCE = flags.DEFINE_integer(
    "at_once",
    None,
    "inputs predicted in one batch; fewer need less memory (default: 64, or 16 prompts)",
    lower_bound=1,
)
OUT = flags.DEFINE_string(
    "out", None, "file for the predictions (default: predictions.csv in --workdir, or "
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
USES = (TOP, MAX_NEW_TOKENS, TEMPERATURE, TOP_K, TOP_P, SEED, STOP)
EXPORT = flags.DEFINE_enum(
    "export",
    None,
    ["merged"],
    "write the whole model of the run in --workdir, at its best step, into its folder merged/, for "
    "transformers in PyTorch",
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


def given_uses() -> dict[str, Any]:
    """The flags on how a trained model is used, as far as they are given."""
    return {flag.name: flag.value for flag in USES if flag.present}


def own_flags() -> dict[str, str]:
    """Each flag of ours, with its meaning."""
    own = [flag.name for flag in globals().values() if isinstance(flag, flags.FlagHolder)]
    defaults = {name: flags.FLAGS[name].default for name in own}
    shown = {name: f" (default: {value})" for name, value in defaults.items() if value}
    # Behind a semicolon absl says what ours say themselves.
    meanings = {name: str(flags.FLAGS[name].help).partition(";\n")[0] for name in own}
    return {name: f"{meanings[name]}{shown.get(name, '')}" for name in own}


def fields_of_config() -> dict[str, Any]:
    from rmlora_jax.config import flatten

    return flatten(PARSER.config)


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
    if any(a in help_text.ASKED for a in argv):
        print(help_text.of_script(own_flags()))
        sys.exit(0)
    predicting = any(a.partition("=")[0] == "predict" for a in given)
    using = predicting or any(a.partition("=")[0] in ("export", "chat") for a in given)
    flags.FLAGS.set_gnu_getopt(predicting)  # flags may follow the inputs
    if not using and not any(a.partition("=")[0] == "config" for a in given):
        # Not the flag's default: absl would apply the overrides to it even where another is named.
        argv = [argv[0], f"--config={QUICKSTART}", *argv[1:]]
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as e:  # how ml_collections reports an unknown field
        stop(unknown_field(given, fields_of_config(), e))
    except flags.UnrecognizedFlagError as e:
        stop(unknown_flag(e.flagname, own_flags(), fields_of_config()))
    except flags.IllegalFlagValueError as e:
        stop(wrong_value(e, PARSER.config))
    except (flags.Error, TypeError, ValueError, OSError) as e:
        stop(e)
