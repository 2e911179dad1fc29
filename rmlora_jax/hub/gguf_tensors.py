"""The tensors of a GGUF model under the names, and with the values, of its Hugging Face files.

llama.cpp's converter renames tensors, and changes some: rotary embeddings turn neighbouring rows of
queries and keys in its models of Llama's lineage, row i and row i + d/2 in Hugging Face's, so it
permutes the rows of each head; and it keeps Gemma's norms as 1 + w. Both are undone here.

Source: https://github.com/ggml-org/llama.cpp/blob/master/conversion/llama.py (``permute``)
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.hub.gguf_file import GGUFFile

LAYER = re.compile(r"blk\.(\d{1,4})\.(.+)\.(weight|bias)")
EXPERTS = re.compile(r".*(_exps|_shexp|ffn_gate_inp).*")

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# The factors of Llama 3's rotary embedding; they become fields of the config.
ROPE_FACTORS = "rope_freqs.weight"

MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA = MODULES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class Architecture(NamedTuple):
    """How the tensors of one ``general.architecture`` differ from Hugging Face's.

    Attributes:
      modules: a layer's modules, GGUF's name -> Hugging Face's.
      permuted: whether the rows of each head of query and key are interleaved.
      shift: what is added to the weights of norms in the file.
    """

    modules: Mapping[str, str]
    permuted: bool = False
    shift: float = 0.0


ARCHITECTURES = {
    "llama": Architecture(MODULES, permuted=True),  # Mistral, SmolLM and SmolLM2, too
    "smollm3": Architecture(MODULES, permuted=True),
    "qwen2": Architecture(MODULES),
    "qwen3": Architecture(MODULES | HEAD_NORMS),
    "gemma2": Architecture(GEMMA, shift=1.0),
    "gemma3": Architecture(GEMMA | HEAD_NORMS, shift=1.0),
}


def architecture(file: GGUFFile) -> Architecture:
    """What is known about the architecture that a file names.

    Raises:
      UserError: it is not supported.
    """
    name = file.fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(
            f"{file.path}: the architecture {str(name)[:80]!r} is not supported; known are "
            f"{', '.join(ARCHITECTURES)}{did_you_mean(str(name)[:80], ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


class GGUFTensors(Mapping[str, np.ndarray]):
    """The tensors of a model by Hugging Face's names, each dequantised when it is asked for.

    ``tensors[name]`` is float32. The order of axes is Hugging Face's, too: (out, in) for a linear
    layer.

    Raises:
      UserError: an architecture that is not known, a mixture of experts, or a tensor without a
        place in the model.
    """

    def __init__(self, file: GGUFFile):
        self._file, self._architecture = file, architecture(file)
        self._names = {
            self._name(name): name for name in file.tensors if name != ROPE_FACTORS
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without its values."""
        return self._file.tensors[self._names[name]].shape

    def read(self, name: str, rows: slice = slice(None), dtype: Any = np.float32) -> np.ndarray:
        """The rows (axis 0) of a tensor, dequantised in float32 and rounded once to ``dtype``."""
        stored = self._names[name]
        index: Any = rows
        if self._architecture.permuted and re.search(r"\.attn_[qk]\.", stored):
            index = self._rows(stored)[rows]
        value = self._file.values(stored, index)
        if stored.endswith("norm.weight") and self._architecture.shift:
            value = value - np.float32(self._architecture.shift)
        return value.astype(dtype, copy=False)

    def _rows(self, stored: str) -> np.ndarray:
        """Row i of Hugging Face's query or key is this row of the file's."""
        heads = head_counts(self._file)[".attn_k." in stored]
        size = self._file.tensors[stored].shape[0]
        if size % (2 * heads):
            raise UserError(
                f"{self._file.path}: {stored!r} has {size} rows, which {heads} heads cannot share; "
                "copy the file again"
            )
        return np.arange(size).reshape(heads, -1, 2).swapaxes(1, 2).ravel()

    def _name(self, stored: str) -> str:
        """Hugging Face's name of a tensor."""
        layer = LAYER.fullmatch(stored)
        if layer and layer[2] in self._architecture.modules:
            return f"model.layers.{layer[1]}.{self._architecture.modules[layer[2]]}.{layer[3]}"
        if stored in OUTSIDE:
            return OUTSIDE[stored]
        kind = self._file.fields["general.architecture"]
        if EXPERTS.fullmatch(stored):
            raise UserError(
                f"{self._file.path} is a mixture of experts (it has {stored[:80]!r}), which is not "
                "supported; take a dense model"
            )
        raise UserError(
            f"{self._file.path}: the tensor {stored[:80]!r} has no place in a model of the "
            f"architecture {kind!r}; take a file that llama.cpp's converter made"
        )


def head_counts(file: GGUFFile) -> tuple[int, int]:
    """How many heads of queries and how many of keys each layer has.

    Raises:
      UserError: the file does not say, or layers differ.
    """
    kind = file.fields.get("general.architecture")
    name = f"{kind}.attention.head_count"
    queries = whole(file, name)
    return queries, whole(file, f"{name}_kv", default=queries)


def whole(file: GGUFFile, name: str, default: int | None = None, most: int = 2**24) -> int:
    """A field that is a whole number from 1 to ``most``, or one number for all layers.

    Raises:
      UserError: it is anything else, or missing without a default.
    """
    value = file.fields.get(name, default)
    if isinstance(value, list) and value and value == value[:1] * len(value):
        value = value[0]
    if type(value) is not int or not 1 <= value <= most:
        said = "is missing" if value is None else f"is {repr(value)[:80]}"
        raise UserError(f"{file.path}: {name} {said}; it must be a whole number from 1 to {most}, "
                        "the same for all layers")
    return value


def open_gguf(files: list[Path]) -> GGUFTensors:
    """`GGUFTensors` of a model's files, in order."""
    return GGUFTensors(GGUFFile(files))
