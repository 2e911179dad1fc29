"""Which execution a compiled step took: found in its program, not in what was asked for."""

from collections.abc import Iterator

import jax

import rmlora_jax as rm


def execution_of(step, lora: rm.LoRA | None, *arguments) -> str | None:
    """"merged" where W + s A B is formed for any adapted weight, else "factored".

    Args:
      step: a function to be compiled; it is traced only.
      lora: what it adapts; None, or a description without targets, for a step without factors.
      *arguments: of the step, arrays or ``jax.ShapeDtypeStruct``, with the frozen base second.

    Returns:
      None for a step without factors.
    """
    if lora is None or lora.target is None:
        return None
    weights = {leaf.shape[-2:] for leaf in jax.tree.leaves(arguments[1]) if len(leaf.shape) > 1}
    traced = jax.make_jaxpr(step)(*arguments)
    merges = any(_forms_weight(e, lora.rank, weights) for e in _equations(traced.jaxpr))
    return "merged" if merges else "factored"


def _forms_weight(equation, rank: int, weights: set) -> bool:
    """Whether an equation is A @ B, of one layer or of a stack of layers, in the shape of W."""
    if equation.primitive.name != "dot_general":
        return False
    left, right = (v.aval.shape for v in equation.invars)
    (contracted, _), (stacked, _) = equation.params["dimension_numbers"]
    out = equation.outvars[0].aval.shape
    sizes = [left[i] for i in contracted]
    return (
        sizes == [rank]
        and out[-2:] in weights
        and len(out) == 2 + len(stacked)
        and len(right) == 2 + len(stacked)
    )


def _equations(jaxpr) -> Iterator:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)
