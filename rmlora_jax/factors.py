"""Finding the LoRA factors in any pytree.

A module's two factors are ``a`` of shape ``(*stack, in, rank)`` and ``b`` of shape
``(*stack, rank, out)``. They are recognised by the end of their path, so the same code serves
Linen dictionaries, ``nnx.State``, Gemma's and Qwix's trees, optimizer updates and gradients.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

# What ends the path of A and of B: Linen and nnx.LoRA siblings, Qwix's suffixes, Gemma's scope.
DEFAULT_FACTORS = (r"lora_a|lora/a", r"lora_b|lora/b")

FactorNames = str | tuple[str, str] | None


class Factor(NamedTuple):
    """One factor leaf of a flattened tree.

    Attributes:
      index: position among the leaves that :func:`flatten` returns.
      path: '/'-joined path of the leaf, without a leading ``params``.
      module: what precedes the factor's name; A and B of one module share it.
      side: ``"a"``, ``"b"``, or None for a leaf that stands alone (``factors`` is one regex).
      shape: shape of the leaf.
    """

    index: int
    path: str
    module: str
    side: str | None
    shape: tuple[int, ...]

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes, over which nn.scan or nn.vmap stacked the layers."""
        return self.shape[:-2]

    @property
    def rank(self) -> int:
        """Number of rank directions; only a factor with a side has them."""
        return self.shape[-1] if self.side == "a" else self.shape[-2]


def path_string(path: Sequence[Any]) -> str:
    """The '/'-joined name of a ``jax.tree_util`` key path.

    A leading ``params`` and the ``.value`` of a boxed leaf (nnx.Variable, nn.Partitioned) are
    dropped, so that one parameter has one name in every kind of tree.

    >>> tree = {"params": {"head": {"lora_a": 0.0}}}
    >>> [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['head/lora_a']
    """
    path = list(path)
    while path and _is_box(path[-1]):
        path.pop()
    name = "/".join(_component(key) for key in path)
    return name.removeprefix("params/")


def flatten(tree: Any) -> tuple[list[Any], Any, list[str]]:
    """``(leaves, treedef, paths)``, with None and ``optax.MaskedNode`` kept as leaves.

    They stand for parameters that are not there; keeping them keeps two trees of the same
    parameters aligned.
    """
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_absent)
    return [leaf for _, leaf in with_paths], treedef, [path_string(p) for p, _ in with_paths]


def is_absent(leaf: Any) -> bool:
    """Whether a leaf stands for a parameter that is not there (None, ``optax.MaskedNode``)."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def find_factors(tree: Any, factors: FactorNames = None) -> list[Factor]:
    """The factors of a tree, in the tree's order, with their shapes checked.

    Args:
      tree: any pytree of arrays, or of anything with a ``shape``.
      factors: None for the usual names: a path that ends in ``lora_a`` / ``lora_b`` (also after
        an underscore, ``kernel_lora_a``) or ``lora/a`` / ``lora/b``. A pair of regular
        expressions ``(a, b)`` replaces them: each must match the end of the path in full, from
        the start of a component or from behind an underscore, and what precedes the match must
        be the same for A and B. One regular expression names leaves that stand alone and is
        matched against the whole path.

    Returns:
      A list of :class:`Factor`, empty where the tree has no arrays at all (optax initialises
      transformations with such placeholders). A factor whose partner is absent is returned
      alone: methods that freeze A train such trees.

    Raises:
      ValueError: the tree has arrays but no factors; the shapes of A and B do not fit; two
        leaves claim to be the same factor; a regular expression is invalid.
      TypeError: ``factors`` is neither None, a string nor a pair of strings.

    >>> import jax.numpy as jnp
    >>> tree = {"q": {"kernel": jnp.ones((3, 5)), "lora_a": jnp.ones((3, 2)),
    ...               "lora_b": jnp.ones((2, 5))}}
    >>> [(f.path, f.module, f.side, f.rank) for f in find_factors(tree)]
    [('q/lora_a', 'q', 'a', 2), ('q/lora_b', 'q', 'b', 2)]
    >>> [f.path for f in find_factors(tree, factors=r".*/kernel")]
    ['q/kernel']
    """
    sides = _compile(factors)
    leaves, _, paths = flatten(tree)
    present = [i for i, leaf in enumerate(leaves) if not is_absent(leaf)]
    found = []
    for i in present:
        for side, pattern in sides.items():
            module = _module(pattern, paths[i], side)
            if module is not None:
                found.append(Factor(i, paths[i], module, side, tuple(leaves[i].shape)))
    if present and not found:
        raise ValueError(_nothing_found(factors, [paths[i] for i in present]))
    _check(found)
    return found


def _is_box(key: Any) -> bool:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return key.name == "value"
    return isinstance(key, jax.tree_util.FlattenedIndexKey)


def _component(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _compile(factors: FactorNames) -> dict[str | None, re.Pattern[str]]:
    if factors is None:
        factors = DEFAULT_FACTORS
    if isinstance(factors, str):
        sides = {None: factors}
    elif (
        isinstance(factors, Sequence)
        and len(factors) == 2
        and all(isinstance(pattern, str) for pattern in factors)
    ):
        sides = {"a": factors[0], "b": factors[1]}
    else:
        raise TypeError(
            f"factors={factors!r} must be None, one regular expression, or a pair of them (a, b), "
            r"such as ('down/kernel', 'up/kernel')"
        )
    try:
        return {side: re.compile(pattern) for side, pattern in sides.items()}
    except re.error as error:
        raise ValueError(f"factors={factors!r}: invalid regular expression: {error}") from None


def _module(pattern: re.Pattern[str], path: str, side: str | None) -> str | None:
    """What precedes the factor's name in ``path``; None if the path does not end in it."""
    if side is None:
        return path if pattern.fullmatch(path) else None
    # From the right: the shortest end that matches leaves the most specific module.
    starts = [i + 1 for i, c in enumerate(path) if c in "/_"]
    for start in [*reversed(starts), 0]:
        if pattern.fullmatch(path, start):
            return path[: max(start - 1, 0)]
    return None


def _nothing_found(factors: FactorNames, paths: list[str]) -> str:
    wanted = f"factors={factors!r} matches none" if factors is not None else (
        "none is named lora_a / lora_b (or lora/a, lora/b)"
    )
    examples = ", ".join(repr(path) for path in paths[:3])
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return (
        f"no LoRA factors: of the leaves {examples}{more}, {wanted}. Pass a tree with factors, "
        r"or name yours, for example factors=(r'down/kernel', r'up/kernel')."
    )


def _check(found: list[Factor]) -> None:
    seen: dict[tuple[str, str | None], Factor] = {}
    by_path: dict[str, Factor] = {}
    for factor in found:
        if factor.path in by_path:
            raise ValueError(
                f"{factor.path!r} is matched as A and as B: make the two regular expressions of "
                "`factors` differ"
            )
        by_path[factor.path] = factor
        twin = seen.setdefault((factor.module, factor.side), factor)
        if twin is not factor:
            raise ValueError(
                f"{twin.path!r} and {factor.path!r} are both factor {factor.side!r} of module "
                f"{factor.module!r}: name the factors apart with `factors`"
            )
        if factor.side is not None and len(factor.shape) < 2:
            raise ValueError(
                f"{factor.path!r} has shape {factor.shape}: a factor has at least the axes "
                "(in, rank) or (rank, out)"
            )
    for (module, side), a in seen.items():
        b = seen.get((module, "b"))
        if side == "a" and b is not None and (a.stack, a.rank) != (b.stack, b.rank):
            raise ValueError(
                f"the factors of {module!r} do not fit: {a.path!r} has shape {a.shape} and "
                f"{b.path!r} {b.shape}, but (*stack, in, rank) and (*stack, rank, out) need the "
                "same stack and rank. Flatten several in or out axes into one, and stack scanned "
                "layers on axis 0."
            )
