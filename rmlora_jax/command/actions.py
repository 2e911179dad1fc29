"""What the flags ask for: train, predict, chat, export, compile.

The imports of the trainer are in the functions: ``--help`` and a mistyped flag need not wait.
"""

from datetime import datetime
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from rmlora_jax import called, configs, stopping
from rmlora_jax.command.flags import (
    AT_ONCE,
    CHAT,
    COMPILE_ONLY,
    CONFIG,
    COORDINATOR,
    DISTRIBUTED,
    EXPORT,
    NUM_PROCESSES,
    OUT,
    PREDICT,
    PRINT_CONFIG,
    PROCESS_ID,
    TOPOLOGY,
    WORKDIR,
    given_uses,
)
from rmlora_jax.command.mistakes import stop
from rmlora_jax.errors import UserError


def main(argv):
    logging.set_verbosity(logging.WARNING)  # jax and TFDS tell of every file and backend at INFO
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
    if PREDICT.value is not None:
        from rmlora_jax.inference.predict import predict
        from rmlora_jax.train.finished import model_of

        values = [*PREDICT.value, *words]
        shared = {"at_once": AT_ONCE.value, "out": OUT.value, "find": model_of}
        return predict(WORKDIR.value, values, **shared, **given_uses())
    if words:
        raise UserError(f"unexpected argument {words[0]!r}; did you mean {_flag_for(words[0])}?")
    if CHAT.value:
        from rmlora_jax.inference.chat import chat
        from rmlora_jax.train.finished import model_of

        return chat(WORKDIR.value, find=model_of, **given_uses())
    if named := list(given_uses()):
        both = "add --predict or --chat"
        if not called.is_script():
            both = f"type {called.program()} predict, or chat"
        raise UserError(f"--{named[0]} is for a trained model; {both}")
    if EXPORT.value is not None:
        return export()
    if PRINT_CONFIG.value:
        return print_config()
    if "study" in CONFIG.value:
        return study(CONFIG.value)
    if COMPILE_ONLY.value or TOPOLOGY.value:
        return compile_only()
    train()


def _flag_for(word: str) -> str:
    """The flag that a word was probably meant for."""
    if CHAT.value or EXPORT.value:
        return f"--workdir={word}"
    is_config = word.endswith(".py") or configs.file_of(word.partition(":")[0])
    return f"--config={word}" if is_config else "--config.NAME=VALUE"


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
    from rmlora_jax.train.finished import export_merged

    if not WORKDIR.value:
        raise UserError(f"which run? Type {called.command('export', '--workdir=DIR')}")
    print(f"merged model: {export_merged(Path(WORKDIR.value))}")


def study(config):
    from rmlora_jax.study.run import run_study

    if DISTRIBUTED.value or COORDINATOR.value:
        raise UserError("a study trains in one process; leave out --distributed")
    # No date in the folder's name: the same command goes on where it stopped.
    run_study(config, Path(WORKDIR.value or Path("runs", config.study)))


def compile_only():
    from rmlora_jax.aot.compile_only import compile_only
    from rmlora_jax.sweep import grid

    if not COMPILE_ONLY.value:
        raise UserError("--topology is to compile for, not to train on; add --compile_only")
    if DISTRIBUTED.value or COORDINATOR.value:
        raise UserError("--compile_only needs one process; leave out --distributed")
    compile_only(grid.check_config(CONFIG.value), TOPOLOGY.value)


def join_processes():
    import jax

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
    file = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    return Path("runs", f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{Path(file).stem}")
