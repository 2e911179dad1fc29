"""Hugging Face files in and out, without PyTorch."""

from rmlora_jax.hub.classifier import Classifier, Prediction, load
from rmlora_jax.hub.pretrained import load_pretrained
from rmlora_jax.hub.source import bundled, find_folder
from rmlora_jax.hub.text import PretrainedText, load_text, new_text_head
from rmlora_jax.hub.tokenizer import load_tokenizer
from rmlora_jax.hub.vit import Pretrained, load_vit, new_vit_head

__all__ = [
    "Classifier",
    "Prediction",
    "Pretrained",
    "PretrainedText",
    "bundled",
    "find_folder",
    "load",
    "load_pretrained",
    "load_text",
    "load_tokenizer",
    "load_vit",
    "new_text_head",
    "new_vit_head",
]
