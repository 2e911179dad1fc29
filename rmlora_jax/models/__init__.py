"""Bundled models: Flax Linen, layers scanned, plain parameter trees.

``FAMILIES`` is the registry: the ``model_type`` of a config.json -> the `Family` that reads it.
"""

from rmlora_jax.models.bert import BERT, CAMEMBERT, ROBERTA, XLM_ROBERTA, Bert, BertConfig
from rmlora_jax.models.deberta import DEBERTA, Deberta, DebertaConfig
from rmlora_jax.models.decoder import Decoder, DecoderConfig, new_cache
from rmlora_jax.models.decoder_families import DECODERS
from rmlora_jax.models.family import Family
from rmlora_jax.models.vit import VIT, ViT, ViTConfig

FAMILIES: dict[str, Family] = {
    "vit": VIT,
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": XLM_ROBERTA,
    "camembert": CAMEMBERT,
    "deberta-v2": DEBERTA,  # v3 too
    **DECODERS,
}

__all__ = [
    "FAMILIES",
    "Bert",
    "BertConfig",
    "Deberta",
    "DebertaConfig",
    "Decoder",
    "DecoderConfig",
    "Family",
    "ViT",
    "ViTConfig",
    "new_cache",
]
