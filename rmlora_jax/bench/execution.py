"""Which execution a compiled step took: found in its program, not in what was asked for."""

from collections.abc import Iterator

import jax

import rmlora_jax as rm


def execution_of(jaxpr, lora: rm.LoRA | None, frozen: dict) -> str | None:
    """"merged" where W + s A B is formed for any adapted weight, else "factored".

    Args:
      jaxpr: the step's, as ``jax.jit(step).trace(...).jaxpr`` has it.
      lora: what the step adapts; None, or a description without targets, for one without factors.
      frozen: the base, arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      None for a step without factors.
    """
    if lora is None or lora.target is None:
        return None
    # A weight has no axis of the rank's size; stacks of so many biases, and what the penalty
    # multiplies, have one.
    shapes = {leaf.shape[-2:] for leaf in jax.tree.leaves(frozen)}
    weights = {shape for shape in shapes if len(shape) == 2 and lora.rank not in shape}
    merges = any(_forms_weight(e, lora.rank, weights) for e in _equations(jaxpr.jaxpr))
    return "merged" if merges else "factored"


def _forms_weight(equation, rank: int, weights: set) -> bool:
    """Whether an equation is A @ B, of one layer or of a stack of layers, in the shape of W.

    The last axis of one meets the last but one of the other: x^T g, the gradient of a weight, which
    has the same shapes where the batch is as large as the rank, contracts the same axis of both.
    """
    if equation.primitive.name != "dot_general":
        return False
    left, right = (v.aval.shape for v in equation.invars)
    (of_left, of_right), (stacked, _) = equation.params["dimension_numbers"]
    out = equation.outvars[0].aval.shape
    return (
        [left[i] for i in of_left] == [rank]
        and {len(left) - of_left[0], len(right) - of_right[0]} == {1, 2}
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
