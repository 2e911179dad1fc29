"""Bundled models: Flax Linen, layers scanned, plain parameter trees."""

from rmlora_jax.models.bert import Bert
from rmlora_jax.models.bert_config import BertConfig
from rmlora_jax.models.deberta import Deberta
from rmlora_jax.models.deberta_config import DebertaConfig
from rmlora_jax.models.vit import ViT
from rmlora_jax.models.vit_config import ViTConfig

__all__ = ["Bert", "BertConfig", "Deberta", "DebertaConfig", "ViT", "ViTConfig"]
