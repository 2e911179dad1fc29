"""Whole language models in the dtype of their base's files, and what rounding to it changes."""

from collections import Counter
from typing import Any

import numpy as np

from rmlora_jax.errors import UserError
from rmlora_jax.hub.pretrained import Pretrained
from rmlora_jax.hub.safetensors_file import DTYPES
from rmlora_jax.hub.source import gguf_files, raw_config
from rmlora_jax.hub.weights import Tensors

WRITTEN = {name: np.dtype(DTYPES[kind])
           for name, kind in (("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16"))}


def stored_dtype(base: Pretrained) -> str:
    """The dtype in which a language model's files have most of its numbers.

    "float32" where they are quantised, have another dtype, or config.json says another one.
    """
    raw = raw_config(base.folder)[1]
    if gguf_files(base.folder):
        return "float32"
    tensors, sizes = Tensors(base.folder), Counter[str]()
    for name in tensors:
        value = tensors[name]
        sizes[value.dtype.name] += value.size
    usual = sizes.most_common(1)[0][0]
    said = raw.get("dtype", raw.get("torch_dtype")) or usual
    return usual if usual == said and usual in WRITTEN else "float32"


class Rounding:
    """Rounds weights to a dtype, and remembers how much that moved them.

    >>> rounding = Rounding("bfloat16")
    >>> float(rounding(np.float32([1.003, -2]), np.float32([1, -2]))[0])
    1.0
    >>> round(rounding.of_weights, 4), round(rounding.of_change, 4)
    (0.0013, 1.0)
    """

    def __init__(self, dtype: str):
        if dtype not in WRITTEN:
            raise UserError(f"dtype {dtype!r}; weights are written as {', '.join(WRITTEN)}")
        self.name, self.dtype = dtype, WRITTEN[dtype]
        self._sums = np.zeros(4)  # squares: of weights, errors; of merged ones: changes, errors

    def __call__(self, exact: np.ndarray, before: Any = None) -> np.ndarray:
        """``exact`` rounded; ``before``: the same weight without its factors, where it has some."""
        with np.errstate(over="ignore"):  # an infinity is found by whoever writes it
            rounded = exact.astype(self.dtype)
        error = _square(rounded.astype(np.float32) - exact)
        change = () if before is None else (_square(exact - np.asarray(before, np.float32)), error)
        self._sums += [_square(exact), error, *(change or (0.0, 0.0))]
        return rounded

    @property
    def of_weights(self) -> float:
        """The error's root mean square, compared with that of the weights."""
        return float(np.sqrt(self._sums[1] / max(self._sums[0], 1e-30)))

    @property
    def of_change(self) -> float:
        """The error's root mean square in weights with factors, compared with that of what the
        factors add; 0 where none has any."""
        return float(np.sqrt(self._sums[3] / self._sums[2])) if self._sums[2] else 0.0

    def words(self) -> str:
        """What a model card says."""
        if not self._sums[1]:
            return f"The weights are {self.name}."
        also = f", which is {100 * self.of_change:.2g} % of what the factors add to them"
        return (f"The weights are {self.name}, as those of the base. Factors were added in "
                "float32, and the sums rounded. Rounding moved the weights by "
                f"{100 * self.of_weights:.2g} % of their size" + also * bool(self.of_change)
                + " (root mean squares). `--export_dtype=float32` writes them without rounding.")


def _square(x: np.ndarray) -> float:
    return float(np.linalg.norm(np.ravel(x))) ** 2
