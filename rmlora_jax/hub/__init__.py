"""Hugging Face files in and out, without PyTorch."""

from rmlora_jax.hub.source import bundled, find_folder
from rmlora_jax.hub.text import PretrainedText, load_text
from rmlora_jax.hub.tokenizer import load_tokenizer
from rmlora_jax.hub.vit import Pretrained, load_vit

__all__ = [
    "Pretrained",
    "PretrainedText",
    "bundled",
    "find_folder",
    "load_text",
    "load_tokenizer",
    "load_vit",
]
