"""The tiny models of the comparison, each in Linen and in NNX."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 6, 8)), jnp.float32)
IMAGES = jnp.asarray(RNG.normal(size=(2, 8, 8, 3)), jnp.float32)
IDS = jnp.arange(12).reshape(2, 6)
LAYERS = 3


def rngs():
    return nnx.Rngs(0)


class LinenNet(nn.Module):
    """Two Dense layers, made in setup."""

    dtype: jnp.dtype = None
    param_dtype: jnp.dtype = jnp.float32

    def setup(self):
        layer = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        self.body, self.head = layer(8), layer(4)

    def __call__(self, x):
        return self.head(self.encode(x))

    def encode(self, x):
        return nn.tanh(self.body(x))


class NNXNet(nnx.Module):
    def __init__(self, **fields):
        self.body = nnx.Linear(8, 8, rngs=rngs(), **fields)
        self.head = nnx.Linear(8, 4, rngs=rngs(), **fields)

    def __call__(self, x):
        return self.head(self.encode(x))

    def encode(self, x):
        return nnx.tanh(self.body(x))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(8, name="fc2")(nn.gelu(nn.Dense(16, name="fc1")(x))), None


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.fc1, self.fc2 = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.fc2(nnx.gelu(self.fc1(x)))


class LinenLooped(nn.Module):
    block: type[nn.Module] = LinenBlock

    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x, _ = self.block(name=f"layers_{i}")(x)
        return x


class LinenScanned(nn.Module):
    block: type[nn.Module] = LinenBlock

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            self.block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=LAYERS,
        )
        return layers(name="layers")(x, None)[0]


class NNXLooped(nnx.Module):
    def __init__(self, remat=False):
        self.layers = nnx.List([NNXBlock(nnx.Rngs(i)) for i in range(LAYERS)])
        self.remat = remat

    def __call__(self, x):
        for layer in self.layers:
            x = run_block_again(layer, x) if self.remat else layer(x)
        return x


class NNXScanned(nnx.Module):
    def __init__(self, remat=False):
        create = nnx.vmap(lambda rngs: NNXBlock(rngs))
        self.layers = create(rngs().fork(split=LAYERS))
        self.remat = remat

    def __call__(self, x):
        block = run_block_again if self.remat else run_block
        return nnx.scan(
            lambda x, layer: block(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )(x, self.layers)


def run_block(block, x):
    return block(x)


run_block_again = nnx.remat(run_block)


class LinenMapped(nn.Module):
    """A layer of its own for each example."""

    @nn.compact
    def __call__(self, x):
        dense = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
        return dense(5, name="fc")(x)


class NNXMapped(nnx.Module):
    def __init__(self):
        self.fc = nnx.vmap(lambda rngs: nnx.Linear(8, 5, rngs=rngs))(rngs().fork(split=X.shape[0]))

    def __call__(self, x):
        return nnx.vmap(run_block)(self.fc, x)


class LinenTwice(nn.Module):
    @nn.compact
    def __call__(self, x):
        fc = nn.Dense(8, name="fc")
        return fc(nn.tanh(fc(x)))


class NNXTwice(nnx.Module):
    def __init__(self):
        self.fc = nnx.Linear(8, 8, rngs=rngs())

    def __call__(self, x):
        return self.fc(nnx.tanh(self.fc(x)))


class LinenNormed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="fc")(x)
        return nn.BatchNorm(use_running_average=not train, name="norm")(x)


class NNXNormed(nnx.Module):
    def __init__(self):
        self.fc = nnx.Linear(8, 8, rngs=rngs())
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs())

    def __call__(self, x):
        return self.norm(self.fc(x))

    def mean_after_training(self, x):
        self.norm.use_running_average = False
        self(x)
        return self.norm.mean[...]


class LinenTied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(13, 8, name="table")
        return table.attend(nn.tanh(table(ids)))


class NNXTied(nnx.Module):
    def __init__(self):
        self.table = nnx.Embed(13, 8, rngs=rngs())

    def __call__(self, ids):
        return self.table.attend(nnx.tanh(self.table(ids)))


class LinenCallTimeEinsum(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Einsum((8, 5), name="fc")(x, "btd,do->bto")


class NNXCallTimeEinsum(nnx.Module):
    def __init__(self):
        self.fc = nnx.Einsum("...d,do->...o", (8, 5), (5,), rngs=rngs())

    def __call__(self, x):
        return self.fc(x, "btd,do->bto")


def matmul(x, w):
    return x @ w


def dot(x, w):
    return jnp.dot(x, w)


class LinenCustom(nn.Module):
    """A layer that Flax does not know."""

    product: Callable = matmul

    @nn.compact
    def __call__(self, x):
        return self.product(x, self.param("w", nn.initializers.lecun_normal(), (8, 5)))


class LinenHoldsCustom(nn.Module):
    product: Callable = matmul

    @nn.compact
    def __call__(self, x):
        return LinenCustom(self.product, name="fc")(x)


class NNXCustom(nnx.Module):
    def __init__(self, product):
        self.w = nnx.Param(nnx.initializers.lecun_normal()(jax.random.key(0), (8, 5)))
        self.product = product

    def __call__(self, x):
        return self.product(x, self.w[...])


class NNXHoldsCustom(nnx.Module):
    def __init__(self, product=matmul):
        self.fc = NNXCustom(product)

    def __call__(self, x):
        return self.fc(x)


class LinenOdd(nn.Module):
    """A weight that meets its input in a way that no product of factors follows."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (8, 5))
        return jnp.abs(x[..., None] - kernel).sum(-2)


class LinenHoldsOdd(nn.Module):
    @nn.compact
    def __call__(self, x):
        return LinenOdd(name="fc")(x)


class NNXOdd(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(jax.random.key(0), (8, 5)))

    def __call__(self, x):
        return jnp.abs(x[..., None] - self.kernel[...]).sum(-2)


class NNXHoldsOdd(nnx.Module):
    def __init__(self):
        self.fc = NNXOdd()

    def __call__(self, x):
        return self.fc(x)


class LinenWide(nn.Module):
    """Three wide layers and nothing else, for counting flops."""

    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x = nn.Dense(128, use_bias=False, name=f"fc_{i}")(x)
        return x


class NNXWide(nnx.Module):
    def __init__(self):
        self.fc = nnx.List(
            [nnx.Linear(128, 128, use_bias=False, rngs=nnx.Rngs(i)) for i in range(LAYERS)]
        )

    def __call__(self, x):
        for layer in self.fc:
            x = layer(x)
        return x


class Holder:
    """A model in the manner of Hugging Face's Flax classes: ``.module`` and ``.params``."""

    def __init__(self, module, params):
        self.module, self.params = module, params

    def __call__(self, *args):
        return self.module.apply({"params": self.params}, *args)


class NNXDecoder(nnx.Module):
    """Llama-like: grouped-query attention, rotary positions, a gated MLP, scanned blocks."""

    def __init__(self):
        self.embed = nnx.Embed(17, 16, rngs=rngs())
        create = nnx.vmap(lambda rngs: DecoderBlock(rngs))
        self.layers = create(rngs().fork(split=LAYERS))
        self.norm = nnx.RMSNorm(16, rngs=rngs())

    def __call__(self, ids):
        scan = nnx.scan(
            lambda x, layer: run_block_again(layer, x),
            in_axes=(nnx.Carry, 0),
            out_axes=nnx.Carry,
        )
        return self.embed.attend(self.norm(scan(self.embed(ids), self.layers)))


class DecoderBlock(nnx.Module):
    heads, groups, size = 4, 2, 4

    def __init__(self, rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = nnx.RMSNorm(16, rngs=rngs), nnx.RMSNorm(16, rngs=rngs)
        self.q, self.k = linear(16, 16), linear(16, 8)
        self.v, self.o = linear(16, 8), linear(16, 16)
        self.gate, self.up, self.down = linear(16, 32), linear(16, 32), linear(32, 16)

    def __call__(self, x):
        y = self.norm1(x)
        q = rotary(self.q(y).reshape(*x.shape[:-1], self.heads, self.size))
        k = rotary(self.k(y).reshape(*x.shape[:-1], self.groups, self.size))
        v = self.v(y).reshape(*x.shape[:-1], self.groups, self.size)
        # Grouped queries: jax.nn gives each key-value head to heads / groups of the query heads.
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.reshape(x.shape))
        y = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


def rotary(x):
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
