"""``run.py`` that tells a file what it is about to do: ``phases.py FILE --config...``.

A line for each compilation, training step, evaluation, checkpoint and export when it begins, and
``-`` when one of them that has an end is over: who kills the run knows in what.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def tell(file: int, owner, name: str, phase: str, ends: bool = True) -> None:
    function = getattr(owner, name)

    def told(*args, **kwargs):
        os.write(file, f"{phase}\n".encode())
        try:
            return function(*args, **kwargs)
        finally:
            if ends:
                os.write(file, b"-\n")

    setattr(owner, name, told)


def main(path: str) -> None:
    from absl import app

    from rmlora_jax.command import actions, flags
    from rmlora_jax.train import checkpoint, finished, loop

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    tell(file, loop, "compile_steps", "compile")
    tell(file, loop, "row_of", "step", ends=False)
    tell(file, loop, "evaluate", "evaluation")
    tell(file, checkpoint, "write", "checkpoint", ends=False)  # goes on in a thread
    tell(file, finished, "write_adapter", "export")
    tell(file, loop, "write_report", "export")
    app.run(actions.main, flags_parser=flags.parse)


if __name__ == "__main__":
    main(sys.argv.pop(1))
