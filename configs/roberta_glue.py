"""RoBERTa-base on a GLUE task under the settings of the paper: ``configs/roberta_glue.py:cola``."""

from configs import deberta_glue


def get_config(task="cola"):
    c = deberta_glue.get_config(task)
    c.model.source = "FacebookAI/roberta-base"
    return c
