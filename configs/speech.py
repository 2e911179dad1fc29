"""Speakers told apart by cepstral frames: real speech, a minute on two CPU cores.

    pip install --no-deps aeon
    python run.py --config=configs/speech.py:base --workdir=runs/speech_base
    python run.py --config=configs/speech.py --config.method=rm_lora

The first run makes the base from the training utterances without their speakers: a transformer
that tells which sound is where it hears none. The second adapts it to tell the nine speakers apart.
"""

from rmlora_jax.train.config import default_config


def get_config(part="adapted"):
    c = default_config()
    c.task = "speech_classification"
    c.data.name = "japanese_vowels"
    c.model.dtype = "float32"
    c.batch_size = 16
    c.steps = 400
    c.eval_every = 100
    if part == "base":
        c.method = "full"
        c.model.source = ""
        c.speech.clusters = 32
        c.batch_size = 32
        c.steps = 1000
        c.eval_every = 250
    elif part == "adapted":
        c.model.source = "runs/speech_base"
        c.data.limit = 36  # four utterances a speaker; with all 243 a random base does as well
    else:
        raise ValueError(f"configs/speech.py:{part}: there are base and adapted")
    return c
