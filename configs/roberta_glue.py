"""RoBERTa-base on a GLUE task under the settings of the paper: ``roberta_glue:cola``."""

from rmlora_jax.configs import deberta_glue


def get_config(task="cola"):
    c = deberta_glue.get_config(task)
    c.model.source = "FacebookAI/roberta-base"
    return c
