"""Fine-tune a pretrained model: ``python run.py --config=configs/NAME.py --workdir=DIR``.

A config with a field ``study`` describes many runs; ``rmlora_jax.study`` trains them.

Use a trained model: ``python run.py --workdir=DIR --predict photos/``, or ``--predict "a prompt"``
and ``--chat`` for a language model. The installed package has the same as the command ``rmlora``.
"""

from rmlora_jax.command.start import script

if __name__ == "__main__":
    script()
