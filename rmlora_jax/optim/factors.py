"""Finding the LoRA factors in any pytree.

A module's factors are ``a`` of shape ``(*stack, *in, rank)`` and ``b`` of shape
``(*stack, rank, *out)``; where their axes stand otherwise, ``factors`` says how. They are
recognised by the end of their path: in Linen dictionaries, ``nnx.State``, Equinox modules, Gemma's
and Qwix's trees, updates and gradients.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

# What ends the path of A and of B: Linen and nnx.LoRA siblings, Qwix's suffixes, Gemma's scope.
DEFAULT_FACTORS = (r"lora_a|lora/a", r"lora_b|lora/b")

# The factors that ``adapt`` makes: their axes stand in the usual order, whatever their sizes.
USUAL = "...ir", "...ro"
ADAPTED = (*DEFAULT_FACTORS, ",".join(USUAL))

FactorNames = str | tuple[str, str] | tuple[str, str, int | str] | None


class Factor(NamedTuple):
    """One factor leaf of a flattened tree.

    Attributes:
      index: position among the leaves that :func:`flatten` returns.
      path: '/'-joined path of the leaf, without a leading ``params``.
      module: the path before the factor's name; A and B of one module share it.
      side: ``"a"``, ``"b"``, or None for a leaf that stands alone (``factors`` is one regex).
      shape: its shape, with the axes in the order (*stack, *in, rank) or (*stack, rank, *out).
      depth: number of stack axes, over which nn.scan or nn.vmap stacked the layers.
      order: the axes of the leaf in the order of ``shape``.
    """

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    path: str
    module: str
    side: str | None
    shape: tuple[int, ...]
    depth: int
    order: tuple[int, ...]

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the stack's axes."""
        return self.shape[: self.depth]

    @property
    def rank(self) -> int:
        """Number of rank directions; only a factor with a side has them."""
        return self.shape[-1] if self.side == "a" else self.shape[self.depth]

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape with all in axes, or all out axes, flattened into one."""
        ends = (-1, self.rank) if self.side == "a" else (self.rank, -1)
        return (*self.stack, *ends)

    def matrices(self, leaf: jax.Array) -> jax.Array:
        """The leaf as matrices of the shape ``matrix``."""
        return leaf.transpose(self.order).reshape(self.matrix)

    def as_leaf(self, value: jax.Array) -> jax.Array:
        """``value``, with its axes in the order of ``shape``, in the order of the leaf."""
        return value.transpose([self.order.index(i) for i in range(len(self.order))])


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
    """``(leaves, treedef, paths)``; absent leaves stay, which keeps two trees aligned."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_absent)
    return [leaf for _, leaf in with_paths], treedef, [path_string(p) for p, _ in with_paths]


def map_leaves(function: Callable[[int, Any], Any], tree: Any) -> Any:
    """``tree`` with ``function(index, leaf)`` for each leaf that is there.

    Indices count as those of :func:`flatten`.
    """
    leaves, treedef, _ = flatten(tree)
    return treedef.unflatten(
        leaf if is_absent(leaf) else function(i, leaf) for i, leaf in enumerate(leaves)
    )


def is_absent(leaf: Any) -> bool:
    """Whether a leaf stands for a parameter that is not there (None, ``optax.MaskedNode``)."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def find_factors(tree: Any, factors: FactorNames = None) -> list[Factor]:
    """The factors of a tree, in the tree's order, with their shapes checked.

    The number k of stack axes is read from the two shapes of a module: where A and B have equally
    many axes, ``(*stack, in, rank)`` and ``(*stack, rank, out)`` is tried first; then every k with
    ``a.shape[:k] == b.shape[:k]`` and ``a.shape[-1] == b.shape[k]``. So the factors (heads, dim, r)
    and (r, out) of an attention output, or (width, in, r) and (r, out) of a convolution, fit.
    Where the same shapes fit layers stacked on another axis, too, or are those of transposed
    factors of a lower rank, the axes have to be stated.

    Args:
      tree: any pytree of arrays, or of anything with a ``shape``.
      factors: None for the usual names: a path that ends in ``lora_a`` / ``lora_b`` (also after
        an underscore, ``kernel_lora_a``) or ``lora/a`` / ``lora/b``. A pair of regular
        expressions ``(a, b)`` replaces them: each must match the end of the path in full, from
        the start of a component or from behind an underscore; A and B must have the same path
        before the match. A triple ``(a, b, k)`` also states the number k of leading stack axes,
        or ``(a, b, axes)`` all axes, one letter each: r is the rank, other letters in both are
        stack axes, ``...`` at the front any number of them. ``"...ir,...ro"`` is the usual order,
        whatever the sizes, ``"ri,or"`` that of PyTorch and Equinox, ``"ilr,rlo"`` has layers l on
        axis 1. One regular expression names leaves that stand alone and is matched against the
        whole path.

    Returns:
      A list of :class:`Factor`, empty where the tree has no arrays (optax initialises
      transformations with such placeholders). A factor whose partner is absent is returned
      alone, as (*stack, in, rank) or (*stack, rank, out) if k is not given: methods that freeze A
      train such trees.

    Raises:
      ValueError: the tree has arrays but no factors; the shapes of A and B do not fit, or fit in
        several ways; two leaves match as the same factor; a regular expression or a string of axes
        is invalid.
      TypeError: ``factors`` is not one of the above.

    >>> import jax.numpy as jnp
    >>> tree = {"q": {"kernel": jnp.ones((3, 5)), "lora_a": jnp.ones((3, 2)),
    ...               "lora_b": jnp.ones((2, 5))}}
    >>> [(f.path, f.module, f.side, f.rank) for f in find_factors(tree)]
    [('q/lora_a', 'q', 'a', 2), ('q/lora_b', 'q', 'b', 2)]
    >>> [f.path for f in find_factors(tree, factors=r".*/kernel")]
    ['q/kernel']
    >>> heads = {"out/lora/a": jnp.ones((4, 8, 2)), "out/lora/b": jnp.ones((2, 32))}
    >>> [(f.stack, f.rank, f.matrix) for f in find_factors(heads)]
    [((), 2, (-1, 2)), ((), 2, (2, -1))]
    >>> torch = {"q": {"lora_A": jnp.ones((2, 3)), "lora_B": jnp.ones((5, 2))}}
    >>> [(f.rank, f.shape) for f in find_factors(torch, ("lora_A", "lora_B", "ri,or"))]
    [(2, (3, 2)), (2, (2, 5))]
    """
    sides, stated = _compile(factors)
    leaves, _, paths = flatten(tree)
    present = [i for i, leaf in enumerate(leaves) if not is_absent(leaf)]
    found = []
    for i in present:
        for side, pattern in sides.items():
            module = _module(pattern, paths[i], side)
            if module is not None:
                shape = tuple(leaves[i].shape)
                usual = max(len(shape) - 2, 0)
                order = tuple(range(len(shape)))
                found.append(Factor(i, paths[i], module, side, shape, usual, order))
    if present and not found:
        raise ValueError(_nothing_found(factors, [paths[i] for i in present]))
    _check(found)
    if isinstance(stated, tuple) and stated != USUAL:
        found = [_in_order(factor, *stated) for factor in found]
    return _with_depths(found, stated)


def _is_box(key: Any) -> bool:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return key.name == "value"
    return isinstance(key, jax.tree_util.FlattenedIndexKey)


def _component(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _compile(factors: FactorNames):
    """The pattern of each side, and what is stated: the number of stack axes, or the axes of both
    (A's, B's), or None."""
    names = DEFAULT_FACTORS if factors is None else factors
    stated = None
    if isinstance(names, Sequence) and not isinstance(names, str) and len(names) == 3:
        *names, stated = names
    if isinstance(names, str):
        sides = {None: names}
    elif (
        isinstance(names, Sequence)
        and len(names) == 2
        and all(isinstance(pattern, str) for pattern in names)
        and (stated is None or isinstance(stated, str) or (type(stated) is int and stated >= 0))
    ):
        sides = {"a": names[0], "b": names[1]}
    else:
        raise TypeError(
            f"factors={factors!r} must be None, one regular expression, or a pair of them (a, b), "
            "such as ('down/kernel', 'up/kernel'), with the number of leading stack axes or with "
            "the axes, 'ri,or', as a third element where the shapes do not tell them"
        )
    if isinstance(stated, str):
        stated = _axes(stated)
    try:
        return {side: re.compile(pattern) for side, pattern in sides.items()}, stated
    except re.error as error:
        raise ValueError(f"factors={factors!r}: invalid regular expression: {error}") from None


def _axes(stated: str) -> tuple[str, str]:
    """The letters of A and of B; ValueError if they do not say which axis is what."""
    a, _, b = stated.replace(" ", "").partition(",")
    letters = [side.removeprefix("...") for side in (a, b)]
    if (
        a.startswith("...") != b.startswith("...")
        or not all(side.isalpha() and len(set(side)) == len(side) for side in letters)
        or not all("r" in side and set(side) - ({*a} & {*b}) for side in letters)
    ):
        raise ValueError(
            f"factors: the axes {stated!r} must be those of A and of B, one letter each: r for the "
            "rank, one or more that are A's alone (in) and B's alone (out), and in both those of a "
            "stack, such as 'ir,ro', 'ri,or', 'ilr,rlo', or '...ri,...or' for stacks of any depth"
        )
    return a, b


def _in_order(factor: Factor, a: str, b: str) -> Factor:
    """``factor`` with its axes, stated by letters, in the usual order."""
    letters, other = (a, b) if factor.side == "a" else (b, a)
    own = letters.removeprefix("...")
    front = len(factor.shape) - len(own)
    if front < 0 or (front and own == letters):
        raise ValueError(
            f"{factor.path!r} has shape {factor.shape}, but `factors` states the axes {letters!r}"
        )
    stack = [c for c in a if c in b and c.isalpha() and c != "r"]
    alone = [c for c in own if c not in other]
    ends = [*alone, "r"] if factor.side == "a" else ["r", *alone]
    order = (*range(front), *(front + own.index(c) for c in (*stack, *ends)))
    shape = tuple(factor.shape[i] for i in order)
    return factor._replace(shape=shape, depth=front + len(stack), order=order)


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


def _with_depths(found: list[Factor], stated) -> list[Factor]:
    """``found`` with the number of stack axes that the shapes of each pair tell."""
    pairs: dict[str, dict[str, Factor]] = {}
    for factor in found:
        if factor.side is not None:
            pairs.setdefault(factor.module, {})[factor.side] = factor
    depths = {}
    for module, pair in pairs.items():
        known = stated
        if isinstance(stated, tuple) and stated != USUAL:
            known = next(iter(pair.values())).depth
        depths[module] = _depth(module, pair, known)
    return [f._replace(depth=depths[f.module]) if f.side is not None else f for f in found]


def _depth(module: str, pair: dict[str, Factor], stated: int | tuple | None) -> int:
    usual, stated = stated == USUAL, stated if isinstance(stated, int) else None
    if stated is not None:
        for factor in pair.values():
            if len(factor.shape) < stated + 2:
                raise ValueError(
                    f"{factor.path!r} has shape {factor.shape}, too few axes for the {stated} "
                    "stack axes that `factors` states"
                )
    if len(pair) == 1:
        (alone,) = pair.values()
        return alone.depth if stated is None else stated
    a, b = pair["a"].shape, pair["b"].shape
    fits = [k for k in range(min(len(a), len(b)) - 1) if a[:k] == b[:k] and a[-1] == b[k]]
    if stated is not None:
        fits = [k for k in fits if k == stated]
    elif len(a) == len(b) and len(a) - 2 in fits:
        fits = [len(a) - 2]
    other = None
    if stated is None and not usual and len(fits) == 1:
        other = _other_axes(a, b, fits[0])
    if len(fits) == 1 and other is None:
        return fits[0]
    shapes = f"{pair['a'].path!r} has shape {a} and {pair['b'].path!r} {b}"
    if not fits:
        raise ValueError(
            f"the factors of {module!r} do not fit: {shapes}, but (*stack, in, rank) and "
            "(*stack, rank, out), with one or several in and out axes, need the same stack"
            f"{'' if stated is None else f' of {stated} axes'} and rank. Stack scanned layers on "
            "axis 0, or state the axes of A and B, factors=(a, b, 'ilr,rlo'); 'ri,or' is PyTorch's "
            "and Equinox's order."
        )
    readings = "; or ".join(f"k={k}: stack {a[:k]}, in {a[k:-1]}, out {b[k + 1:]}" for k in fits)
    if other is not None:
        readings += f", rank {a[-1]}; or the axes {other!r}"
    raise ValueError(
        f"the factors of {module!r} can be read in several ways: {shapes}, which is {readings}. "
        f"State {'the axes, or ' if other else ''}the number k of stack axes, factors=(a, b, k) "
        "with the regular expressions a and b, for example "
        f"factors=({DEFAULT_FACTORS[0]!r}, {DEFAULT_FACTORS[1]!r}, {other or fits[-1]!r}), or "
        "flatten the in axes and the out axes into one each."
    )


def _other_axes(a: tuple[int, ...], b: tuple[int, ...], k: int) -> str | None:
    """The axes of another reading that fits better than one with k stack axes, or as well.

    Square factors (r, n) and (n, r) are taken for transposed where n, as a rank, would exceed both
    sides; several in axes with as many out axes, for one of each and layers on an axis behind.
    """
    if len(a) == len(b) == k + 2:
        return "...ri,...or" if a[k] == b[k + 1] < a[-1] else None
    for j in range(k + 1, len(a) if len(a) == len(b) else 0):
        (*rest_a, _, r), (*rest_b, r_b, _) = (s[:j] + s[j + 1 :] for s in (a, b))
        if a[j] == b[j] and (*rest_a, r) == (*rest_b, r_b):
            sides = [[*"abcdefgh"[: len(rest_a)], *ends] for ends in ("ir", "ro")]
            return ",".join("".join([*s[:j], "l", *s[j:]]) for s in sides)
    return None
