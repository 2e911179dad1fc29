"""Floating-point operations of a program's matrix products and convolutions.

Counted in the traced program, since XLA's cost analysis counts the body of a loop once. What is
computed again in the backward pass (``model.remat``) counts again; everything else, such as
softmax, norms and the optimizer, is left out.
"""

import math
from collections.abc import Iterator
from typing import Any


def flops(traced: Any) -> int:
    """Operations of ``jax.jit(f).trace(*args)``, a multiplication and an addition being two.

    Inside `jax.shard_map` these are those of one device.

    >>> import jax, jax.numpy as jnp
    >>> def product(a, b):
    ...     return jax.lax.scan(lambda c, _: (c @ b, None), a, None, length=5)[0]
    >>> flops(jax.jit(product).trace(jnp.ones((2, 3)), jnp.ones((3, 3))))
    180
    """
    return _count(traced.jaxpr.jaxpr)


def _count(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * eqn.outvars[0].aval.size
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * (kernel.size // outputs) * eqn.outvars[0].aval.size
        elif name == "cond":
            total += max(map(_count, _inner(eqn.params["branches"])))
        elif name == "custom_jvp_call" or name == "custom_vjp_call":
            total += max(map(_count, _inner(eqn.params)), default=0)  # the function, not its rules
        else:
            turns = eqn.params["length"] if name == "scan" else 1
            total += turns * sum(map(_count, _inner(eqn.params)))
    return total


def _inner(value: Any) -> Iterator[Any]:
    """The programs among the parameters of an equation."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for part in value:
            yield from _inner(part)
    elif hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr
