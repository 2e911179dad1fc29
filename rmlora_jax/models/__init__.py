"""Bundled models: Flax Linen, layers scanned, plain parameter trees."""

from rmlora_jax.models.vit import ViT
from rmlora_jax.models.vit_config import ViTConfig

__all__ = ["ViT", "ViTConfig"]
