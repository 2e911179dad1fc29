"""The models that can be timed, by name. Sizes are as published; nothing is downloaded."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.hub import find_architecture
from rmlora_jax.models import Bert, BertConfig, Deberta, DebertaConfig, ViT, ViTConfig

CLASSES = 10  # outputs of the head, of every model

LINEARS = ("query", "key", "value", "out", "fc1", "fc2")
# What --modules and --sweep=modules adapt: name -> target of the adapters.
MODULES = {
    "query+value": r"encoder/layers/attention/(query|value)",
    "attention": r"encoder/layers/attention/.*",
    "mlp": r"encoder/layers/mlp/.*",
    "all": r"encoder/layers/.*",
}

# Dropout needs the weights of attention, which fused kernels do not have; nothing here has it.
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _sized(kind: Any, hidden: int, layers: int, heads: int, **fields) -> Any:
    """A config of this class whose MLP is four times as wide as the model."""
    return kind(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                intermediate_size=4 * hidden, **fields)


_vit = functools.partial(_sized, ViTConfig)
_bert = functools.partial(_sized, BertConfig, **_NO_DROPOUT)


def _published(name: str) -> Any:
    return dataclasses.replace(find_architecture(name)[1], **_NO_DROPOUT)


class Entry(NamedTuple):
    """A model that can be timed, with what a step has unless the command says otherwise."""

    config: Any  # a ViTConfig, BertConfig or DebertaConfig
    batch: int  # examples a step
    length: int | None = None  # tokens of an example; None for images


MODELS: dict[str, Entry] = {
    "tiny": Entry(_vit(32, 2, 2, image_size=16, patch_size=8), 8),  # to try the command out
    "vit-tiny": Entry(_vit(192, 12, 3, image_size=32, patch_size=8), 32),  # the quickstart's
    "vit-base": Entry(_published("google/vit-base-patch16-224-in21k"), 256),
    "vit-large": Entry(_vit(1024, 24, 16), 128),
    "bert-base": Entry(_bert(768, 12, 12), 32, 128),
    "roberta-base": Entry(_published("FacebookAI/roberta-base"), 32, 128),
    "deberta-v3-base": Entry(_published("microsoft/deberta-v3-base"), 32, 128),
    "minilm": Entry(_bert(384, 6, 12), 32, 128),
    # As wide as a decoder of 7 billion parameters and as long; attention looks both ways.
    "decoder": Entry(_bert(4096, 4, 32, vocab_size=32000, max_position_embeddings=2048), 4, 2048),
}


def find_model(name: str, image_size: int | None = None, length: int | None = None) -> Entry:
    """The entry of ``name``, with another image size or length where one is given.

    Raises:
      UserError: an unknown name, or a size that the model does not have.

    >>> find_model("vit-base", image_size=384).config.image_size
    384
    """
    if name not in MODELS:
        raise UserError(
            f"there is no model {name!r}{did_you_mean(name, MODELS)}\n"
            f"--model is one of {', '.join(MODELS)}"
        )
    entry = MODELS[name]
    if entry.length is None and length is not None:
        raise UserError(f"{name} reads images, which have no --length; type --image_size")
    if entry.length is not None and image_size is not None:
        raise UserError(f"{name} reads texts, which have no --image_size; type --length")
    if image_size is not None:
        patch = entry.config.patch_size
        if image_size < patch:
            raise UserError(
                f"{name} has patches of {patch} pixels; type --image_size={patch} or more"
            )
        entry = entry._replace(config=dataclasses.replace(entry.config, image_size=image_size))
    if length is not None:
        longest = entry.config.longest  # None: positions are relative
        if longest is not None and length > longest:
            raise UserError(f"{name} has positions for {longest} tokens; type --length={longest}")
        entry = entry._replace(length=length)
    return entry


def build(
    entry: Entry, *, dtype: Any, base_dtype: Any, unroll: int, remat: str, attention: str
) -> nn.Module:
    """The Linen module of an entry.

    Raises:
      UserError: the model cannot choose how its attention is computed.
    """
    kinds = {ViTConfig: ViT, BertConfig: Bert, DebertaConfig: Deberta}
    kind = kinds[type(entry.config)]
    fields = {"dtype": dtype, "param_dtype": base_dtype, "unroll": unroll, "remat": remat}
    if "attention" in {field.name for field in dataclasses.fields(kind)}:
        fields["attention"] = attention
    elif attention not in ("auto", "xla"):
        raise UserError(
            f"--attention={attention} does not fit {kind.__name__}, whose attention is XLA's; "
            "leave it out"
        )
    return kind(entry.config, CLASSES, **fields)


def random_params(model: nn.Module, entry: Entry) -> dict:
    """Initial parameters, drawn on the device."""
    rolled = model.clone(unroll=1)  # the same values, compiled faster

    @jax.jit
    def init(key):
        return rolled.init(key, _inputs(key, entry, 1, model.dtype))["params"]

    return init(jax.random.key(0))


def random_batches(entry: Entry, batch: int, count: int, dtype: Any) -> list:
    """``count`` pairs (inputs, labels) on the device: normal pixels, or tokens without padding."""

    @jax.jit
    def make(key):
        labels = jax.random.randint(jax.random.fold_in(key, 1), (batch,), 0, CLASSES)
        return _inputs(key, entry, batch, dtype), labels

    return [make(key) for key in jax.random.split(jax.random.key(1), count)]


def _inputs(key, entry: Entry, batch: int, dtype) -> jax.Array:
    c = entry.config
    if entry.length is None:
        return jax.random.normal(key, (batch, c.image_size, c.image_size, c.num_channels), dtype)
    return jax.random.randint(key, (batch, entry.length), 2, c.vocab_size)  # 0 and 1: padding


def tokens(entry: Entry) -> int:
    """Tokens of an example, a class token included.

    >>> tokens(MODELS["vit-base"]), tokens(MODELS["bert-base"])
    (197, 128)
    """
    return 1 + entry.config.grid**2 if entry.length is None else entry.length
