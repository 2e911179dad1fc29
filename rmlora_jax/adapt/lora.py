"""``LoRA``: which layers get low-rank factors, of what rank, and what is trained."""

import dataclasses
import difflib
import functools
import math
import numbers
import operator
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from rmlora_jax.adapt import geometry
from rmlora_jax.adapt.forms import INITS, PLAIN, Form, is_factor

__all__ = ["Layer", "LoRA"]

Rule = str | tuple[str, ...]

WEIGHTS = ("kernel", "embedding")
EXECUTIONS = ("auto", "factored", "merged")


@dataclasses.dataclass(frozen=True)
class Layer:
    """How a layer of your own class uses its weight: an entry of ``LoRA.layers``.

    The class computes ``einsum(equation, x, weight)`` plus terms that do not depend on the weight,
    for the first argument x of ``method``. Factors then run beside it, as beside a Flax layer. If
    it does more with the product (an activation, a norm), the description needs
    ``execution="merged"``, and the equation only says which axes of the weight are inputs.

    Args:
        cls: the class, a ``flax.linen.Module`` or ``nnx.Module``.
        equation: "input,weight->output" in the letters of ``jnp.einsum``. An axis of the weight is
            an input axis (in the input, not in the output), an output axis (in the output alone) or
            a batch axis (in both).
        weight: name of the weight: a Linen parameter, an NNX attribute. One weight a module.
        method: name of the method that uses it.
        stack: in NNX the number of leading axes over which ``nnx.vmap`` stacked such layers, where
            no stacked layer of Flax beside them tells it. In Linen it is not needed.

    Example:
        >>> class Experts: "y[e] = x[e] w[e], with a weight of shape (experts, in, out)"
        >>> Layer(Experts, "e...i,eio->e...o", weight="w").weight
        'w'
    """

    cls: type
    equation: str
    weight: str = "kernel"
    method: str = "__call__"
    stack: int = 0

    def __post_init__(self):
        if type(self.stack) is not int or self.stack < 0:
            raise TypeError(f"Layer.stack is {self.stack!r}; allowed: an integer >= 0.")
        if not isinstance(self.cls, type):
            raise TypeError(f"Layer.cls is {self.cls!r}; allowed: a class.")
        for name in ("equation", "weight", "method"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"Layer.{name} is {getattr(self, name)!r}; allowed: a string.")
        if not callable(getattr(self.cls, self.method, None)):
            raise ValueError(f"Layer.method: {self.cls.__name__} has no method {self.method!r}.")
        geometry.layout(geometry.Contraction(self.equation), None)


@dataclasses.dataclass(frozen=True)
class LoRA:
    r"""A frozen, hashable description of a low-rank adaptation.

    A weight :math:`W_0` (in x out) of a layer that ``target`` selects computes

    .. math:: y = x W_0 + b + s\,(x A) B, \qquad s = \alpha / r \ \ (\alpha/\sqrt r \text{ if } rs)

    with the factors ``lora_a`` = A, of shape (*stack, in, r), and ``lora_b`` = B, of shape
    (*stack, r, out), beside the weight. A layer with several input or output axes flattens them;
    the leading axes are those over which ``nn.scan`` or ``nn.vmap`` stack the layer.

    A *rule* (``target``, ``exclude``, ``train``) is a regular expression that must match the whole
    '/'-joined module path (``encoder/layers/attention/query``), or a tuple of names of which one
    must equal the path's last components (``("query", "attention/out")``). A rule that matches
    nothing in a model is an error once the model's paths are known (in ``attach`` or ``init``).

    Args:
        rank: r, an integer >= 1.
        alpha: the numerator of the scale; None means alpha = rank, hence scale 1.
        target: the layers that get factors; None adapts nothing, and ``train`` alone decides what
            is trained (a head only, biases, or with ``".*"`` everything).
        exclude: layers that keep their weight although ``target`` matches them.
        train: what is trained in full beside the factors: every leaf below a module that the rule
            matches, and every leaf whose own path it matches (``r".*/bias"``).
        dropout: the probability in [0, 1) of dropping an entry of x before A; the others are
            divided by 1 - dropout. In Linen it acts where the random stream "dropout" is passed
            (``rngs={"dropout": key}``), never on integer inputs (``Embed``).
        init: the values A starts from; B starts at 0, save for "pissa".
            "kaiming": uniform within +-1/sqrt(in), as in loralib and PEFT.
            "normal": N(0, 0.02^2). "gaussian": N(0, 1/r^2). "orthogonal": orthonormal columns.
            (For ``Embed``, in is the number of embeddings.)
            "pissa": A and B are the principal singular directions of W_0, which ``attach`` moves
            out of it; needs loaded weights, so ``attach`` only.
        dtype: dtype of the factors. The product runs in the dtype of the layer's output.
        rank_pattern: (regex, rank) pairs that override ``rank``; the first full match wins.
        alpha_pattern: (regex, alpha) pairs that override ``alpha``; the first full match wins.
        rs: rank-stabilised scale, alpha / sqrt(r).
        execution: "factored" computes (x A) B beside the layer. "merged" runs dense layers and
            einsums on W = W_0 + s A B, formed in each call in float32 and rounded once to the dtype
            of the computation: one product forward and one for the gradient of x, as without
            factors, and thin ones for the gradients of A and B, never x^T g. It pays where tokens
            are many times the width. Convolutions and ``Embed`` stay factored, all layers while
            dropout is active. For a masked layer, a class of ``layers``, and all layers of a Linen
            model with WeightNorm, SpectralNorm or a class made by ``nn.map_variables``, the
            gradient goes through the merged weight. In bfloat16 hold W_0 in float32: a bfloat16
            W_0 rounds small updates away (README.md has figures). Forward-mode derivatives need
            "factored". "auto" is "factored".
        layers: a ``Layer`` for each layer class of your own that is to be adapted.

    Raises:
        ValueError: a field has a value that is not allowed.

    Example:
        >>> lora = LoRA(rank=4, alpha=16, target=r".*(query|value)", train="head")
        >>> lora.targets("encoder/layers/attention/query"), lora.scale_of("")
        (True, 4.0)
        >>> lora.trains("head/kernel"), lora.trains("encoder/norm/scale")
        (True, False)

    References:
        Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models* (arXiv:2106.09685),
        eq. 3; Kalajdzievski 2023 (arXiv:2312.03732) for ``rs``; Meng et al. 2024
        (arXiv:2404.02948), eqs. 2-4, for "pissa".
    """

    rank: int
    alpha: float | None = None
    target: Rule | None = ".*"
    _: dataclasses.KW_ONLY
    exclude: Rule | None = None
    train: Rule | None = None
    dropout: float = 0.0
    init: str = "kaiming"
    dtype: Any = jnp.float32
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    rs: bool = False
    execution: str = "auto"
    layers: tuple[Layer, ...] = ()

    # The leaves beside a weight and what they do with it; AdaLoRA, SoRA and DoRA replace it.
    form: ClassVar[Form] = PLAIN

    def __post_init__(self):
        put = functools.partial(object.__setattr__, self)
        put("rank", _rank("rank", self.rank))
        if self.alpha is not None:
            put("alpha", _alpha("alpha", self.alpha))
        for name in ("target", "exclude", "train"):
            put(name, _rule(name, getattr(self, name)))
        put("rank_pattern", _pattern("rank_pattern", self.rank_pattern, _rank))
        put("alpha_pattern", _pattern("alpha_pattern", self.alpha_pattern, _alpha))
        put("dtype", _dtype(self.dtype))
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise _error("dropout", self.dropout, "a number in [0, 1)")
        put("dropout", float(self.dropout))
        if not isinstance(self.rs, bool):
            raise _error("rs", self.rs, "True or False")
        for name, allowed in (("init", INITS), ("execution", EXECUTIONS)):
            if getattr(self, name) not in allowed:
                raise _error(name, getattr(self, name), "one of " + ", ".join(map(repr, allowed)))
        if self.init not in self.form.inits:
            name = type(self).__name__
            raise ValueError(
                f'{name}.init is "pissa", which takes W_0 apart for plain factors: use LoRA for '
                f"it, or another init of {name}."
            )
        put("layers", (self.layers,) if isinstance(self.layers, Layer) else tuple(self.layers))
        if not all(isinstance(layer, Layer) for layer in self.layers):
            raise _error("layers", self.layers, "a tuple of Layer(cls, equation, ...)")
        methods = [(layer.cls, layer.method) for layer in dict.fromkeys(self.layers)]
        for cls, method in methods:
            if methods.count((cls, method)) > 1:
                raise ValueError(
                    f"LoRA.layers has two entries for {cls.__name__}.{method}: only one weight of "
                    "a method can be adapted."
                )
        if self.target is None and self.train is None:
            raise ValueError(
                "LoRA(target=None, train=None) leaves nothing to train: give target, the layers "
                "to adapt, or train, the modules to train in full."
            )
        if self.target is None and self.exclude is not None:
            raise _error("exclude", self.exclude, "None where target is None")

    @property
    def weights(self) -> tuple[str, ...]:
        """The names that weights beside factors have."""
        return (*(layer.weight for layer in self.layers), *WEIGHTS)

    @property
    def factors(self) -> tuple[str, ...]:
        """The names of the leaves beside an adapted weight, A and B first."""
        return self.form.leaves

    def targets(self, path: str) -> bool:
        """Whether the layer at module ``path`` gets factors (if its kind can be adapted)."""
        return _matches(self.target, path) and not _matches(self.exclude, path)

    def rank_of(self, path: str) -> int:
        """r of the layer at module ``path``."""
        return _lookup(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        """s of the layer at module ``path``: alpha / r, or alpha / sqrt(r)."""
        rank = self.rank_of(path)
        alpha = _lookup(self.alpha_pattern, path, self.alpha)
        return self._scale(rank, alpha)

    def common_scale(self, rank: int) -> float:
        """s of the layers of this rank that ``alpha_pattern`` leaves alone."""
        return self._scale(rank, self.alpha)

    def _scale(self, rank: int, alpha: float | None) -> float:
        alpha = rank if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.rs else rank)

    def trains(self, leaf: str) -> bool:
        """Whether the parameter at path ``leaf`` is trained: a factor, or matched by ``train``."""
        return is_factor(leaf.split("/")) or _matches_under(self.train, leaf)

    def trainable(self, path: Iterable[Any], value: Any = None) -> bool:
        """``trains`` as an NNX filter: for ``nnx.split``, ``nnx.grad``, ``nnx.Optimizer(wrt=...)``.

        Of NNX Variables only ``nnx.Param`` and its kinds are trained: not statistics, nor keys.

        >>> LoRA(rank=4, train="head").trainable(("head", "kernel"))
        True
        """
        nnx = sys.modules.get("flax.nnx")  # no Variable exists before flax.nnx is imported
        if nnx and isinstance(value, nnx.Variable) and not isinstance(value, nnx.Param):
            return False
        return self.trains("/".join(map(str, path)))

    def check_targets(self, layers: Iterable[str]) -> None:
        """Raises ValueError if a rule about layers matches none of the module paths ``layers``."""
        layers = sorted(layers)
        rules = _rules("target", self.target) + _rules("exclude", self.exclude)
        rules += [("rank_pattern", regex) for regex, _ in self.rank_pattern]
        rules += [("alpha_pattern", regex) for regex, _ in self.alpha_pattern]
        for field, rule in rules:
            if self.target is not None and not any(_matches(rule, path) for path in layers):
                raise _unmatched(field, rule, layers, "layer with a weight")
        if self.target is not None and not any(map(self.targets, layers)):
            raise ValueError(
                f"LoRA.exclude {self.exclude!r} takes away every layer that LoRA.target "
                f"{self.target!r} matches: make exclude narrower."
            )

    def check_train(self, leaves: Iterable[str]) -> None:
        """Raises ValueError if ``train`` matches none of the parameter paths ``leaves``."""
        leaves = sorted(leaf for leaf in leaves if not is_factor(leaf.split("/")))
        for field, rule in _rules("train", self.train):
            if not any(_matches_under(rule, leaf) for leaf in leaves):
                paths = sorted({path for leaf in leaves for path in _ancestors(leaf)})
                raise _unmatched(field, rule, paths, "module or parameter")


def _matches(rule: Rule | None, path: str) -> bool:
    if rule is None:
        return False
    if isinstance(rule, str):
        return re.fullmatch(rule, path) is not None
    return any(f"/{path}".endswith(f"/{name}") for name in rule)


def _ancestors(leaf: str) -> list[str]:
    """``a``, ``a/b``, ``a/b/c`` for the leaf path ``a/b/c``."""
    parts = leaf.split("/")
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _matches_under(rule: Rule | None, leaf: str) -> bool:
    return any(_matches(rule, path) for path in _ancestors(leaf))


def _lookup(pattern, path: str, default):
    return next((value for regex, value in pattern if re.fullmatch(regex, path)), default)


def _rules(field: str, rule: Rule | None) -> list[tuple[str, Rule]]:
    """One entry per name: a misspelt name in a tuple must not hide behind the others."""
    if rule is None:
        return []
    return [(field, rule)] if isinstance(rule, str) else [(field, (name,)) for name in rule]


def _unmatched(field: str, rule: Rule, paths: list[str], what: str) -> ValueError:
    text = rule if isinstance(rule, str) else rule[0]
    near = difflib.get_close_matches(text, paths, n=5, cutoff=0.3) or paths[:5]
    known = ", ".join(map(repr, near)) if near else "none at all"
    kind = "regular expression" if isinstance(rule, str) else "name"
    return ValueError(
        f"LoRA.{field}: the {kind} {text!r} matches no {what} of the model. Near paths: {known}. "
        "A regular expression must match the whole path; a name in a tuple, its last components."
        + " A class of your own needs an entry in LoRA.layers."
        * what.startswith("layer")
    )


def _error(field: str, value, allowed: str) -> ValueError:
    return ValueError(f"LoRA.{field} is {value!r}; allowed: {allowed}.")


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _rank(field: str, value) -> int:
    try:
        rank = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        rank = 0
    if rank < 1:
        raise _error(field, value, "an integer >= 1")
    return rank


def _alpha(field: str, value) -> float:
    if not (_is_number(value) and 0 < value < math.inf):
        raise _error(field, value, "a finite number > 0" + ", or None" * (field == "alpha"))
    return float(value)


def _regex(field: str, value) -> str:
    if not isinstance(value, str) or not value:
        raise _error(field, value, "a regular expression that is not empty")
    try:
        re.compile(value)
    except re.error as e:
        raise _error(field, value, f"a valid regular expression ({e})") from None
    return value


def _rule(field: str, value) -> Rule | None:
    if value is None or isinstance(value, str):
        return value if value is None else _regex(field, value)
    if not isinstance(value, (tuple, list)) or not value:
        raise _error(field, value, "a regular expression, a tuple of names, or None")
    if not all(isinstance(name, str) and name.strip("/") for name in value):
        raise _error(field, value, "a tuple of names that are not empty")
    return tuple(name.strip("/") for name in value)


def _pattern(field: str, value, convert) -> tuple:
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        pairs = [(regex, item) for regex, item in pairs]
    except (TypeError, ValueError):
        raise _error(field, value, "a tuple of (regular expression, value) pairs") from None
    return tuple((_regex(field, regex), convert(field, item)) for regex, item in pairs)


def _dtype(value):
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise _error("dtype", value, "a floating-point dtype, such as jnp.float32")
    return dtype
