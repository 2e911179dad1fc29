"""Gemma 3 1B on chats of one's own: ``--config.sft.files="('chats.jsonl',)"``."""

from rmlora_jax.configs import llama3_sft


def get_config():
    c = llama3_sft.get_config()
    c.model.source = "google/gemma-3-1b-it"
    c.sft.length = 2048
    return c
