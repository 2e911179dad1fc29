"""The encoder that the bundled families share.

`Parts` makes the layers of a model. `Attention`, `MLP`, `Layer` and `Encoder` are made of them, and
what adapters insert: `Bottleneck` and `Prefix`. `Classifier` and `TextClassifier` are the outermost
modules. A family fills in what differs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from rmlora_jax.models.attention import IMPLEMENTATIONS, attend, attend_with_dropout
from rmlora_jax.models.config import ACTIVATIONS

ATTENTION = "attention"  # the name of its projections, which remat="attention" keeps


def _fused_attention(primitive, *avals, **params) -> bool:
    """A policy that keeps the outputs of cuDNN's attention, which cannot be named one by one."""
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
    """Makes the layers of one model, see `Bert` for its fields.

    Its methods are called inside the call of a module, which then owns the layer.
    """

    config: Any  # an EncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    train: bool = False  # whether dropout is applied
    collect: bool = False  # whether an encoder returns every hidden state
    unroll: int = 1
    remat: str = "none"
    attention: str = "auto"  # see `attend`
    padding: int = 0  # the last tokens that only fill the length up: nothing attends to them

    @property
    def float32(self) -> "Parts":
        """The same with float32 as the compute dtype."""
        return dataclasses.replace(self, dtype=jnp.float32)

    def made(self, kind: Callable, *sizes, **options) -> Any:
        """A layer of Flax in the dtypes of the model."""
        return kind(*sizes, dtype=self.dtype, param_dtype=self.param_dtype, **options)

    def dense(self, features: int, **options) -> nn.Dense:
        """``nn.Dense`` with a kernel from ``config.kernel_init`` and biases 0."""
        return self.made(nn.Dense, features, **{"kernel_init": self.config.kernel_init} | options)

    def conv(self, window: tuple[int, ...], **options) -> nn.Conv:
        """``nn.Conv`` to ``hidden_size`` features, with a kernel as in `Parts.dense`."""
        c = self.config
        return self.made(nn.Conv, c.hidden_size, window, kernel_init=c.kernel_init, **options)

    def table(self, rows: int, width: int, name: str) -> nn.Embed:
        """``nn.Embed`` with rows from ``config.kernel_init``."""
        init = self.config.kernel_init
        return self.made(nn.Embed, rows, width, embedding_init=init, name=name)

    def norm(self, name: str) -> nn.LayerNorm:
        """Layer norm over the last axis; its statistics are float32 whatever ``dtype``."""
        # The two-pass variance: E[x^2] - E[x]^2 loses digits where the mean is large.
        options = {"epsilon": self.config.layer_norm_eps, "use_fast_variance": False}
        return self.made(nn.LayerNorm, name=name, **options)

    def dropout(self, rate: float | None = None) -> nn.Dropout:
        """Dropout with ``rate``, by default ``config.hidden_dropout_prob``."""
        default = self.config.hidden_dropout_prob
        return nn.Dropout(default if rate is None else rate, deterministic=not self.train)

    def layers(self, layer: type["Layer"], x, *inputs, in_axes: Any = nn.broadcast):
        """`Parts.scan` of ``x`` (B, N, D).

        Returns:
          (B, N, D), and with ``collect`` all hidden states (L + 1, B, N, D), else None.
        """
        out, after = self.scan(layer, x, *inputs, in_axes=in_axes)
        return out, None if after is None else jnp.concatenate([x[None], after])

    def scan(self, layer: type[nn.Module], carry, *inputs, in_axes: Any = nn.broadcast):
        """All layers, scanned, with parameters stacked on axis 0 under the name ``layers``.

        Args:
          layer: the class of a layer: (carry, *inputs) -> (carry, output).
          carry: what goes from layer to layer.
          inputs: the arguments of every layer beside ``carry``.
          in_axes: 0 for ``inputs`` with a layer axis, ``nn.broadcast`` for the others.

        Returns:
          The last carry, and the outputs stacked over the layers.
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
        return scanned(self, name="layers")(carry, *inputs)


class MLP(nn.Module):
    """fc2(act(fc1(x))): (B, N, D) -> (B, N, D)."""

    parts: Parts

    @nn.compact
    def __call__(self, x):
        c = self.parts.config
        x = ACTIVATIONS[c.hidden_act](self.parts.dense(c.intermediate_size, name="fc1")(x))
        return self.parts.dense(c.hidden_size, name="fc2")(x)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D), every projection a plain Dense."""

    parts: Parts

    @nn.compact
    def __call__(self, x, *inputs):
        parts, c = self.parts, self.parts.config
        heads = (*x.shape[:-1], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        linear = {
            name: parts.dense(c.hidden_size, use_bias=c.qkv_bias, name=name)
            for name in ("query", "key", "value")
        }
        own = (checkpoint_name(f(x), ATTENTION).reshape(heads) for f in linear.values())
        x = self.mixed(linear, *own, *inputs).reshape(x.shape)
        return checkpoint_name(parts.dense(c.hidden_size, name="out")(x), ATTENTION)

    @nn.nowrap
    def mixed(self, linear: dict[str, nn.Dense], query, key, value, mask=None):
        """The values mixed by their weights, all (B, N, H, head_dim).

        ``linear`` are the projections that made ``query``, ``key`` and ``value``.
        """
        parts, c = self.parts, self.parts.config
        if c.prefix_length:
            key, value, mask = Prefix(parts, name="prefix")(key, value, mask)
        if c.attention_probs_dropout_prob and parts.train:
            drop = parts.dropout(c.attention_probs_dropout_prob)
            return attend_with_dropout(query, key, value, drop, mask)
        keys = key.shape[1] - parts.padding if parts.padding else None
        return attend(query, key, value, parts.attention, mask, keys)


class Layer(nn.Module):
    """One layer as the body of a scan: x -> (x, x where ``parts.collect``, else None)."""

    parts: Parts
    attention_type: ClassVar[type[Attention]] = Attention

    @nn.compact
    def __call__(self, x, *inputs):
        x = self.changed(x, *inputs)
        return x, x if self.parts.collect else None

    @nn.nowrap
    def changed(self, x, *inputs):
        """``x`` after attention and MLP."""
        parts, drop = self.parts, self.parts.dropout()
        attention = self.attention_type(parts, name="attention")
        mlp = MLP(parts, name="mlp")
        for i, block in (1, lambda x: attention(x, *inputs)), (2, mlp):
            norm = parts.norm(f"norm{i}")
            y = drop(block(norm(x) if parts.config.norm_first else x))
            if parts.config.bottleneck_width:
                y = Bottleneck(parts, name=f"bottleneck{i}")(y)
            x = x + y if parts.config.norm_first else norm(x + y)
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
    """y + up(gelu(down(y))) on the last axis; ``up`` starts at 0.

    It has no biases, so that column i of ``down`` and row i of ``up`` are all of direction i.

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
    """Trained keys and values before a layer's own: both (B, N, H, d) -> (B, P + N, H, d).

    Every query attends to them: a mask over the keys, (B, N), becomes (B, P + N).

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
    """``params`` of a pretrained model, and fresh ones for what ``model`` inserts.

    ``example`` are the arguments of the model's call, arrays or ``jax.ShapeDtypeStruct``. The
    leaves of ``params`` come back as the same arrays.
    """
    have = flatten_dict(params)

    @jax.jit  # the compiler removes the draws of the pretrained part
    def fresh(key):
        inputs = [jnp.zeros(x.shape, x.dtype) for x in example]
        made = flatten_dict(model.init(key, *inputs)["params"])
        return {path: leaf for path, leaf in made.items() if path not in have}

    return unflatten_dict({**have, **fresh(key)})


# Fields of models.
CHOICES = {"remat": tuple(REMAT), "attention": IMPLEMENTATIONS}
COUNTS = ("num_labels", "num_classes", "outputs", "unroll")


def parts_of(model: nn.Module, train: bool, collect: bool = False) -> Parts:
    """The `Parts` of a model, from its fields of the same names.

    Raises:
      ValueError: a field has a value that is not allowed.
    """
    own = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    for name, value in own.items():
        if name in CHOICES:
            fine, words = value in CHOICES[name], f"one of {CHOICES[name]}"
        elif name in COUNTS:
            fine, words = type(value) is int and value >= 1, "a whole number of at least 1"
        else:
            continue
        if not fine:
            raise ValueError(f"{type(model).__name__}: {name} is {value!r}; it must be {words}")
    shared = own.keys() & {field.name for field in dataclasses.fields(Parts)}
    return Parts(**{name: own[name] for name in shared}, train=train, collect=collect)


class Classifier(nn.Module):
    """The fields of classifiers, see `Bert`."""

    config: Any
    num_labels: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    unroll: int = 1
    remat: str = "none"


class TextClassifier(Classifier):
    """A classifier of texts, of which a family sets the parts that differ."""

    embed_type: ClassVar[Callable[..., nn.Module]]
    encoder_type: ClassVar[Callable[..., nn.Module]] = Encoder
    # (parts, last state of the first token (B, D)) -> what the head gets (B, D)
    pooled: ClassVar[Callable[[Parts, jax.Array], jax.Array]]
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
        parts = parts_of(self, train, hidden_states)
        types, mask = self.checked(input_ids, attention_mask, token_type_ids)
        x = self.embed_type(parts, name="embed")(input_ids, types, mask)
        x, states = self.encoder_type(parts, name="encoder")(x, mask)
        pooled = self.pooled(parts.float32, x[:, 0].astype(jnp.float32))
        logits = parts.float32.dense(self.num_labels, name="head")(pooled)
        return (logits, states) if hidden_states else logits

    @nn.nowrap
    def checked(self, input_ids, mask, types):
        """Types int (B, N) and mask bool (B, N), after a check of all three inputs.

        No mask stays None unless ``needs_mask``: only XLA's attention takes one.
        """
        model, longest, shape = type(self).__name__, self.config.longest, jnp.shape(input_ids)
        if not jnp.issubdtype(jnp.result_type(input_ids), jnp.integer):
            raise TypeError(f"{model}: input_ids are {jnp.result_type(input_ids)}; pass integers")
        if len(shape) != 2:
            raise ValueError(f"{model}: input_ids have shape {shape}; expected (batch, tokens)")
        if longest is not None and shape[1] > longest:
            raise ValueError(
                f"{model}: {shape[1]} tokens, but the checkpoint has positions for {longest}; "
                "cut the texts to that length"
            )
        types = jnp.zeros(shape, jnp.int32) if types is None else types
        if mask is not None or self.needs_mask:
            mask = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask) != 0
        for name, value in (("attention_mask", mask), ("token_type_ids", types)):
            if value is not None and jnp.shape(value) != shape:
                raise ValueError(
                    f"{model}: {name} has shape {jnp.shape(value)}; input_ids have {shape}"
                )
        return types, mask
