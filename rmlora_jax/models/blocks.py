"""The encoder that the bundled families share.

`Parts` makes the layers of a model. `Attention`, `MLP`, `Layer` and `Encoder` are made of them, and
what adapters insert: `Bottleneck` and `Prefix`. `Classifier` and `TextClassifier` are the outermost
modules. A family fills in what differs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from rmlora_jax.models.attention import attend, attend_with_dropout


def gelu(x):
    """x Phi(x) = x (1 + erf(x / sqrt 2)) / 2, in float32 at least and rounded once.

    Only x is kept for the backward pass. erfc, by which `jax.nn.gelu` gets the tail below -4 to
    full relative precision, costs a GPU more time than reading and writing x does.
    """

    def exact(x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)

    return jax.checkpoint(exact, prevent_cse=False)(x)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jax.numpy.tanh,
}

ATTENTION = "attention"


def _fused_attention(primitive, *avals, **params) -> bool:
    """A policy: keeps all that cuDNN's attention gives for its backward pass.

    On what it computes beside its output, the sums of its softmax, no name can be put.
    """
    return primitive.name.startswith("dot_product_attention_fwd")


REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(ATTENTION), _fused_attention
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """Makes the layers of one model.

    Its methods are called inside the call of a module, which then owns the layer.

    Attributes:
      config: the architecture, an ``EncoderConfig``.
      dtype: compute dtype.
      param_dtype: dtype of new parameters.
      train: whether dropout is applied.
      collect: whether an encoder returns every hidden state.
      unroll, remat: of the scan over layers, see `Bert`.
      attention: what computes attention, see `attend`.
    """

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    train: bool = False
    collect: bool = False
    unroll: int = 1
    remat: str = "none"
    attention: str = "auto"

    @property
    def float32(self) -> "Parts":
        """The same with float32 as the compute dtype."""
        return dataclasses.replace(self, dtype=jnp.float32)

    def dense(self, features: int, **options) -> nn.Dense:
        """``nn.Dense`` with a kernel from ``config.kernel_init`` and biases 0."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Dense(features, **{"kernel_init": self.config.kernel_init} | kinds | options)

    def table(self, rows: int, width: int, name: str) -> nn.Embed:
        """``nn.Embed`` with rows from ``config.kernel_init``."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Embed(rows, width, embedding_init=self.config.kernel_init, name=name, **kinds)

    def norm(self, name: str) -> nn.LayerNorm:
        """Layer norm over the last axis; its statistics are float32 whatever ``dtype``."""
        return nn.LayerNorm(
            epsilon=self.config.layer_norm_eps,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            # The two-pass variance: E[x^2] - E[x]^2 loses digits where the mean is large.
            use_fast_variance=False,
            name=name,
        )

    def dropout(self, rate: float | None = None) -> nn.Dropout:
        """Dropout with ``rate``, by default ``config.hidden_dropout_prob``."""
        default = self.config.hidden_dropout_prob
        return nn.Dropout(default if rate is None else rate, deterministic=not self.train)

    def bottleneck(self, name: str) -> Callable:
        """The adapter of a layer whose config asks for one, else the identity."""
        return Bottleneck(self, name=name) if self.config.bottleneck_width else lambda y: y

    def layers(self, layer: type["Layer"], x, *inputs, in_axes: Any = nn.broadcast, padding=0):
        """All layers, scanned, with parameters stacked on axis 0 under the name ``layers``.

        Args:
          layer: the class of a layer.
          x: (B, N, D).
          inputs: what every layer is called with beside ``x``.
          in_axes: for ``inputs``: 0 where they have a layer axis, ``nn.broadcast`` where they have
            none.
          padding: see `Attention`.

        Returns:
          (B, N, D), and with ``collect`` all hidden states (L + 1, B, N, D), else None.
        """
        length = self.config.num_hidden_layers
        if self.remat != "none":
            # Inside a loop nothing can undo the rematerialisation; unrolled code needs barriers.
            layer = nn.remat(layer, policy=REMAT[self.remat], prevent_cse=self.unroll >= length)
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=in_axes,
            length=length,
            unroll=self.unroll,
        )
        out, after = scanned(self, padding, name="layers")(x, *inputs)
        return out, None if after is None else jnp.concatenate([x[None], after])


class MLP(nn.Module):
    """fc2(act(fc1(x))): (B, N, D) -> (B, N, D)."""

    parts: Parts

    @nn.compact
    def __call__(self, x):
        c = self.parts.config
        x = ACTIVATIONS[c.hidden_act](self.parts.dense(c.intermediate_size, name="fc1")(x))
        return self.parts.dense(c.hidden_size, name="fc2")(x)


def kept_with_attention(x):
    """``x``, which ``remat="attention"`` keeps: a projection of attention, narrower than the MLP's.
    """
    return checkpoint_name(x, ATTENTION)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D), every projection a plain Dense.

    The last ``padding`` tokens only fill the length up: nothing attends to them.
    """

    parts: Parts
    padding: int = 0

    @nn.compact
    def __call__(self, x, mask=None):
        parts, c = self.parts, self.parts.config
        heads = (*x.shape[:-1], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        query, key, value = (
            kept_with_attention(
                parts.dense(c.hidden_size, use_bias=c.qkv_bias, name=name)(x)
            ).reshape(heads)
            for name in ("query", "key", "value")
        )
        if c.prefix_length:
            key, value, mask = Prefix(parts, name="prefix")(key, value, mask)
        if c.attention_probs_dropout_prob and parts.train:
            drop = parts.dropout(c.attention_probs_dropout_prob)
            mixed = attend_with_dropout(query, key, value, drop, mask)
        else:
            keys = key.shape[1] - self.padding if self.padding else None
            mixed = attend(query, key, value, parts.attention, mask, keys)
        return kept_with_attention(
            parts.dense(c.hidden_size, name="out")(mixed.reshape(x.shape))
        )


class Layer(nn.Module):
    """One layer as the body of a scan: x -> (x, x where ``parts.collect``, else None).

    A family may set another attention, and the norms before attention and MLP instead of after.
    """

    parts: Parts
    padding: int = 0

    attention_type = Attention
    norm_first = False

    @nn.compact
    def __call__(self, x, *inputs):
        x = self.changed(x, *inputs)
        return x, x if self.parts.collect else None

    @nn.nowrap
    def changed(self, x, *inputs):
        """What attention and MLP make of ``x``."""
        parts, drop = self.parts, self.parts.dropout()
        attention = self.attention_type(parts, self.padding, name="attention")
        mlp = MLP(parts, name="mlp")
        for i, block in (1, lambda x: attention(x, *inputs)), (2, mlp):
            norm, adapter = parts.norm(f"norm{i}"), parts.bottleneck(f"bottleneck{i}")
            if self.norm_first:
                x = x + adapter(drop(block(norm(x))))
            else:
                x = norm(x + adapter(drop(block(x))))
        return x


def with_token(module: nn.Module, parts: Parts, x, longest: int):
    """``x`` (B, N, D) behind a class token, plus positions: (B, 1 + N, D).

    ``module`` owns the token, and the positions of it and of ``longest`` others.
    """
    init, width = parts.config.kernel_init, parts.config.hidden_size
    token = module.param("cls_token", init, (1, 1, width), parts.param_dtype)
    position = module.param("position", init, (1, 1 + longest, width), parts.param_dtype)
    token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, width))
    x = jnp.concatenate([token, x], axis=1)
    return x + position[:, : x.shape[1]].astype(x.dtype)


class Encoder(nn.Module):
    """All layers: (B, N, D) -> (B, N, D), and every hidden state where ``parts.collect``."""

    parts: Parts

    @nn.compact
    def __call__(self, x, mask):
        return self.parts.layers(Layer, x, mask)


class Bottleneck(nn.Module):
    """y + up(gelu(down(y))) on the last axis, ``up`` beginning at 0.

    Without biases, so that direction i is column i of ``down`` and row i of ``up`` and no more.

    Source: Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, section 2.1; the formula without
    biases is that of He et al. 2022, https://arxiv.org/abs/2110.04366, equation 4.
    """

    parts: Parts

    @nn.compact
    def __call__(self, y):
        parts, c = self.parts, self.parts.config
        normal, zeros = nn.initializers.normal(c.initializer_range), nn.initializers.zeros
        down = parts.dense(c.bottleneck_width, use_bias=False, kernel_init=normal, name="down")
        up = parts.dense(y.shape[-1], use_bias=False, kernel_init=zeros, name="up")
        return y + up(ACTIVATIONS["gelu"](down(y)))


class Prefix(nn.Module):
    """Trained keys and values in front of a layer's own: (B, N, H, d) -> (B, P + N, H, d), twice.

    Every query attends to them: a mask over the keys, (B, N), comes back as (B, P + N).

    Source: Li and Liang 2021, https://arxiv.org/abs/2101.00190, section 4.
    """

    parts: Parts

    @nn.compact
    def __call__(self, key, value, mask):
        length = self.parts.config.prefix_length
        init = nn.initializers.normal(self.parts.config.initializer_range)

        def longer(name, x):
            batch, _, *heads = x.shape
            own = self.param(name, init, (length, math.prod(heads)), self.parts.param_dtype)
            own = own.astype(x.dtype).reshape(1, length, *heads)
            return jnp.concatenate([jnp.tile(own, (batch, 1, 1, 1)), x], axis=1)

        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (length, 0)), constant_values=True)
        return longer("key", key), longer("value", value), mask


def with_inserts(key, model: nn.Module, params: dict, *example) -> dict:
    """``params`` of a pretrained model, and fresh ones of what ``model`` has beyond them.

    Args:
      key: a ``jax.random`` key.
      model: the model with a config that has ``bottleneck_width`` or ``prefix_length`` set.
      params: its parameters without those.
      *example: arguments of the model's call, arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      Nested dicts; the leaves of ``params`` are the same arrays.

    >>> import dataclasses
    >>> from rmlora_jax.models import ViT, ViTConfig
    >>> config = ViTConfig(hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
    ...                    intermediate_size=16, image_size=8, patch_size=4)
    >>> images = jnp.zeros((1, 8, 8, 3))
    >>> params = ViT(config, 5).init(jax.random.key(0), images)["params"]
    >>> model = ViT(dataclasses.replace(config, bottleneck_width=2), 5)
    >>> params = with_inserts(jax.random.key(1), model, params, images)
    >>> params["encoder"]["layers"]["bottleneck1"]["down"]["kernel"].shape
    (2, 12, 2)
    """
    have = flatten_dict(params)

    @jax.jit  # compiled, nothing of the pretrained part is drawn
    def fresh(key):
        inputs = [jnp.zeros(x.shape, x.dtype) for x in example]
        made = flatten_dict(model.init(key, *inputs)["params"])
        return {path: leaf for path, leaf in made.items() if path not in have}

    return unflatten_dict({**have, **fresh(key)})


def check_fields(model: nn.Module, *counts: str, **choices) -> None:
    """Checks fields of a model: the named ``counts``, and those with a choice of values.

    Raises:
      ValueError: a count that is not a whole number of at least 1, or another value than allowed.
    """
    name = type(model).__name__
    for field, allowed in choices.items():
        value = getattr(model, field)
        if value not in allowed:
            raise ValueError(f"{name}: {field} is {value!r}; it must be one of {tuple(allowed)}")
    for field in counts:
        value = getattr(model, field)
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{name}: {field} is {value!r}; it must be a whole number of at least 1"
            )


def checked_tokens(model: str, longest: int | None, input_ids, attention_mask, token_type_ids):
    """The three inputs as arrays: ids (B, N), mask bool (B, N), types (B, N).

    Without a mask it stays None: one of ones would keep attention from kernels that take none.

    Raises:
      TypeError: ``input_ids`` are not integers.
      ValueError: they are no matrix, or longer than ``longest``; another shape of the others.
    """
    if not jnp.issubdtype(jnp.result_type(input_ids), jnp.integer):
        raise TypeError(f"{model}: input_ids are {jnp.result_type(input_ids)}; pass integers")
    shape = jnp.shape(input_ids)
    if len(shape) != 2:
        raise ValueError(f"{model}: input_ids have shape {shape}; expected (batch, tokens)")
    if longest is not None and shape[1] > longest:
        raise ValueError(
            f"{model}: {shape[1]} tokens, but the checkpoint has positions for {longest}; "
            "cut the texts to that length"
        )
    mask = None if attention_mask is None else jnp.asarray(attention_mask) != 0
    types = jnp.zeros(shape, jnp.int32) if token_type_ids is None else token_type_ids
    for name, value in (("attention_mask", mask), ("token_type_ids", types)):
        if value is not None and jnp.shape(value) != shape:
            raise ValueError(
                f"{model}: {name} has shape {jnp.shape(value)}; input_ids have {shape}"
            )
    return input_ids, mask, types


class Classifier(nn.Module):
    """The fields that classifiers share, see `Bert`."""

    config: Any
    num_labels: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    unroll: int = 1
    remat: str = "none"

    @nn.nowrap
    def parts(self, train: bool, hidden_states: bool = False) -> Parts:
        """What makes the layers, after a check of the fields; raises a ValueError."""
        check_fields(self, "num_labels", "unroll", remat=REMAT)
        kinds = (self.dtype, self.param_dtype)
        return Parts(self.config, *kinds, train, hidden_states, self.unroll, self.remat)


class TextClassifier(Classifier):
    """A classifier of texts. A family sets its embeddings, its encoder and `pooled`."""

    embed_type: ClassVar[Callable[..., nn.Module]]
    encoder_type: ClassVar[Callable[..., nn.Module]] = Encoder
    needs_mask: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        train: bool = False,
        hidden_states: bool = False,
    ):
        """Logits of a batch of tokenised texts.

        Args:
          input_ids: int (B, N).
          attention_mask: bool or 0 and 1, (B, N): False for padding. None: no padding.
          token_type_ids: int (B, N), which of two texts a token belongs to; used where the config
            has token types. None: 0.
          train: apply the dropout of the config (needs the rng ``dropout`` where it is above 0).
          hidden_states: also return the residual stream before the first and after every layer.

        Returns:
          (B, num_labels) float32 logits, which do not depend on how much padding there is; with
          ``hidden_states`` a pair of the logits and an array (L + 1, B, N, D) in the compute dtype.

        Raises:
          TypeError: the tokens are not integers.
          ValueError: shapes that do not fit, too many tokens, or an attribute out of its range.
        """
        parts = self.parts(train, hidden_states)
        input_ids, mask, types = checked_tokens(
            type(self).__name__, self.config.longest, input_ids, attention_mask, token_type_ids
        )
        if mask is None and self.needs_mask:
            mask = jnp.ones(input_ids.shape, bool)
        x = self.embed_type(parts, name="embed")(input_ids, types, mask)
        x, states = self.encoder_type(parts, name="encoder")(x, mask)
        pooled = self.pooled(parts.float32, x[:, 0].astype(jnp.float32))
        logits = parts.float32.dense(self.num_labels, name="head")(pooled)
        return (logits, states) if hidden_states else logits

    @nn.nowrap
    def pooled(self, parts: Parts, first: jax.Array) -> jax.Array:
        """What the head is given, (B, D), from the first token's last state (B, D)."""
        raise NotImplementedError
