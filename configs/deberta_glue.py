"""The paper's main setting: DeBERTa-v3-base on a GLUE task, ``deberta_glue:cola``."""

from rmlora_jax.train.config import default_config, use_glue


def get_config(task="cola"):
    c = default_config()
    use_glue(c, task)
    c.model.source = "microsoft/deberta-v3-base"
    c.model.base_dtype = "bfloat16"
    c.epochs = 5.0
    c.batch_size = 32
    c.text.max_length = 128
    c.lora.rank = 4
    c.lora.alpha = 16.0
    c.lora.init = "normal"  # N(0, 0.02^2)
    c.rm.penalty = 0.1
    c.rm.draw = "exact"  # the released "random_rank": 2 of the 4 directions, A and B the same
    c.rm.keep = 2.0
    c.optimizer.learning_rate = 1e-3
    return c
