"""``AdaLoRA`` and ``SoRA``: descriptions of factors with a diagonal between A and B."""

import dataclasses
from typing import ClassVar

from rmlora_jax.adapt.lora import LoRA

__all__ = ["AdaLoRA", "SoRA"]


@dataclasses.dataclass(frozen=True)
class AdaLoRA(LoRA):
    r"""A ``LoRA`` in the form of a singular value decomposition, for ``adalora`` to share out.

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
    diagonal: ClassVar[str] = "zeros"

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

    diagonal: ClassVar[str] = "normal"
