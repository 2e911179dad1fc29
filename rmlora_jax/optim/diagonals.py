"""Finding the diagonals that AdaLoRA and SoRA put between their factors, in any pytree."""

import math
from typing import Any, NamedTuple

from rmlora_jax.optim.factors import ADAPTED, Factor, find_factors, flatten, is_absent


class Diagonal(NamedTuple):
    """One adapted module, Delta W = s A diag(e) B; all layers of a stack together.

    Attributes:
      module: what precedes the factors' names in their paths.
      e: index of the leaf of the diagonal, of shape (*stack, r), as :func:`flatten` counts.
      a, b: A, of shape (*stack, in, r), and B, of shape (*stack, r, out).
    """

    module: str
    e: int
    a: Factor
    b: Factor

    @property
    def layers(self) -> int:
        """Number of layers stacked, 1 without a stack."""
        return math.prod(self.a.stack)

    @property
    def rank(self) -> int:
        """Number of rank directions of each layer."""
        return self.a.rank

    @property
    def cost(self) -> int:
        """Parameters in one rank direction: a column of A and a row of B."""
        return (math.prod(self.a.shape) + math.prod(self.b.shape)) // (self.layers * self.rank)


def find_diagonals(tree: Any) -> list[Diagonal]:
    """The modules of a tree that have a diagonal between their factors, in the tree's order.

    The diagonal of ``q/lora_a`` and ``q/lora_b`` is ``q/lora_e``; of ``w_lora_a``, ``w_lora_e``;
    of ``lora/a``, ``lora/e``. A tree without arrays has no modules.

    Raises:
      ValueError: the tree has no factors; one of A, B and the diagonal is missing; or the diagonal
        is not of shape (*stack, r).

    Example:
      >>> import jax.numpy as jnp
      >>> q = {"lora_a": jnp.ones((5, 3, 2)), "lora_b": jnp.ones((5, 2, 4))}
      >>> q["lora_e"] = jnp.ones((5, 2))
      >>> [(d.module, d.e, d.layers, d.rank, d.cost) for d in find_diagonals({"q": q})]
      [('q', 2, 5, 2, 7)]
    """
    leaves, _, paths = flatten(tree)
    places = {path: i for i, path in enumerate(paths) if not is_absent(leaves[i])}
    sides = {}
    for factor in find_factors(tree, ADAPTED):
        sides.setdefault(factor.module, {})[factor.side] = factor
    found = []
    for module, pair in sides.items():
        factor = next(iter(pair.values()))
        wanted = [f"{factor.path[:-1]}{side}" for side in "abe"]
        missing = [path for path in wanted if path not in places]
        if missing:
            raise ValueError(
                f"{factor.path!r} has no {' and no '.join(map(repr, missing))} beside it: this "
                "optimizer needs lora_a, lora_b and lora_e of every module; adapt the model with "
                "the AdaLoRA or SoRA description, or use optax.adamw or rm_lora for plain LoRA"
            )
        e, shape = places[wanted[2]], (*factor.stack, factor.rank)
        if tuple(leaves[e].shape) != shape:
            raise ValueError(
                f"{wanted[2]!r} has shape {tuple(leaves[e].shape)}, but {factor.path!r} of shape "
                f"{factor.shape} needs a diagonal of shape (*stack, rank) = {shape}"
            )
        found.append(Diagonal(module, e, **pair))
    return found
