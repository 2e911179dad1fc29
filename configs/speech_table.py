"""The paper's comparison on a third kind of data: speakers told apart by cepstral frames.

    pip install --no-deps aeon
    python run.py --config=configs/speech.py:base --workdir=runs/speech_base
    python run.py --config=configs/speech_table.py
"""

from rmlora_jax.study.config import default_study


def get_config():
    c = default_study()
    c.study = "speech_table"
    # 36 utterances to learn from, 108 to choose the rate by, 370 to test.
    c.tasks = ("configs/speech.py data.validation=108",)
    c.methods = (
        "full", "head", "lora", "adalora", "sora", "reg_only", "mask_only", "rm_lora",
    )
    c.rates = (1e-3, 3e-3, 1e-2, 3e-2)  # of a model so small that they are larger than elsewhere
    c.full_rates = (1e-4, 3e-4, 1e-3, 3e-3)
    c.head_rates = (3e-3, 1e-2, 3e-2, 1e-1)
    c.pictures = ("table", "gap")
    return c
