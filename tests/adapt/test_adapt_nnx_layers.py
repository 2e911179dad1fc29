"""Every kind of NNX layer and structure at initialisation: the base's arrays and its output."""

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.adapted_nnx import EXPERTS, LAYERS, arrays, built, call
from flax import nnx
from marks import slow

from rmlora_jax.adapt import adapt
from rmlora_jax.adapt.lora import LoRA

KINDS = ("linear", "general", "einsum, interleaved", "conv", "conv, transposed", "embed, tied")
CASES = [(name, dtypes) for name in LAYERS for dtypes in ("float32", "bfloat16 base")]
CASES += [(name, dtypes) for name in KINDS for dtypes in ("bfloat16 compute", "bfloat16 promotion")]


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [c if c[1] == "bfloat16 base" and c[0] in list(LAYERS)[::2] else slow(*c) for c in CASES],
)
def test_output_at_initialisation_is_the_base_output_bit_for_bit(name, dtypes):
    base, x = built(name, dtypes)
    adapted = adapt(base, LoRA(2, 6, layers=EXPERTS), rngs=nnx.Rngs(1))
    before, after = arrays(base), arrays(adapted)
    assert {p.rpartition("/")[2] for p in after.keys() - before.keys()} == {"lora_a", "lora_b"}
    assert all(after[path] is value for path, value in before.items())  # nothing is copied
    factors = [value for path, value in after.items() if path not in before]
    assert all(value.dtype == jnp.float32 for value in factors)
    expected, found = call(base, x), call(adapted, x)
    assert found.dtype == expected.dtype
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
