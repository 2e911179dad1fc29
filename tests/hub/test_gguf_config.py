"""The config made from a GGUF file's metadata against the published config.json of that model."""

import dataclasses
import math

import numpy as np
import pytest
import safetensors.numpy

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")

from fixtures.gguf_models import SIZES, VOCABULARY, WIDTH, weights, write  # noqa: E402

from rmlora_jax.errors import UserError  # noqa: E402
from rmlora_jax.hub.gguf_tensors import ARCHITECTURES  # noqa: E402
from rmlora_jax.hub.pretrained import find_architecture  # noqa: E402
from rmlora_jax.hub.source import find_config  # noqa: E402
from rmlora_jax.hub.weights import Tensors, read_params  # noqa: E402
from rmlora_jax.models import DecoderConfig  # noqa: E402
from rmlora_jax.models.family import param_shapes  # noqa: E402

ONE = {"model.embed_tokens.weight": np.zeros((VOCABULARY, WIDTH), np.float32)}
HEAD = {"lm_head.weight": np.zeros((VOCABULARY, WIDTH), np.float32)}


def sizes(layers, width, hidden, heads, groups, length, eps, **more):
    """Fields of the architecture, with nothing left of `SIZES`."""
    return dict.fromkeys(SIZES) | {
        "block_count": layers,
        "context_length": length,
        "embedding_length": width,
        "feed_forward_length": hidden,
        "attention.head_count": heads,
        "attention.head_count_kv": groups,
        "attention.layer_norm_rms_epsilon": eps,
        **more,
    }


def published(kind, layers, width, hidden, heads, groups, length, eps, **more):
    """A config.json."""
    return {
        "model_type": kind,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": length,
        "rms_norm_eps": eps,
        **more,
    }


def head(size):
    return {"attention.key_length": size, "attention.value_length": size}


def factors(size, theta, factor):
    """Of Llama 3.1, one wavelength at a time."""
    found = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * theta ** (i / size)
        smooth = (8192 / wavelength - 1) / 3
        if wavelength < 8192 / 4:
            found.append(1)
        elif wavelength > 8192:
            found.append(factor)
        else:
            found.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": np.array(found, np.float32)}


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
LLAMA31 = (32, 4096, 14336, 32, 8, 131072, 1e-5)
LLAMA32 = (16, 2048, 8192, 32, 8, 131072, 1e-5)
MISTRAL = (32, 4096, 14336, 32, 8, 32768, 1e-5)
SMOLLM2 = (30, 576, 1536, 9, 3, 8192, 1e-5)
SMOLLM3 = (36, 2048, 11008, 16, 4, 65536, 1e-6)
QWEN25 = (28, 3584, 18944, 28, 4, 131072, 1e-6)
QWEN3 = (36, 4096, 12288, 32, 8, 40960, 1e-6)
GEMMA2 = (42, 3584, 14336, 16, 8, 8192, 1e-6)
GEMMA2_27 = (46, 4608, 36864, 32, 16, 8192, 1e-6)
GEMMA3 = (18, 640, 2048, 4, 1, 32768, 1e-6)
GEMMA3_4 = (34, 2560, 10240, 8, 4, 131072, 1e-6)
GEMMA3_27 = (62, 5376, 21504, 32, 16, 131072, 1e-6)
CAPS2 = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
LINEAR8 = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}

# name -> (architecture, sizes, other fields as llama.cpp's converter writes them, whether tied,
# other tensors, model_type, other fields of the published config.json)
MODELS = {
    "Llama-3.1-8B": (
        "llama", LLAMA31, {"rope.freq_base": 5e5, "rope.dimension_count": 128, "vocab_size": 40},
        False, factors(128, 5e5, 8),
        "llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"factor": 8.0},
                  "attention_bias": False, "mlp_bias": False},
    ),
    "Llama-3.2-1B": (
        "llama", LLAMA32, {"rope.freq_base": 5e5, "rope.dimension_count": 64, **head(64)},
        True, factors(64, 5e5, 32),
        "llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"factor": 32.0}, "head_dim": 64,
                  "tie_word_embeddings": True},
    ),
    "Mistral-7B-v0.3": (
        "llama", MISTRAL, {"rope.freq_base": 1e6, "rope.dimension_count": 128}, False, {},
        "llama", {"rope_theta": 1e6},
    ),
    "Mistral-7B-v0.1, with its window": (
        "llama", MISTRAL, {"rope.freq_base": 1e4, "attention.sliding_window": 4096}, False, {},
        "mistral", {"rope_theta": 1e4, "sliding_window": 4096},
    ),
    "SmolLM2-135M": (
        "llama", SMOLLM2, {"rope.freq_base": 1e5, "rope.dimension_count": 64}, True, {},
        "llama", {"rope_theta": 1e5, "tie_word_embeddings": True},
    ),
    "SmolLM3-3B": (
        "smollm3", SMOLLM3, {"rope.freq_base": 5e6, "rope.dimension_count": 128}, True, {},
        "smollm3", {"rope_theta": 5e6, "no_rope_layers": [1, 1, 1, 0] * 9,
                    "no_rope_layer_interval": 4, "use_sliding_window": False},
    ),
    "Qwen2.5-7B": (
        "qwen2", QWEN25, {"rope.freq_base": 1e6}, False, {},
        "qwen2", {"rope_theta": 1e6, "use_sliding_window": False, "max_window_layers": 28,
                  "sliding_window": 131072},
    ),
    "Qwen3-8B": (
        "qwen3", QWEN3, {"rope.freq_base": 1e6, **head(128)}, False, {},
        "qwen3", {"rope_theta": 1e6, "head_dim": 128, "attention_bias": False},
    ),
    "Qwen3-8B, stretched": (
        "qwen3", QWEN3,
        {"rope.freq_base": 1e6, **head(128), "rope.scaling.type": "yarn",
         "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32768}, False, {},
        "qwen3", {"rope_theta": 1e6, "head_dim": 128, "rope_scaling": YARN | {"rope_type": "yarn"}},
    ),
    "gemma-2-9b": (
        "gemma2", GEMMA2, {**head(256), "attention.sliding_window": 4096, **CAPS2}, True, {},
        "gemma2", {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, **CAPS2},
    ),
    "gemma-2-27b, an early file": (
        "gemma2", GEMMA2_27, head(128), True, {},
        "gemma2", {"head_dim": 128, "query_pre_attn_scalar": 144, "sliding_window": 4096, **CAPS2},
    ),
    "gemma-3-270m": (
        "gemma3", GEMMA3, {**head(256), "rope.freq_base": 1e6, "attention.sliding_window": 512},
        True, {},
        "gemma3_text", {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512,
                        "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    ),
    "gemma-3-4b": (
        "gemma3", GEMMA3_4,
        {**head(256), "rope.freq_base": 1e6, "attention.sliding_window": 1024, **LINEAR8}, True, {},
        "gemma3_text", {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024,
                        "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                        "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "gemma-3-27b": (
        "gemma3", GEMMA3_27,
        {**head(128), "rope.freq_base": 1e6, "attention.sliding_window": 1024, **LINEAR8}, True, {},
        "gemma3_text", {"head_dim": 128, "query_pre_attn_scalar": 168, "sliding_window": 1024,
                        "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                        "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_configs_are_those_of_the_published_models(name, tmp_path):
    kind, shape, fields, tied, extra, model_type, more = MODELS[name]
    path = write(
        tmp_path / "m.gguf", kind, ONE if tied else ONE | HEAD,
        fields=sizes(*shape, **fields), extra=extra,
    )  # fmt: skip
    family, found = find_architecture(str(path))
    expected = DecoderConfig.from_hf(published(model_type, *shape, **more))
    assert tied == found.tie_word_embeddings
    # Gemma and SmolLM3 are tied where config.json does not say.
    same = dataclasses.replace(expected, tie_word_embeddings=tied)
    assert dataclasses.asdict(found) == dataclasses.asdict(same)
    assert family.config is DecoderConfig


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_parameters_equal_those_from_a_hugging_face_folder(kind, tmp_path):
    """Through the family's table: every parameter is there, none is left over."""
    whole = weights(kind, tied=False)
    path = write(tmp_path / "m.gguf", kind, whole)
    safetensors.numpy.save_file(whole, tmp_path / "model.safetensors")
    family, config = find_architecture(str(path))
    shapes = param_shapes(family, config, config.vocab_size)
    ours, theirs = (
        read_params(Tensors(place), family, shapes, (), np.float32)[0] for place in (path, tmp_path)
    )
    assert ours.keys() == theirs.keys() == shapes.keys() and "head/kernel" in ours
    for name, value in theirs.items():
        atol = 2**-22 if kind.startswith("gemma") and name.endswith("scale") else 0
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=atol, err_msg=name)


def test_special_tokens(tmp_path):
    ids = {"bos_token_id": 1, "eos_token_id": 2, "eot_token_id": 7, "padding_token_id": 2}
    found = find_config(str(write(tmp_path / "m.gguf", tokenizer=ids)))[1]
    wanted = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 2}
    assert wanted.items() <= found.items()
    ids = {"eos_token_id": 2, "eot_token_id": 2}
    found = find_config(str(write(tmp_path / "m.gguf", tokenizer=ids)))[1]
    assert found["eos_token_id"] == 2 and found["bos_token_id"] is None


REFUSED = {
    "a mixture of experts": ("llama", {"expert_count": 8}, r"mixture of experts \(llama.expert_co"),
    "an unknown field": ("llama", {"logit_scale": 0.5}, r"llama.logit_scale = 0.5 is a field that"),
    "layers that differ": (
        "llama", {"attention.head_count_kv": [2, 1, 2]}, r"head_count_kv is \[2, 1, 2\]; it must be"
    ),
    "no width": ("llama", {"embedding_length": None}, "llama.embedding_length is missing"),
    "a width of text": ("llama", {"embedding_length": "64"}, "embedding_length is '64'"),
    "too many layers": ("llama", {"block_count": 4_000_000_000}, "from 1 to 1000"),
    "values of another width": ("llama", {"attention.value_length": 16}, "not the width of a head"),
    "partial rotation": ("llama", {"rope.dimension_count": 16}, "not the width of a head, 32"),
    "scaling by another name": ("llama", {"rope.scaling.type": "longrope"}, "known are none, li"),
    "yarn with more": (
        "qwen3",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 2.0},
        r"rope.scaling.attn_factor = 2.0 is not the usual 1.0",
    ),
    "yarn without a length": (
        "qwen3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "what yarn needs"
    ),
    "both directions": ("llama", {"attention.causal": False}, "see what follows"),
    "not a number": ("llama", {"rope.freq_base": float("nan")}, "not a finite number"),
    "a base of text": ("llama", {"rope.freq_base": "10000"}, "of another kind than llama.cpp"),
    "a pattern of other layers": (
        "gemma3",
        {"attention.sliding_window": 16, "attention.sliding_window_pattern": [True, False]},
        "not for 3 layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path):
    kind, fields, said = REFUSED[case]
    path = write(tmp_path / "m.gguf", kind, ONE, fields=fields)
    with pytest.raises(UserError, match=said) as error:
        find_config(str(path))
    assert "m.gguf" in str(error.value) and "\n" not in str(error.value)


def test_other_architectures_are_refused(tmp_path):
    path = write(tmp_path / "m.gguf", "qwen2moe", {})
    with pytest.raises(UserError, match=r"architecture 'qwen2moe' is not supported; known are"):
        find_config(str(path))


def test_other_rope_factors_are_refused(tmp_path):
    wrong = factors(32, 5e5, 8)
    wrong["rope_freqs.weight"][5] *= 1.01
    with pytest.raises(UserError, match=r"factors in rope_freqs.weight are not those of Llama 3.1"):
        find_config(str(write(tmp_path / "m.gguf", extra=wrong)))


def test_a_file_without_an_embedding(tmp_path):
    with pytest.raises(UserError, match=r"has no token_embd.weight; is it a whole model"):
        find_config(str(write(tmp_path / "m.gguf", tensors={})))
