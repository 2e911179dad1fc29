"""Files of weights written one tensor at a time, read by the safetensors package."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from rmlora_jax.hub.safetensors_write import Tensor, write_tensors

VALUES = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones((4, 5), ml_dtypes.bfloat16),
    "c": np.array(3.0, np.float16),
    "d": np.zeros((0, 2), np.float32),
    "e": np.arange(8, dtype=np.float32),
}
PLAN = {name: Tensor(x.dtype, x.shape) for name, x in VALUES.items()}


def test_another_library_reads_it(tmp_path):
    write_tensors(tmp_path, PLAN, VALUES.items())
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(("most", "shards"), [
    (66, [["a", "b", "c", "d"], ["e"]]),  # 24 + 40 + 2 bytes
    (65, [["a", "b"], ["c", "d", "e"]]),
    (1, [["a"], ["b"], ["c"], ["d"], ["e"]]),
    (98, [["a", "b", "c", "d", "e"]]),
])
def test_shards_end_before_they_are_too_large(most, shards, tmp_path):
    write_tensors(tmp_path, PLAN, VALUES.items(), most=most)
    if len(shards) == 1:
        assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 98}
    for number, names in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        assert sorted(load_file(tmp_path / name)) == names
        assert [key for key, file in index["weight_map"].items() if file == name] == names


def test_values_in_another_order_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"'b' bfloat16 \(4, 5\) came for 'a' float32 \(2, 3\)"):
        write_tensors(tmp_path, PLAN, sorted(VALUES.items(), key=lambda pair: pair[0] != "b"))
