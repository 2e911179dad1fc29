"""The command: ``python -m rmlora_jax.bench --help``."""

import functools
import os
import sys

from rmlora_jax.errors import UserError


def main(arguments: list[str]) -> int:
    if "--peft" in arguments:
        # JAX would take most of a GPU before PyTorch sees it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from rmlora_jax.bench import options, run

    say = functools.partial(print, flush=True)
    try:
        given = options.parse(arguments)
        options.check_folder(given.out)
        say(run.header(given))
        if given.sweep:
            print(run.write_sweep(run.sweep(given, say), given.out))
        else:
            print(run.write(run.bench(given, say), given.out))
    except UserError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
