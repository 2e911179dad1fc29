"""AdaLoRA's and SoRA's form, A diag(e) B, and their descriptions."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rmlora_jax.adapt.forms import FACTORS, INITS, Form, initial_a
from rmlora_jax.adapt.lora import LoRA

__all__ = ["AdaLoRA", "Diagonal", "SoRA"]

DIAGONAL = "lora_e"


@dataclasses.dataclass(frozen=True)
class Diagonal(Form):
    """W + s A diag(e) B with e = ``lora_e`` (*stack, r): the form of plain LoRA for A diag(e).

    It ``begins`` with e = 0 and both A and B drawn by ``init`` ("zeros"), or with e from N(0, 1)
    and B = 0 ("normal").
    """

    begins: str = "zeros"

    leaves: ClassVar = (*FACTORS, DIAGONAL)
    inits: ClassVar = tuple(init for init in INITS if init != "pissa")
    obstacle: ClassVar = (
        "has a diagonal between A and B: fold it in first, params, lora = rm.to_lora(params, lora)."
    )
    folds: ClassVar = True
    peft: ClassVar = None

    def shapes(self, shape, axes, rank):
        a, b = super().shapes(shape, axes, rank)
        return a, b, (*a[:-2], rank)

    def axis_names(self, names, axes, stack=0):
        a, b = super().axis_names(names, axes, stack)
        return a, b, (*a[:-2], None)

    def initial(self, key, weight, axes, shapes, scale, init, dtype):
        (a, b), weight = super().initial(key, weight, axes, shapes[:2], scale, init, dtype)
        own = jax.random.fold_in(key, 1)
        if self.begins == "normal":
            return (a, b, jax.random.normal(own, shapes[2], dtype)), weight
        *stack, rank, size_out = b.shape
        b = jnp.swapaxes(initial_a(own, (*stack, size_out, rank), init, dtype), -1, -2)
        return (a, b, jnp.zeros(shapes[2], dtype)), weight

    def pair(self, factors):
        a, b, e = factors
        return a * e[..., None, :], b

    def folded(self, factors):
        """A diag(e) and B without the directions whose e is 0; ``to_lora`` says more."""
        (a, b), closed = self.pair(factors), np.asarray(factors[2]) == 0
        rank = max(1, int((~closed).sum(-1).max()))
        first = np.argsort(closed, axis=-1, kind="stable")[..., :rank]  # the open ones, in order
        a = jnp.take_along_axis(a, first[..., None, :], -1)
        open_ = ~np.take_along_axis(closed, first, -1)
        return a, jnp.take_along_axis(b, first[..., None], -2) * open_[..., None]


@dataclasses.dataclass(frozen=True)
class AdaLoRA(LoRA):
    r"""A ``LoRA`` in the form of a singular value decomposition, whose ranks ``adalora`` allocates.

    .. math:: \Delta W = s\, P\, \mathrm{diag}(e)\, Q, \qquad s = \alpha / (r + 10^{-5})

    with P = ``lora_a`` (*stack, in, r), Q = ``lora_b`` (*stack, r, out) and e = ``lora_e``
    (*stack, r). P and Q begin as N(0, 0.02^2) and e as 0, so that the output is the base's. Where e
    is 0 the triplet (P's column, e's entry, Q's row) takes no part; ``adalora`` decides which.

    Its arguments are those of ``LoRA``; ``rank`` is the number of triplets that a layer begins
    with, ``init`` is the distribution of P and Q ("pissa" is refused).

    Example:
        >>> AdaLoRA(rank=6, alpha=16, target=r".*(query|value)").factors
        ('lora_a', 'lora_b', 'lora_e')

    References:
        Zhang et al. 2023, *AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
        Fine-Tuning* (arXiv:2303.10512), eq. 3; the 1e-5 is the authors' code's.
    """

    init: str = "normal"
    form: ClassVar[Form] = Diagonal("zeros")

    def _scale(self, rank: int, alpha: float | None) -> float:
        scale = super()._scale(rank, alpha)
        return scale if self.rs else scale * rank / (rank + 1e-5)


@dataclasses.dataclass(frozen=True)
class SoRA(LoRA):
    r"""A ``LoRA`` with a gate on each rank direction, for ``sora`` to close.

    .. math:: y = x W_0 + b + s\,((x A) \odot g) B, \qquad s = \alpha / r

    with the gate g = ``lora_e`` (*stack, r), which begins as N(0, 1); B begins as 0, so that the
    output is the base's. A direction whose gate is 0 takes no part.

    Its arguments are those of ``LoRA``; ``rank`` is the largest that may survive ("pissa" is
    refused as ``init``).

    Example:
        >>> SoRA(rank=8, alpha=16).factors
        ('lora_a', 'lora_b', 'lora_e')

    References:
        Ding et al. 2023, *Sparse Low-rank Adaptation of Pre-trained Language Models*
        (arXiv:2311.11696), eq. 3.
    """

    form: ClassVar[Form] = Diagonal("normal")
