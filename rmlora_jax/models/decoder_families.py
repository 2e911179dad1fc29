"""The families of decoders: the names of their weights in published files."""

from rmlora_jax.models.decoder import Decoder
from rmlora_jax.models.decoder_config import DecoderConfig
from rmlora_jax.models.family import AS_IS, LINEAR, TOKENS, Entry, Family, linear_entries

# Paths in a layer, and their names in files.
_LINEAR = (
    *((f"attention/{ours}", f"self_attn.{theirs}_proj") for ours, theirs in
      (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))),
    *((f"mlp/{name}", f"mlp.{name}_proj") for name in ("gate", "up", "down")),
)  # fmt: skip
_NORMS = (
    ("attention/query_norm", "self_attn.q_norm"),
    ("attention/key_norm", "self_attn.k_norm"),
    ("norm1", "input_layernorm"),
)
_LLAMA = (*_NORMS, ("norm2", "post_attention_layernorm"))
_GEMMA = (
    *_NORMS,
    ("post_norm1", "post_attention_layernorm"),
    ("norm2", "pre_feedforward_layernorm"),
    ("post_norm2", "post_feedforward_layernorm"),
)


def _family(classifier: str, norms=_LLAMA) -> Family:
    """The family whose class in transformers has this name."""
    return Family(
        config=DecoderConfig,
        model=Decoder,
        inputs=TOKENS,
        classifier=classifier,
        prefix="model.",
        table=(
            Entry("embed/embedding", AS_IS, ("model.embed_tokens.weight",)),
            *(
                entry
                for ours, theirs in _LINEAR
                for entry in linear_entries(f"layers/{ours}", f"model.layers.{{}}.{theirs}")
            ),
            *(
                Entry(f"layers/{ours}/scale", AS_IS, (f"model.layers.{{}}.{theirs}.weight",))
                for ours, theirs in norms
            ),
            Entry("norm/scale", AS_IS, ("model.norm.weight",)),
            Entry("head/kernel", LINEAR, ("lm_head.weight",)),
        ),
        # A tied head that is stored, too, and the frequencies that old files of Llama hold.
        leftovers=(r"lm_head\.weight", r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
        new=(),
        outputs=lambda config: config.vocab_size,
    )


DECODERS = {
    "llama": _family("LlamaForCausalLM"),
    "mistral": _family("MistralForCausalLM"),
    "qwen2": _family("Qwen2ForCausalLM"),
    "qwen3": _family("Qwen3ForCausalLM"),
    "gemma2": _family("Gemma2ForCausalLM", _GEMMA),
    "gemma3_text": _family("Gemma3ForCausalLM", _GEMMA),
    "smollm3": _family("SmolLM3ForCausalLM"),
}
