"""``python -m rmlora_jax``: the command ``rmlora``."""

from rmlora_jax.command.words import main

if __name__ == "__main__":
    main()
