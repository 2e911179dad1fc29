"""config.json of decoders: each field is obeyed, known to be inert, or refused by name."""

import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
from fixtures.decoders.cases import CASES, FULL, SLIDING, config_of

from rmlora_jax.models import DecoderConfig
from rmlora_jax.models.config import BOOKKEEPING
from rmlora_jax.models.decoder_files import NEUTRAL, READERS, ROPES, SAME
from rmlora_jax.models.rope import Rope

SMOLLM2 = {  # HuggingFaceTB/SmolLM2-135M-Instruct
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
    "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
QWEN = {  # Qwen/Qwen2.5-7B-Instruct
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
    "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 152064,
}  # fmt: skip
GEMMA3 = {  # google/gemma-3-1b-it
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip


def of_transformers(raw: dict) -> dict:
    """The config.json that transformers writes for this one."""
    from transformers import AutoConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoConfig.for_model(**raw).to_dict()


@pytest.mark.parametrize("name", CASES)
def test_the_old_and_the_new_spelling_are_the_same(name):
    raw = config_of(name)
    assert DecoderConfig.from_hf(of_transformers(raw)) == DecoderConfig.from_hf(raw)


@pytest.mark.parametrize("kind", READERS)
def test_defaults_are_those_of_transformers(kind):
    own = DecoderConfig.from_hf({"model_type": kind})
    assert DecoderConfig.from_hf(of_transformers({"model_type": kind})) == own


def test_null_means_none_and_not_the_default():
    raw = {"model_type": "mistral", "num_attention_heads": 8}
    assert DecoderConfig.from_hf(raw).sliding_window == 4096
    none = DecoderConfig.from_hf(raw | {"sliding_window": None, "num_key_value_heads": None})
    assert (none.sliding_window, none.num_key_value_heads) == (0, 8)
    gemma = {"model_type": "gemma2", "final_logit_softcapping": None}
    assert DecoderConfig.from_hf(gemma).final_logit_softcapping == 0


def test_published_configs():
    small = DecoderConfig.from_hf(SMOLLM2)
    assert (small.head_dim, small.num_key_value_heads, small.rope) == (64, 3, Rope(theta=100000))
    assert small.tie_word_embeddings and not any(small.sliding)
    qwen = DecoderConfig.from_hf(QWEN)
    assert (qwen.head_dim, qwen.qkv_bias, qwen.out_bias) == (128, True, False)
    assert not any(qwen.sliding) and qwen.rope.theta == 1e6
    gemma = DecoderConfig.from_hf(GEMMA3)
    assert gemma.sliding == tuple((i + 1) % 6 != 0 for i in range(26))
    assert [rope.theta for rope in gemma.ropes if rope] == [
        1e4 if slides else 1e6 for slides in gemma.sliding
    ]
    assert gemma.embed_scale == 1152**0.5 and gemma.query_scale == 1 / 16
    assert gemma.qk_norm and gemma.post_norm and gemma.norm_plus_one and gemma.tie_word_embeddings


# Fields that transformers' code reads although they are inert here, and where it reads them.
ELSEWHERE = {
    *("pad_token_id", "use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    "pretraining_tp",  # the same sums in parts
}


@pytest.mark.parametrize("kind", READERS)
def test_no_code_of_transformers_reads_an_inert_field(kind):
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None
    module = kind.removesuffix("_text")
    code = Path(spec.origin).parent / "models" / module / f"modeling_{module}.py"
    text = code.read_text(encoding="utf-8")
    if kind == "gemma3_text":  # the classes below read images
        text = text.partition("class Gemma3MultiModalProjector")[0]
    pairs = re.findall(r'config\.(\w+)|config, "(\w+)"', text)
    read = {name for pair in pairs for name in pair if name}
    assert "rms_norm_eps" in read
    reader = READERS[kind]
    assert read & {*BOOKKEEPING, *reader.inert} - {*SAME} <= ELSEWHERE
    known = {*SAME, *ROPES, *reader.defaults, *NEUTRAL, *BOOKKEEPING, *reader.inert}
    mine = {"_attn_implementation", "text_config", "vision_config", "_name_or_path", "sub_configs"}
    for name in read - known - mine:
        with pytest.raises(ValueError, match=name):
            DecoderConfig.from_hf({"model_type": kind, name: 5})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "bert"}, "model_type"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts.*a dense model"),
        ({"model_type": "qwen3_moe"}, "mixture of experts"),
        ({"model_type": "gemma3", "text_config": {"vocab_size": 9}}, "save its text model alone"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'.*in bfloat16"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised by 'awq'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'.*one of default"),
        ({"rope_scaling": {"type": "linear"}}, "'factor' is None"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor.*at least 1"),
        ({"rope_scaling": {"rope_type": "default", "short_factor": [1.0]}}, "short_factor"),
        ({"rope_scaling": [2.0]}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta"),
        ({"rope_parameters": {FULL: {"rope_theta": 1e4}}}, FULL),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_dropout": 0.1}, "attention_dropout.*must be 0.0"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"hidden_act": "swiglu"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_key_value_heads": 5}, "num_key_value_heads.*a divisor of 32"),
        ({"num_attention_heads": 3}, "num_attention_heads.*a divisor of hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"multiply_logits": 3.0}, "multiply_logits"),
        ({"sliding_window": 8}, "sliding_window"),  # not of a Llama
        ({"model_type": "mistral", "layer_types": [SLIDING] * 32}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": [SLIDING] * 32}, "sliding_window.*given"),
        ({"model_type": "qwen2", "layer_types": [FULL]}, "layer_types.*of 32 layers"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 32}, "layer_types"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "bidirectional"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1.0}}, "rope_parameters"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "rope_layers"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"model_type": "qwen2", "num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"model_type": "qwen2", "max_window_layers": [1]}, "max_window_layers"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"model_type": "gemma2", "hidden_size": "9"}, "hidden_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, words):
    with pytest.raises(ValueError, match=words):
        DecoderConfig.from_hf({"model_type": "llama"} | fields)
