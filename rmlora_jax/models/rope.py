"""Rotary position embeddings: the angle of each pair of features grows with the token's position.

`Rope` says at which frequencies, `read_rope` reads it from a config.json, `rope_table` makes the
cosines and sines, and `rotate` turns queries and keys by them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rmlora_jax.models.config import LARGEST, refuse

# Fields of a rope's dictionary -> fields of `Rope`, by the kind of scaling that reads them.
_FIELDS = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low",
        "high_freq_factor": "high",
        "original_max_position_embeddings": "original",
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "fast",
        "beta_slow": "slow",
        "attention_factor": "amplitude",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all",
        "truncate": "truncate",
        "original_max_position_embeddings": "original",
    },
}
_NEEDED = {"factor", "low_freq_factor", "high_freq_factor"}
# What transformers reads nowhere: the name of the kind in its old spelling, and vLLM's older name
# for yarn's own frequencies.
_INERT = {"rope_type", "type", "rope_theta", "finetuned"}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies of a rotary embedding, for one or more layers.

    Attributes:
      theta: base; pair i of d / 2 turns by position / theta^(2 i / d).
      kind: default, linear, dynamic, llama3 or yarn: how the frequencies are stretched for texts
        longer than those of pre-training.
      factor: by how much they are stretched.
      original: longest text of pre-training, in tokens (dynamic, llama3, yarn).
      low, high: (llama3) wavelengths above original / low are divided by ``factor``, those below
        original / high are kept.
      fast, slow: (yarn) rotations in ``original`` tokens that bound the pairs between both.
      amplitude: (yarn) factor of cosines and sines; 0: derived from ``factor``.
      mscale, mscale_all: (yarn) what ``amplitude`` is derived from, where both are above 0.
      truncate: (yarn) whether the bounds are rounded to whole pairs.

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; Peng et al. 2023,
    https://arxiv.org/abs/2309.00071; transformers' ``modeling_rope_utils.py``.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 4.0
    fast: float = 32.0
    slow: float = 1.0
    amplitude: float = 0.0
    mscale: float = 0.0
    mscale_all: float = 0.0
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in _FIELDS:
            refuse("rope_type", self.kind, f"one of {', '.join(_FIELDS)}")
        if not _number(self.theta) or not 1 < self.theta <= 1e12:
            refuse("rope_theta", self.theta, "a number above 1")
        numbers = ("factor", "low", "high", "fast", "slow", "amplitude", "mscale", "mscale_all")
        for name in numbers:
            value = getattr(self, name)
            if not _number(value) or not 0 <= value <= LARGEST:
                refuse(f"rope {name}", value, "a number of at least 0")
        if self.factor < 1:
            refuse("rope factor", self.factor, "a number of at least 1")
        if self.kind == "llama3" and not 0 < self.low < self.high:
            refuse("low_freq_factor", self.low, f"above 0 and below high_freq_factor = {self.high}")
        if self.kind == "yarn" and not 0 < self.slow < self.fast:
            refuse("beta_slow", self.slow, f"above 0 and below beta_fast = {self.fast}")
        if self.kind in ("dynamic", "llama3", "yarn") and not (
            type(self.original) is int and 1 <= self.original <= LARGEST
        ):
            refuse("original_max_position_embeddings", self.original, "a number of tokens")
        if type(self.truncate) is not bool:
            refuse("truncate", self.truncate, "true or false")


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def read_rope(
    given: Mapping[str, Any], theta: float, longest: int, original: int | None = None
) -> Rope:
    """The rope of ``rope_scaling`` (old) or ``rope_parameters`` (transformers 5) in a config.json.

    Args:
      given: the dictionary; empty for none.
      theta: the base where the dictionary has none.
      longest: ``max_position_embeddings``.
      original: ``original_max_position_embeddings`` beside the dictionary, which comes first.

    Raises:
      ValueError: a kind, field or value that is not supported.

    >>> read_rope({"type": "linear", "factor": 4.0}, theta=1e4, longest=4096).factor
    4.0
    """
    kind = given.get("rope_type", given.get("type")) or "default"
    if kind not in _FIELDS:
        refuse("rope_type", kind, f"one of {', '.join(_FIELDS)}")
    fields = _FIELDS[kind]
    for name, value in given.items():
        whole = name == "partial_rotary_factor" and value == 1
        if value and name not in fields and name not in _INERT and not whole:
            raise ValueError(
                f"config field {name!r} = {repr(value)[:80]} of a rope of type {kind!r} is not "
                "supported; remove it if it does not change what the model computes"
            )
    found = {fields[name]: given[name] for name in fields if given.get(name) is not None}
    if missing := sorted(name for name in _NEEDED & fields.keys() if given.get(name) is None):
        refuse(missing[0], None, f"given, since rope_type is {kind!r}")
    if kind == "dynamic":
        found["original"] = longest
    elif kind in ("llama3", "yarn"):
        found["original"] = original or found.get("original") or longest
    own = given.get("rope_theta")
    return Rope(theta=theta if own is None else own, kind=kind, **found)


def frequencies(rope: Rope, head_dim: int, lengths: jax.Array | None = None):
    """(radians a token for each pair, (head_dim / 2,) float32, factor of cosines and sines).

    With ``lengths`` (...,), the tokens of each text, a dynamic rope's frequencies are
    (..., head_dim / 2).
    """
    pairs = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    base = jnp.float32(rope.theta)
    if rope.kind == "dynamic":
        longest = jnp.float32(rope.original)
        tokens = longest if lengths is None else jnp.maximum(lengths.astype(jnp.float32), longest)
        grown = rope.factor * tokens / longest - (rope.factor - 1)
        base = base * grown ** (head_dim / (head_dim - 2))
    own = 1 / base[..., None] ** pairs
    if rope.kind == "linear":
        return own / rope.factor, 1.0
    if rope.kind == "llama3":
        # From 0, where the wavelength is long and the frequency is divided, to 1, where it is kept.
        turns = rope.original * own / (2 * math.pi)
        kept = jnp.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
        return own * (kept + (1 - kept) / rope.factor), 1.0
    if rope.kind == "yarn":
        kept = 1 - _ramp(*_yarn_bounds(rope, head_dim), head_dim // 2)
        return own * (kept + (1 - kept) / rope.factor), _yarn_amplitude(rope)
    return own, 1.0


def _yarn_bounds(rope: Rope, head_dim: int) -> tuple[float, float]:
    """The pairs that turn ``fast`` and ``slow`` times in ``original`` tokens."""

    def pair(turns: float) -> float:
        ratio = math.log(rope.original / (turns * 2 * math.pi))
        return head_dim * ratio / (2 * math.log(rope.theta))

    low, high = pair(rope.fast), pair(rope.slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)


def _ramp(low: float, high: float, size: int) -> jax.Array:
    """0 up to ``low``, 1 from ``high`` on, a straight line between; (size,)."""
    high = high + 0.001 if low == high else high
    return jnp.clip((jnp.arange(size, dtype=jnp.float32) - low) / (high - low), 0, 1)


def _yarn_amplitude(rope: Rope) -> float:
    def grown(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1

    if rope.amplitude:
        return rope.amplitude
    if rope.mscale and rope.mscale_all:
        return grown(rope.mscale) / grown(rope.mscale_all)
    return grown(1.0)


def rope_table(rope: Rope | None, head_dim: int, positions, lengths) -> jax.Array:
    """Cosines and sines of every token, (2, B, N, head_dim / 2) float32.

    Args:
      rope: None for layers that do not rotate: cosines 1, sines 0.
      positions: int (B, N).
      lengths: int (B, N), the tokens of the text that each token belongs to. Only a dynamic rope
        reads them, so that a text's numbers do not depend on what shares its row or batch.
    """
    shape = (*positions.shape, head_dim // 2)
    if rope is None:
        return jnp.stack([jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)])
    speed, amplitude = frequencies(rope, head_dim, lengths if rope.kind == "dynamic" else None)
    angles = positions[..., None].astype(jnp.float32) * speed
    return amplitude * jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: jax.Array, table: jax.Array) -> jax.Array:
    """``x`` (B, N, H, head_dim) with the pair (i, i + head_dim / 2) turned by its angle.

    (a, b) becomes (a cos - b sin, b cos + a sin), computed in float32 and rounded once.

    >>> table = rope_table(Rope(), 4, jnp.zeros((1, 1), int), None)
    >>> rotate(jnp.arange(4.0).reshape(1, 1, 1, 4), table).ravel().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    cos, sin = table[:, :, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
