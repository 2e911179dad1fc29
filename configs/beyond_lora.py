"""Is a random mask of use beyond LoRA? BitFit, prefixes and bottlenecks, masked and not.

    pip install --no-deps aeon
    python run.py --config=configs/speech.py:base --workdir=runs/speech_base
    python run.py --config=configs/beyond_lora.py
"""

from rmlora_jax.study.config import default_study


def get_config():
    c = default_study()
    c.study = "beyond_lora"
    # Two tasks, so that the rate is chosen for the masked methods and the others apart.
    task = "configs/speech.py data.validation=108"
    c.tasks = (f"{task} as plain", f"{task} rm.also=True as masked")
    c.methods = ("bitfit", "prefix", "bottleneck")
    c.method_set.bitfit = ("rm.unit=element",)  # a draw for each bias
    c.method_set.prefix = ("rm.unit=element",)  # for each entry of a prefix vector
    c.method_set.bottleneck = ("rm.unit=rank",)  # for each of its directions
    c.rates = (1e-3, 3e-3, 1e-2, 3e-2)
    c.pictures = ("table",)
    return c
