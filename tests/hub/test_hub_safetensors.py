"""The reader of *.safetensors against the package of that name, and on damaged files."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rmlora_jax.errors import UserError
from rmlora_jax.hub.safetensors_file import DTYPES, SafetensorsFile

EIGHT_BITS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


def write(path, header, values=b""):
    """A file of this header (an object, or the bytes of one) and these values."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
    return path


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_every_type_equals_the_package(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        if name not in EIGHT_BITS:  # which the package does not read into numpy
            tensors[f"x.{name}"] = rng.integers(0, 100, (3, 1, 5)).astype(dtype)
    tensors |= {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.float16)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    ours, theirs = SafetensorsFile(path), load_file(path)
    assert list(ours) == sorted(theirs) and len(ours) == len(theirs) == 15
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours.shape(name) == value.shape
        np.testing.assert_array_equal(ours[name], value)
        assert not ours[name].flags.writeable
    with pytest.raises(KeyError):
        ours["y"]


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_eight_bit_floats(name, tmp_path):
    """All 256 patterns, against the definition: sign, exponent with its bias, mantissa."""
    exponent_bits, mantissa_bits = (4, 3) if name == "F8_E4M3" else (5, 2)
    bias = 2 ** (exponent_bits - 1) - 1
    expected = []
    for byte in range(256):
        exponent = byte >> mantissa_bits & (2**exponent_bits - 1)
        mantissa = byte & (2**mantissa_bits - 1)
        fraction = mantissa / 2**mantissa_bits
        value = (bool(exponent) + fraction) * 2.0 ** (max(exponent, 1) - bias)
        if exponent == 2**exponent_bits - 1:
            if name == "F8_E5M2":
                value = np.nan if mantissa else np.inf
            elif mantissa == 7:  # e4m3fn has one nan and no infinity
                value = np.nan
        expected.append(-value if byte >> 7 else value)
    header = {"w": entry(0, 256, (16, 16), name)}
    found = SafetensorsFile(write(tmp_path / "a.safetensors", header, bytes(range(256))))["w"]
    assert found.dtype == EIGHT_BITS[name] and found.shape == (16, 16)
    np.testing.assert_array_equal(found.astype(np.float32).ravel(), np.float32(expected))


GOOD = {"a": entry(0, 8), "b": entry(8, 16)}
EIGHT = np.arange(4, dtype=np.float32).tobytes()


def test_the_order_in_the_header_is_free(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "b": GOOD["b"], "a": GOOD["a"]}
    found = SafetensorsFile(write(tmp_path / "a.safetensors", header, EIGHT))
    assert {k: v.tolist() for k, v in found.items()} == {"a": [0, 1], "b": [2, 3]}


DAMAGED = {
    "values cut off": (GOOD, EIGHT[:-1]),
    "bytes behind the values": (GOOD, EIGHT + b"\0"),
    "a gap": (GOOD | {"b": entry(12, 20)}, EIGHT + bytes(4)),
    "an overlap": (GOOD | {"b": entry(4, 12)}, EIGHT[:12]),
    "two in one place, and room for both": (GOOD | {"b": entry(0, 8)}, EIGHT),
    "a start before the values": ({"a": entry(-8, 0)}, b""),
    "an end before the start": ({"a": entry(8, 0)}, EIGHT[:8]),
    "a size that is not the shape's": (GOOD | {"b": entry(8, 16, (3,))}, EIGHT),
    "a negative shape": ({"a": entry(0, 8, (-1, -2))}, EIGHT[:8]),
    "a shape of fractions": ({"a": entry(0, 8, (2.0,))}, EIGHT[:8]),
    "a shape of truth": ({"a": entry(0, 4, (True,))}, EIGHT[:4]),
    "a shape beyond memory": ({"a": entry(0, 8, (2**50,))}, EIGHT[:8]),
    "too many axes": ({"a": entry(0, 8, (1,) * 8 + (2,))}, EIGHT[:8]),
    "an unknown type": ({"a": entry(0, 8, (2,), "F31")}, EIGHT[:8]),
    "a type that is no word": ({"a": entry(0, 8, (2,), 7)}, EIGHT[:8]),
    "an entry without offsets": ({"a": {"dtype": "F32", "shape": [2]}}, EIGHT[:8]),
    "an entry that is no object": ({"a": [1]}, EIGHT[:8]),
    "a header that is no object": ([1], b""),
    "a header that is not JSON": (b"{", b""),
    "a header that is not UTF-8": (b'{"\xff": 1}', b""),
    "a header of a thousand brackets": (b"[" * 100_000, b""),
    "a name twice": (b'{"a": %s, "a": %s}' % ((json.dumps(GOOD["a"]).encode(),) * 2), EIGHT[:8]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case, tmp_path):
    path = write(tmp_path / "model.safetensors", *DAMAGED[case])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged .*; copy it again"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    "data", [b"", b"\x01", bytes(8), (2**63).to_bytes(8, "little") + b"{}",
             (10).to_bytes(8, "little") + b"{}", b"version https://git-lfs.github.com/spec/v1\n"])
def test_files_that_are_something_else(data, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut short"):
        SafetensorsFile(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none\.safetensors"):
        SafetensorsFile(tmp_path / "none.safetensors")


def test_values_are_mapped_not_read(tmp_path):
    """A file larger than any memory, of holes, is opened and its last values are read."""
    path, size = tmp_path / "large.safetensors", 2**40
    header = json.dumps({"a": entry(0, size, (size // 4,)), "z": entry(size, size + 8)}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + size + 8)
        except OSError:
            pytest.skip("a disk without holes in files")
        file.seek(-8, 2)
        file.write(np.float32([1, 2]).tobytes())
    found = SafetensorsFile(path)
    assert found["z"].tolist() == [1, 2] and found["a"][-1] == 0
