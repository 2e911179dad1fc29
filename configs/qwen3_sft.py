"""Qwen3 8B on chats of one's own: ``--config.sft.files="('chats.jsonl',)"``."""

from rmlora_jax.configs import llama3_sft


def get_config():
    c = llama3_sft.get_config()
    c.model.source = "Qwen/Qwen3-8B"
    return c
