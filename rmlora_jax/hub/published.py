"""The architecture of a model without its weights and without a network."""

import dataclasses
from pathlib import Path
from typing import Any

from rmlora_jax.errors import UserError
from rmlora_jax.hub.source import ASSETS, CONFIG, PACKAGED, bundled, find_folder, read_json
from rmlora_jax.hub.text import FAMILIES
from rmlora_jax.hub.vit import VIT
from rmlora_jax.models.family import Family

_BERT = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
}

# What decides the architecture in the config.json of models that configs/ names.
# Source: https://huggingface.co/NAME/raw/main/config.json of each.
PUBLISHED: dict[str, dict[str, Any]] = {
    "google/vit-base-patch16-224-in21k": _BERT | {
        "model_type": "vit",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "layer_norm_eps": 1e-12,
        "qkv_bias": True,
    },
    "microsoft/deberta-v3-base": _BERT | {
        "model_type": "deberta-v2",
        "vocab_size": 128100,
        "type_vocab_size": 0,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-7,
        "relative_attention": True,
        "position_buckets": 256,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
    },
    "FacebookAI/roberta-base": _BERT | {
        "model_type": "roberta",
        "vocab_size": 50265,
        "type_vocab_size": 1,
        "max_position_embeddings": 514,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
}


def find_architecture(source: str, *, image_size: int | None = None) -> tuple[Family, Any]:
    """The family and the config of a model, from its config.json alone.

    Looks for a local folder, a bundled or packaged model, the Hugging Face cache, and in
    ``PUBLISHED``. The network is never asked.

    Args:
      source: as for `find_folder`.
      image_size: pixels, in place of the model's own; for images only.

    Raises:
      UserError: no config.json there, or one that is not supported.

    >>> family, config = find_architecture("microsoft/deberta-v3-base")
    >>> config.hidden_size, config.span
    (768, 256)
    """
    where, raw = _read(source)
    families = {"vit": VIT} | FAMILIES
    kind = raw.get("model_type")
    if kind not in families:
        raise UserError(f"{where}: model_type is {kind!r}; there are {', '.join(families)}")
    family = families[kind]
    try:
        config = family.config.from_hf(raw)
        if image_size and family is VIT:
            config = dataclasses.replace(config, image_size=image_size)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from None
    return family, config


def _read(source: str) -> tuple[str, dict[str, Any]]:
    folder = Path(source).expanduser()
    if source in bundled():
        folder = ASSETS / source
    elif source in PACKAGED:
        folder = find_folder(source)
    if folder.is_dir():
        return str(folder / CONFIG), read_json(folder / CONFIG)
    if cached := _cached(source):
        return str(cached), read_json(cached)
    if source in PUBLISHED:
        return source, PUBLISHED[source]
    raise UserError(
        f"the architecture of {source!r} is not on this machine; type "
        f"`hf download {source} {CONFIG}` where there is a network, or give a local folder with "
        f"its {CONFIG}. Known without: {', '.join([*bundled(), *PUBLISHED])}"
    )


def _cached(source: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, CONFIG)
    except HFValidationError:  # a path that is no folder
        return None
    return Path(found) if isinstance(found, str) else None
