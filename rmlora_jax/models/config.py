"""Configs of models: the fields that they share, and how a ``config.json`` becomes one.

A config is a frozen dataclass whose fields have the names, meanings and defaults of Hugging Face's.
"""

import dataclasses
import functools
from collections.abc import Mapping, Set
from typing import Any, ClassVar, NoReturn, Self

import flax.linen as nn
import jax
import jax.numpy as jnp


@functools.partial(jax.checkpoint, prevent_cse=False)
def gelu(x):
    """x Phi(x) = x (1 + erf(x / sqrt 2)) / 2, in float32 at least and rounded once.

    Only x is kept for the backward pass. erfc, by which `jax.nn.gelu` gets the tail below -4 to
    full relative precision, costs a GPU more time than reading and writing x does.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

# Fields that do not change what a classifier computes, whatever their value. The sources are
# transformers' PreTrainedConfig (4.0 to 5.24) and the config.json of published checkpoints, which
# tests/fixtures/published.py lists.
BOOKKEEPING = (
    # Where it comes from, and how it is loaded and called.
    *("architectures", "model_type", "problem_type", "finetuning_task", "transformers_version"),
    *("dtype", "torch_dtype", "torchscript", "use_bfloat16", "tie_word_embeddings", "use_cache"),
    *("return_dict", "output_attentions", "output_hidden_states", "gradient_checkpointing"),
    *("chunk_size_feed_forward", "attn_implementation", "output_past", "tf_legacy_loss"),
    *("xla_device", "task_specific_params", "language", "name"),
    # Labels, which the loader reads; sigmoid or softmax after a cross-encoder's logits.
    *("id2label", "label2id", "num_labels"),
    *("sbert_ce_default_activation_function", "sentence_transformers"),
    # What only a tokenizer reads. A family that reads pad_token_id has a field of that name.
    *("tokenizer_class", "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id"),
    *("sep_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id", "prefix"),
    # Generation.
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
    *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("num_return_sequences", "output_scores", "return_dict_in_generate", "suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "begin_suppress_tokens"),
)

LARGEST = 2**24  # of any size; a larger one, damaged or hostile, would run out of memory first
MOST_LAYERS = 1000


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the configs of all families share.

    Class attributes, which a family sets:
      model_types: the values of ``model_type`` in config.json; the first is the default.
      inert: fields of config.json that do not change what the model computes, beside
        ``BOOKKEEPING``.
      least: the smallest values of int fields, where that is not 1.
      no_prefix: why prefix vectors do not fit into the attention; empty where they do, and then
        the config has a field ``prefix_length``: trained keys and values in front of every
        layer's own; 0: none.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    inert: ClassVar[tuple[str, ...]] = ()
    least: ClassVar[dict[str, int]] = {"bottleneck_width": 0, "prefix_length": 0}
    no_prefix: ClassVar[str] = ""

    def __post_init__(self):
        check_fields(self)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """The config that the dictionary of a Hugging Face ``config.json`` describes.

        An unknown field that could change the model's numbers is refused by name, not ignored.

        Raises:
          ValueError: an unsupported ``model_type``, field or value.
        """
        return cls(**cls.known_fields(config))

    @classmethod
    def known_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a ``config.json`` that are fields of this class; errors as in ``from_hf``.

        An unknown field whose value is null, false, 0 or empty is left out.
        """
        kind = config.get("model_type", cls.model_types[0])
        if kind not in cls.model_types:
            refuse("model_type", kind, " or ".join(map(repr, cls.model_types)))
        ours = {field.name for field in dataclasses.fields(cls)}
        refuse_unknown(config, ours | set(cls.inert), cls.__name__)
        return {name: config[name] for name in ours & config.keys()}


@dataclasses.dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    """The fields that all bundled encoders share.

    Attributes:
      hidden_size: width D of the residual stream.
      num_hidden_layers: number of transformer layers L.
      num_attention_heads: heads; must divide ``hidden_size``.
      intermediate_size: width of the MLP.
      hidden_act: activation of the MLP, one of gelu (the exact erf form), gelu_new,
        gelu_pytorch_tanh, quick_gelu, relu, silu, tanh.
      hidden_dropout_prob: dropout on embeddings and on the output of attention and MLP (training).
      attention_probs_dropout_prob: dropout on attention weights (training).
      initializer_range: standard deviation of new weights.
      layer_norm_eps: epsilon of every layer norm.
      bottleneck_width: width of an adapter behind attention and MLP; 0: none (see
        ``models.blocks.Bottleneck``).

    Raises:
      ValueError: naming the field, its value and what is allowed.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    bottleneck_width: int = 0

    qkv_bias = True  # whether query, key and value have biases
    norm_first = False  # whether the norms are before attention and MLP, not after

    def __post_init__(self):
        super().__post_init__()
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            refuse("num_attention_heads", heads, f"a divisor of hidden_size = {self.hidden_size}")

    @property
    def kernel_init(self) -> nn.initializers.Initializer:
        """The initialiser of new kernels: N(0, ``initializer_range``^2)."""
        return nn.initializers.normal(self.initializer_range)


def check_fields(config: Any) -> None:
    """Checks the values of a config by the types of its fields.

    int: a whole number from ``least[name]`` (1 by default) to 2**24; layers: to 1000. float: finite
    and at least 0, below 1 where the name ends in ``_prob`` or ``dropout``. float or None: a
    dropout. A name that ends in ``act``: an activation.
    """
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        least = config.least.get(name, 1)
        most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
        if field.type is int and (type(value) is not int or not least <= value <= most):
            above = f" and at most {most}" if type(value) is int and value > most else ""
            refuse(name, value, f"a whole number of at least {least}{above}")
        if field.type is bool and not isinstance(value, bool):
            refuse(name, value, "true or false")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if field.type is float and not (number and 0 <= value <= LARGEST):
            refuse(name, value, "a number of at least 0")
        if field.type is float and name.endswith(("_prob", "dropout")) and value >= 1:
            refuse(name, value, "a probability below 1")
        if field.type == float | None and not (value is None or (number and 0 <= value < 1)):
            refuse(name, value, "a probability below 1, or null")
        if name == "model_type" and value not in config.model_types:
            refuse(name, value, f"one of {', '.join(config.model_types)}")
        if name.endswith("act") and not (isinstance(value, str) and value in ACTIVATIONS):
            refuse(name, value, f"one of {', '.join(ACTIVATIONS)}")


def refuse_unknown(config: Mapping[str, Any], known: Set[str], who: str) -> None:
    """Raises a ValueError for a field that is neither known nor book-keeping, and has a value."""
    for name, value in config.items():
        fine = name in known or name in BOOKKEEPING or name.startswith("_")
        if not fine and value:
            raise ValueError(
                f"config field {_short(name)} = {_short(value)} is not supported by {who}; "
                "remove it if it does not change what the model computes"
            )


def refuse(name: str, value: Any, allowed: str) -> NoReturn:
    """Raises the ValueError for a field whose value is not allowed."""
    raise ValueError(f"config field {name!r} is {_short(value)}; it must be {allowed}")


def _short(value: Any) -> str:
    return repr(value)[:80]
