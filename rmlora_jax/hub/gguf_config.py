"""The config.json of a GGUF model, made from its metadata.

A field of the architecture that is not known here is refused by name, unless it is 0 or empty.
Where the metadata leaves something out, llama.cpp has a value of its own, and so has this file.

Source: https://github.com/ggml-org/llama.cpp/tree/master/src/models
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from rmlora_jax.errors import UserError
from rmlora_jax.hub.gguf_file import GGUFFile
from rmlora_jax.hub.gguf_tensors import ROPE_FACTORS, architecture, head_counts, whole
from rmlora_jax.models.config import MOST_LAYERS

# Fields that do not change what the model computes. The size of the vocabulary is that of the
# embedding.
INERT = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "mm.tokens_per_image")

# Of Llama 3.1 to 3.3, as published; a file has only the factors that follow from them.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Gemma's largest models divide queries by the root of width / heads, the others by that of the
# head's width. llama.cpp, too, knows them by the number of their layers.
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


class Fields:
    """The metadata of a file's architecture; each name that is asked for counts as known."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.kind: str = file.fields["general.architecture"]
        self.known = {f"{self.kind}.{name}" for name in INERT}

    def whole(self, name: str, default: int | None = None, most: int = 2**24) -> int:
        self.known.add(f"{self.kind}.{name}")
        return whole(self.file, f"{self.kind}.{name}", default, most)

    def value(self, name: str, kinds: type | tuple[type, ...], default: Any) -> Any:
        full = f"{self.kind}.{name}"
        self.known.add(full)
        value = self.file.fields.get(full, default)
        if value is not default and not isinstance(value, kinds):
            self.refuse(name, "of another kind than llama.cpp writes")
        return value

    def window(self, default: int) -> int:
        """How many tokens a layer with a window sees; 0: all."""
        name = "attention.sliding_window"
        return self.whole(name, default) if self.value(name, int, default) else 0

    def number(self, name: str, default: float | None = None) -> float | None:
        """A finite number, as short as float32 allows: 1e-05, not 9.999999747378752e-06."""
        value = self.value(name, (int, float), default)
        if value is None:
            return None
        if isinstance(value, bool) or not math.isfinite(value):
            self.refuse(name, "not a finite number")
        return float(str(np.float32(value)))

    def refuse(self, name: str, why: str) -> NoReturn:
        full = f"{self.kind}.{name}"
        value = repr(self.file.fields.get(full))[:80]
        raise UserError(f"{self.file.path}: {full} = {value} is {why}; take another file")

    def check_all_known(self) -> None:
        for full, value in self.file.fields.items():
            if full.startswith(f"{self.kind}.") and full not in self.known and value:
                if "expert" in full:
                    raise UserError(
                        f"{self.file.path} is a mixture of experts ({full[:80]} = {value!r:.80}), "
                        "which is not supported; take a dense model"
                    )
                name = full.removeprefix(f"{self.kind}.")
                self.refuse(name[:80], "a field that is not known here, so it would be ignored")


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The dictionary of the config.json that the same model has as a Hugging Face folder.

    Raises:
      UserError: an architecture, a field or a value that is not supported, or sizes that the
        metadata does not say.
    """
    architecture(file)
    fields = Fields(file)
    heads, groups = head_counts(file)
    fields.known |= {f"{fields.kind}.attention.head_count{end}" for end in ("", "_kv")}
    width = fields.whole("embedding_length")
    layers = fields.whole("block_count", most=MOST_LAYERS)
    size = fields.whole("attention.key_length", width // heads or None)
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.whole(name, size) != size:
            fields.refuse(name, f"not the width of a head, {size}")
    if not fields.value("attention.causal", bool, True):
        fields.refuse("attention.causal", "for models that see what follows, too")
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path} has no token_embd.weight; is it a whole model?")
    theta = fields.number("rope.freq_base", 10_000.0)
    config = {
        "hidden_size": width,
        "intermediate_size": fields.whole("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": size,
        "max_position_embeddings": fields.whole("context_length", 2048),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": theta,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        **token_ids(file),
    }
    if scaling := rope_scaling(fields, size, theta):
        config["rope_scaling"] = scaling
    config |= FAMILIES[fields.kind](fields, config)
    fields.check_all_known()
    return config


def rope_scaling(fields: Fields, size: int, theta: float | None) -> dict[str, Any] | None:
    """How positions are scaled, in Hugging Face's words; None where they are not."""
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear"))
    kind = fields.value("rope.scaling.type", str, "linear" if factor else "none")
    length = fields.value("rope.scaling.original_context_length", int, None)
    plain = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": 32.0,
             "yarn_beta_slow": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}
    for name, usual in plain.items():
        if kind == "yarn" and fields.number(f"rope.scaling.{name}", usual) != usual:
            fields.refuse(f"rope.scaling.{name}", f"not the usual {usual}")
    scaling = None
    if kind in ("linear", "yarn") and factor not in (None, 0.0, 1.0):
        scaling = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            if length is None:
                fields.refuse("rope.scaling.original_context_length", "what yarn needs")
            scaling["original_max_position_embeddings"] = length
    elif kind not in ("none", "linear", "yarn"):
        fields.refuse("rope.scaling.type", "not known; known are none, linear, yarn")
    if ROPE_FACTORS not in fields.file.tensors:
        return scaling
    factors = fields.file.values(ROPE_FACTORS).ravel()
    llama3 = {"rope_type": "llama3", "factor": float(factors[-1]), **LLAMA3}
    if scaling or not np.allclose(factors, llama3_factors(size, theta or 0, llama3), rtol=1e-4):
        raise UserError(
            f"{fields.file.path}: the factors in {ROPE_FACTORS} are not those of Llama 3.1 "
            f"({LLAMA3}), which alone are known; take the model as safetensors"
        )
    return llama3


def llama3_factors(size: int, theta: float, scaling: Mapping[str, Any]) -> np.ndarray:
    """By how much each wavelength of the rotary embedding is stretched, (size / 2,).

    With wavelength l = 2 pi theta^(2i / size) and context c: 1 where l < c / high, ``factor`` where
    l > c / low, between them 1 / ((1 - s) / factor + s) with s = (c / l - low) / (high - low).

    >>> llama3_factors(16, 5e5, {"factor": 8.0, **LLAMA3}).round(2).tolist()
    [1.0, 1.0, 1.0, 1.0, 2.69, 8.0, 8.0, 8.0]
    """
    turns = scaling["original_max_position_embeddings"] / (
        2 * np.pi * theta ** (np.arange(0, size, 2) / size)
    )
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def token_ids(file: GGUFFile) -> dict[str, Any]:
    """The numbers of special tokens; a list where several tokens end an answer."""
    names = {"bos": "bos", "pad": "padding", "eos": "eos", "eot": "eot", "eom": "eom"}
    found = {
        name: value
        for name, stored in names.items()
        if type(value := file.fields.get(f"tokenizer.ggml.{stored}_token_id")) is int
    }
    ends = list(dict.fromkeys(found[name] for name in ("eos", "eot", "eom") if name in found))
    ids: dict[str, Any] = {f"{name}_token_id": found.get(name) for name in ("bos", "pad")}
    return ids | {"eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None}


def _biases(fields: Fields) -> dict[str, bool]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in fields.file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in fields.file.tensors,
    }


def _named(kind: str, model: str, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, "architectures": [f"{model}ForCausalLM"], **more}


def _llama(fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    if window := fields.window(0):
        return _named("mistral", "Mistral", sliding_window=window)
    return _named("llama", "Llama", **_biases(fields))


def _smollm3(fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    layers, every = config["num_hidden_layers"], 4  # llama.cpp knows no other
    rope = [int((layer + 1) % every != 0) for layer in range(layers)]
    more = {"no_rope_layers": rope, "no_rope_layer_interval": every, "use_sliding_window": False}
    return _named("smollm3", "SmolLM3", **more, **_biases(fields))


def _qwen2(fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    return _named("qwen2", "Qwen2", use_sliding_window=False)


def _qwen3(fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    bias = _biases(fields)["attention_bias"]
    return _named("qwen3", "Qwen3", use_sliding_window=False, attention_bias=bias)


def _gemma(fields: Fields, config: Mapping[str, Any], window: int, every: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share: every ``every``-th layer sees all tokens, the others a window."""
    window = fields.window(window)
    pattern = fields.value("attention.sliding_window_pattern", (int, list), every)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    if not isinstance(pattern, list):
        pattern = [pattern > 0 and (layer + 1) % pattern != 0 for layer in range(layers)]
    if len(pattern) != layers:
        fields.refuse("attention.sliding_window_pattern", f"not for {layers} layers")
    if not window:
        pattern = [False] * layers
    kinds = {True: "sliding_attention", False: "full_attention"}
    by_width = SCALED_BY_WIDTH[fields.kind] == layers
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // heads if by_width else config["head_dim"],
        "attention_bias": False,
        "layer_types": [kinds[bool(sliding)] for sliding in pattern],
        "sliding_window": window or config["max_position_embeddings"],
    }


def _gemma2(fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    caps = {
        "attn_logit_softcapping": fields.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.number("final_logit_softcapping", 30.0),
    }
    return _named("gemma2", "Gemma2", **caps, **_gemma(fields, config, 4096, 2))


def _gemma3(fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    more = {
        "rope_local_base_freq": fields.number("rope.freq_base_swa", 10_000.0),
        "final_logit_softcapping": fields.number("final_logit_softcapping"),
        "attn_logit_softcapping": None,
    }
    return _named("gemma3_text", "Gemma3", **more, **_gemma(fields, config, 0, 6))


FAMILIES: dict[str, Callable[[Fields, Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "smollm3": _smollm3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}
