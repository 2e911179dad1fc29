"""Rows of the table: layers."""

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from . import models as m
from .checks import adapts
from .libraries import ByHand, Case
from .rows import Row

HEADS = jnp.reshape(m.X, (2, 6, 2, 4))


def rows():
    return [Row("Layers", name, case, check) for name, case, check in _cases()]


def _cases():
    r = m.rngs

    def layer(name, linen, nnx_, *args, check=adapts, **fields):
        return name, Case(linen, nnx_, args, **fields), check

    yield layer("Dense / Linear", lambda: nn.Dense(5), lambda: nnx.Linear(8, 5, rngs=r()), m.X)
    yield layer(
        "DenseGeneral / LinearGeneral, several output axes",
        lambda: nn.DenseGeneral((3, 4)),
        lambda: nnx.LinearGeneral(8, (3, 4), rngs=r()),
        m.X,
    )
    yield layer(
        "… several input axes",
        lambda: nn.DenseGeneral(5, axis=(-2, -1)),
        lambda: nnx.LinearGeneral((6, 8), 5, axis=(-2, -1), rngs=r()),
        m.X,
    )
    yield layer(
        "… batch_dims / batch_axis",
        lambda: nn.DenseGeneral(5, batch_dims=(0,)),
        lambda: nnx.LinearGeneral(8, 5, batch_axis={0: 2}, rngs=r()),
        m.X,
        stack=1,
    )
    yield layer(
        "MultiHeadDotProductAttention / MultiHeadAttention",
        lambda: nn.MultiHeadDotProductAttention(2),
        lambda: nnx.MultiHeadAttention(2, 8, decode=False, rngs=r()),
        m.X,
    )
    convolutions = {
        "Conv, 1-D": ((3,), {}, m.X),
        "Conv, 2-D": ((3, 3), {}, m.IMAGES),
        "Conv, strided": ((2, 2), {"strides": (2, 2)}, m.IMAGES),
        "Conv, dilated": ((3,), {"kernel_dilation": 2}, m.X),
        "Conv, CAUSAL padding": ((3,), {"padding": "CAUSAL"}, m.X),
        "Conv, SAME padding, even kernel": ((4,), {"padding": "SAME"}, m.X),
        "Conv, grouped": ((3,), {"feature_group_count": 4}, m.X),
    }
    for name, (size, fields, x) in convolutions.items():
        yield layer(
            name,
            lambda size=size, fields=fields: nn.Conv(12, size, **fields),
            lambda size=size, fields=fields, n=x.shape[-1]: nnx.Conv(
                n, 12, size, **fields, rngs=r()
            ),
            x,
        )
    yield layer(
        "ConvTranspose",
        lambda: nn.ConvTranspose(5, (3,), strides=(2,)),
        lambda: nnx.ConvTranspose(8, 5, (3,), strides=2, rngs=r()),
        m.X,
    )
    yield layer(
        "ConvTranspose, transpose_kernel",
        lambda: nn.ConvTranspose(5, (3,), transpose_kernel=True),
        lambda: nnx.ConvTranspose(8, 5, (3,), transpose_kernel=True, rngs=r()),
        m.X,
        delta=((3, 8, -1), (-1, 5), "kir,ro->koi"),
        or_delta=((3, 8, -1), (-1, 5), "kir,ro->koi", 0),  # by the taps as they are run
    )
    yield layer("Embed", lambda: nn.Embed(13, 8), lambda: nnx.Embed(13, 8, rngs=r()), m.IDS)
    yield layer("Embed, tied by attend", m.LinenTied, m.NNXTied, m.IDS)
    yield layer(
        "Einsum, contracted",
        lambda: nn.Einsum((8, 5), "...d,do->...o"),
        lambda: nnx.Einsum("...d,do->...o", (8, 5), (5,), rngs=r()),
        m.X,
    )
    yield layer(
        "Einsum, batched: BTND,NDH->BTNH",
        lambda: nn.Einsum((2, 4, 3), "BTND,NDH->BTNH"),
        lambda: nnx.Einsum("BTND,NDH->BTNH", (2, 4, 3), rngs=r()),
        HEADS,
        stack=1,
    )
    yield layer(
        "Einsum, interleaved: BTD,NDH->BTNH",
        lambda: nn.Einsum((2, 8, 3), "BTD,NDH->BTNH"),
        lambda: nnx.Einsum("BTD,NDH->BTNH", (2, 8, 3), rngs=r()),
        m.X,
        delta=((8, -1), (-1, 2, 3), "dr,rnh->ndh"),
    )
    yield layer(
        "Einsum, equation given at the call", m.LinenCallTimeEinsum, m.NNXCallTimeEinsum, m.X
    )
    custom = tuple((cls, "...i,io->...o", {"weight": "w"}) for cls in (m.LinenCustom, m.NNXCustom))
    yield layer(
        "a layer of one's own, `x @ w`",
        m.LinenHoldsCustom,
        m.NNXHoldsCustom,
        m.X,
        layers=custom,
    )
    yield layer(
        "a layer of one's own, `jnp.dot(x, w)`",
        lambda: m.LinenHoldsCustom(m.dot),
        lambda: m.NNXHoldsCustom(m.dot),
        m.X,
        layers=custom,
    )
    yield layer(
        "anything else, by running on merged weights",
        m.LinenHoldsOdd,
        m.NNXHoldsOdd,
        m.X,
        # How a weight of no known class is laid out has to be said.
        layers=tuple((cls, "...i,io->...o", {}) for cls in (m.LinenOdd, m.NNXOdd)),
        check=_adapts_by_merging,
    )


def _adapts_by_merging(case, library, framework):
    options = {} if isinstance(library, ByHand) else {"execution": "merged"}
    adapts(case, library, framework, **options)
