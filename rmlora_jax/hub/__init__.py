"""Hugging Face files in and out, without PyTorch."""

from rmlora_jax.hub.source import bundled, find_folder
from rmlora_jax.hub.vit import Pretrained, load_vit

__all__ = ["Pretrained", "bundled", "find_folder", "load_vit"]
