"""How the config.json of each family of decoders is read: in the words of `DecoderConfig`.

`READERS` has one `Reader` for each ``model_type``.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rmlora_jax.models.config import LARGEST, refuse, refuse_unknown
from rmlora_jax.models.rope import Rope, read_rope

SLIDING, FULL = "sliding_attention", "full_attention"

# Fields of config.json whose name and meaning are those of `DecoderConfig`.
SAME = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"),
    *("initializer_range", "max_position_embeddings", "tie_word_embeddings"),
)
ROPES = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
# Defaults that most families share.
COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rope_theta": 1e4,
}
# What readers compute with, before `DecoderConfig` checks it.
ARITHMETIC = {
    *("num_hidden_layers", "hidden_size", "max_position_embeddings", "query_pre_attn_scalar"),
    *("sliding_window", "max_window_layers", "sliding_window_pattern", "no_rope_layer_interval"),
}
# Fields that change the numbers at any other value than this, which published models have.
NEUTRAL = {
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_bidirectional_attention": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "use_mrope": False,
}
# Of every family, beside BOOKKEEPING: which cache generation uses, how products were split in
# pre-training, what other programs read.
INERT = (
    *("pretraining_tp", "cache_implementation", "is_llama_config", "transformers.js_config"),
    *("is_decoder", "pruned_heads", "cross_attention_hidden_size", "auto_map", "unsloth_fixed"),
    *("unsloth_version", "tie_encoder_decoder", "model_name"),
)


@dataclasses.dataclass(frozen=True)
class Reader:
    """How the config.json of one model_type is read.

    Attributes:
      read: config.json with the defaults -> fields of `DecoderConfig`, beside the common ones.
      defaults: of fields whose default differs from `DecoderConfig`'s, or that are no field of it.
      inert: fields that transformers stores and does not read.
    """

    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    defaults: dict[str, Any]
    inert: tuple[str, ...] = INERT


def _rope(raw: Mapping[str, Any]) -> Rope:
    """The rope of ``rope_scaling`` or ``rope_parameters``, and of ``rope_theta``."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        refuse("rope_parameters", given, "a dictionary")
    longest = raw["max_position_embeddings"]
    original = raw.get("original_max_position_embeddings")
    return read_rope(given, raw["rope_theta"], longest, original)


def _llama(raw):
    bias = raw["attention_bias"]
    return {"qkv_bias": bias, "out_bias": bias, "mlp_bias": raw["mlp_bias"]}


def _mistral(raw):
    return {"sliding_window": raw["sliding_window"] or 0}


def _qwen2(raw):
    return {"qkv_bias": True, **_late_windows(raw)}


def _qwen3(raw):
    bias = raw["attention_bias"]
    return {"qkv_bias": bias, "out_bias": bias, "qk_norm": True, **_late_windows(raw)}


def _late_windows(raw):
    """Windows of Qwen: on every layer from ``max_window_layers`` on."""
    window = raw["sliding_window"] if raw["use_sliding_window"] else 0
    first = raw["max_window_layers"] if window else raw["num_hidden_layers"]
    kinds = [SLIDING if i >= first else FULL for i in range(raw["num_hidden_layers"])]
    return _windows(raw, window, kinds)


def _windows(raw, window: int, kinds: list[str]):
    """The fields of windows, ``layer_types`` of the file before ``kinds``."""
    kinds = raw.get("layer_types") or kinds
    if not isinstance(kinds, list | tuple) or not all(isinstance(kind, str) for kind in kinds):
        refuse("layer_types", kinds, "a list of names")
    slides = SLIDING in kinds
    return {"sliding_window": window if slides else 0, "layer_types": tuple(kinds)}


def _gemma(raw, kinds: list[str]):
    bias = raw["attention_bias"]
    return {
        "hidden_act": raw["hidden_activation"],
        "qkv_bias": bias,
        "out_bias": bias,
        "post_norm": True,
        "norm_plus_one": True,
        "embed_scale": raw["hidden_size"] ** 0.5,
        "query_pre_attn_scalar": raw["query_pre_attn_scalar"],
        "final_logit_softcapping": raw.get("final_logit_softcapping") or 0.0,
        **_windows(raw, raw["sliding_window"] or 0, kinds),
    }


def _gemma2(raw):
    kinds = [FULL if i % 2 else SLIDING for i in range(raw["num_hidden_layers"])]
    softcap = raw.get("attn_logit_softcapping") or 0.0
    return _gemma(raw, kinds) | {"attn_logit_softcapping": softcap}


def _gemma3(raw):
    every = raw["sliding_window_pattern"]
    kinds = [SLIDING if (i + 1) % every else FULL for i in range(raw["num_hidden_layers"])]
    ropes = raw.get("rope_parameters") or {}
    if not isinstance(ropes, Mapping) or ropes.keys() - {SLIDING, FULL}:
        refuse("rope_parameters", ropes, f"a dictionary of {SLIDING!r} and {FULL!r}")
    # rope_scaling, in the old spelling, is that of full layers.
    scaling = raw.get("rope_scaling") or ropes.get(FULL)
    return {
        **_gemma(raw, kinds),
        "qk_norm": True,
        "rope": _rope(raw | {"rope_scaling": None, "rope_parameters": scaling}),
        "local_rope": _rope(
            raw
            | {"rope_scaling": None, "rope_parameters": ropes.get(SLIDING)}
            | {"rope_theta": raw["rope_local_base_freq"]}
        ),
    }


def _smollm3(raw):
    every, layers = raw["no_rope_layer_interval"], range(raw["num_hidden_layers"])
    rotates = raw["no_rope_layers"] or [(i + 1) % every != 0 for i in layers]
    if not isinstance(rotates, list) or len(rotates) < len(layers):
        refuse("no_rope_layers", rotates, f"a list for {len(layers)} layers")
    rotates = rotates[: len(layers)]
    window = raw["sliding_window"] if raw["use_sliding_window"] else 0
    kinds = [SLIDING if window and not turns else FULL for turns in rotates]
    return {
        **_llama(raw),
        "rope_layers": tuple(bool(turns) for turns in rotates),
        **_windows(raw, window, kinds),
    }


_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "layer_types": None}
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 2304,
    "intermediate_size": 9216,
}
_QWEN = {
    **_WINDOWS,
    "max_window_layers": 28,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "max_position_embeddings": 32768,
    "rope_theta": 1e4,
}

# model_type -> reader. Defaults are those of transformers' configuration_NAME.py.
READERS = {
    "llama": Reader(_llama, {"attention_bias": False, "mlp_bias": False, "rope_theta": 1e4}),
    "mistral": Reader(
        _mistral,
        {
            "sliding_window": 4096,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096 * 32,
            "rope_theta": 1e4,
        },
    ),
    "qwen2": Reader(_qwen2, {**_QWEN, "num_key_value_heads": 32}),
    "qwen3": Reader(
        _qwen3, {**_QWEN, "num_key_value_heads": 32, "head_dim": 128, "attention_bias": False}
    ),
    "gemma2": Reader(
        _gemma2,
        {
            **_GEMMA,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
            "rope_theta": 1e4,
        },
        (*INERT, "hidden_act", "sliding_window_size"),
    ),
    "gemma3_text": Reader(
        _gemma3,
        {
            **_GEMMA,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        (*INERT, "hidden_act"),
    ),
    "smollm3": Reader(
        _smollm3,
        {
            **_WINDOWS,
            "sliding_window": None,
            "attention_bias": False,
            "mlp_bias": False,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
        },
        (*INERT, "max_window_layers"),
    ),
}


def read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `DecoderConfig` that a config.json asks for.

    Raises:
      ValueError: a model_type, field or value that is not supported.
    """
    check_supported(config)
    kind = config.get("model_type", "llama")
    if kind not in READERS:
        refuse("model_type", kind, " or ".join(map(repr, READERS)))
    reader = READERS[kind]
    for name, value in NEUTRAL.items():
        if config.get(name) not in (None, value):
            refuse(name, config[name], f"{value!r}, or left out")
    known = {*SAME, *ROPES, *NEUTRAL, *reader.defaults, *reader.inert}
    refuse_unknown(config, known, f"a decoder of model_type {kind!r}")
    raw = {**COMMON, **reader.defaults, **config}
    for name in raw.keys() & ARITHMETIC:
        value, empty = raw[name], name == "sliding_window" and raw[name] is None
        least = int(name != "max_window_layers")
        if not empty and (type(value) is not int or not least <= value <= LARGEST):
            refuse(name, value, f"a whole number of at least {least}")
    same = {name: raw[name] for name in SAME if name in raw}
    for name in ("num_key_value_heads", "head_dim"):  # null: as the other fields say
        same[name] = raw.get(name) or 0
    own = reader.read(raw)
    return same | ({} if "rope" in own else {"rope": _rope(raw)}) | own


def check_supported(config: Mapping[str, Any]) -> None:
    """Refuses, by name, kinds of language models that no decoder here computes.

    Raises:
      ValueError: a mixture of experts, a model of more than text, or quantised weights.

    >>> check_supported({"model_type": "mixtral", "num_local_experts": 8})
    Traceback (most recent call last):
    ValueError: model_type 'mixtral' is a mixture of experts, which is not supported; choose a dense model
    """  # noqa: E501
    kind = config.get("model_type")
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
    if any(config.get(name) for name in experts) or "moe" in str(kind):
        raise ValueError(
            f"model_type {kind!r} is a mixture of experts, which is not supported; "
            "choose a dense model"
        )
    if any(config.get(name) for name in ("text_config", "vision_config", "audio_config")):
        raise ValueError(
            f"model_type {kind!r} reads more than text, which is not supported; save its text "
            "model alone, with transformers' AutoModelForCausalLM, or choose a model of text"
        )
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise ValueError(
            f"its weights are quantised by {str(method)[:40]!r}, which is not supported; choose "
            "the model in bfloat16, float16 or float32"
        )
