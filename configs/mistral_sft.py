"""Mistral 7B on chats of one's own: ``--config.sft.files="('chats.jsonl',)"``."""

from rmlora_jax.configs import llama3_sft


def get_config():
    c = llama3_sft.get_config()
    c.model.source = "mistralai/Mistral-7B-Instruct-v0.3"
    c.optimizer.learning_rate = 1e-4
    return c
