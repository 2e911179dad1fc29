"""``pytorch_model.bin``: files that PyTorch wrote are read, and nothing in any file is run."""

import io
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rmlora_jax.errors import UserError
from rmlora_jax.hub.pickled import PickledTensors
from rmlora_jax.hub.weights import Tensors

HERE = Path(__file__).parent.parent / "fixtures" / "pickles"
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64,
          "int64": np.int64, "bool": np.bool_}


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
def test_what_pytorch_wrote(name):
    found, values = PickledTensors(HERE / name), np.load(HERE / "values.npz")
    assert sorted(found) == sorted(values.files) and len(found) == len(values.files)
    for key in found:
        assert found[key].dtype == DTYPES.get(key, np.float32), key
        assert found.shape(key) == found[key].shape == values[key].shape, key
        np.testing.assert_array_equal(found[key].astype(np.float32), values[key], err_msg=key)
        assert not found[key].flags.writeable


def test_state_dict_of_a_module_and_eight_bit_floats():
    found = PickledTensors(HERE / "module.bin")
    np.testing.assert_array_equal(found["weight"], np.arange(6, dtype=np.float32).reshape(3, 2))
    found = PickledTensors(HERE / "float8.bin")
    assert found["float8"].dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(found["float8"].astype(np.float32), np.arange(4))


def test_shards(tmp_path):
    shutil.copy(HERE / "module.bin", tmp_path / "pytorch_model-00001-of-00002.bin")
    shutil.copy(HERE / "float8.bin", tmp_path / "pytorch_model-00002-of-00002.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"weight": "pytorch_model-00001-of-00002.bin", '
        '"float8": "pytorch_model-00002-of-00002.bin"}}'
    )
    assert sorted(Tensors(tmp_path)) == ["bias", "float8", "weight"]


def zipped(path, pickled: bytes, storages=None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", pickled)
        for key, data in (storages or {}).items():
            archive.writestr(f"model/data/{key}", data)
    return path


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


class Built:
    """Pickles as an object with a state."""

    def __reduce__(self):
        return dict, (), {"lr": 1}


def executing(tmp_path):
    return Call(os.system, f"touch {tmp_path / 'ran'}")


PERSISTENT = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
)


def tensor(size=b"K\x04", offset=b"K\x00", shape=b"K\x04\x85", strides=b"K\x01\x85"):
    """A dictionary with one tensor over a storage of 4 floats, part by part."""
    return (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
        + PERSISTENT + size + b"tQ" + offset + shape + strides
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )


def test_our_own_file_is_one(tmp_path):
    found = PickledTensors(zipped(tmp_path / "a.bin", tensor(), {"0": b"\0" * 16}))
    np.testing.assert_array_equal(found["w"], np.zeros(4))


MALICIOUS = {
    "system": lambda t: pickle.dumps({"w": executing(t)}, 2),
    "system, protocol 4": lambda t: pickle.dumps({"w": executing(t)}, 4),
    "system, protocol 0": lambda t: pickle.dumps({"w": executing(t)}, 0),
    "eval": lambda t: pickle.dumps({"w": Call(eval, f"open({str(t / 'ran')!r}, 'w')")}, 2),
    "getattr": lambda t: b"\x80\x02cbuiltins\ngetattr\n(cbuiltins\nobject\nX\x01\x00\x00\x00atR.",
    "inst": lambda t: f"(S'touch {t / 'ran'}'\nios\nsystem\n.".encode(),
    "obj": lambda t: b"(cos\nsystem\nX\x04\x00\x00\x00true" + b"o.",
    "newobj": lambda t: b"\x80\x02cos\nPathLike\n)\x81.",
    "extension": lambda t: b"\x80\x02\x82\x01.",
    "persistent id as text": lambda t: b"Pstorage\n.",
    "a name alone": lambda t: b"\x80\x02cposix\nsystem\n.",
    "ordered dict of a call": lambda t: b"\x80\x02ccollections\nOrderedDict\n(cos\nsystem\ntR.",
    "build with slots": lambda t: b"\x80\x02}(}}tb.",
    "object": lambda t: pickle.dumps(Built(), 2),
    "a list": lambda t: pickle.dumps([1, 2], 2),
    "numbers": lambda t: pickle.dumps({"w": 1}, 2),
    "bytes": lambda t: pickle.dumps({"w": b"x"}, 4),
    "no end": lambda t: b"\x80\x02}",
    "nothing": lambda t: b"",
    "lost memo": lambda t: b"\x80\x02h\x07.",
    "far memo": lambda t: b"\x80\x02}r\xff\xff\xff\x7f.",
    "nested": lambda t: b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep tuples": lambda t: b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "long string": lambda t: b"\x80\x02X\xff\xff\xff\x7fabc.",
    "huge integer": lambda t: b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "beyond the storage": lambda t: tensor(shape=b"K\x05\x85"),
    "offset": lambda t: tensor(offset=b"K\x01"),
    "stride": lambda t: tensor(strides=b"K\x02\x85"),
    "negative offset": lambda t: tensor(offset=b"J\xff\xff\xff\xff"),
    "negative stride": lambda t: tensor(strides=b"J\xff\xff\xff\xff\x85"),
    "much of little": lambda t: tensor(shape=b"J\x00\x00\x00\x7f\x85", strides=b"K\x00\x85"),
    "bool as size": lambda t: tensor(shape=b"\x88\x85"),
    "storage too short": lambda t: tensor(size=b"K\x05", shape=b"K\x05\x85"),
    "shape without strides": lambda t: tensor(strides=b")"),
    "other storage": lambda t: tensor().replace(b"FloatStorage", b"QInt8Storage"),
    "other key": lambda t: tensor().replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009"),
}


@pytest.mark.parametrize("kind", sorted(MALICIOUS))
def test_anything_but_tensors_is_refused(kind, tmp_path):
    pickled = MALICIOUS[kind](tmp_path)
    for path in (
        zipped(tmp_path / "zip.bin", pickled, {"0": b"\0" * 16}),
        tmp_path / "legacy.bin",
    ):
        if path.name == "legacy.bin":
            head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
            values = struct.pack("<q", 4) + b"\0" * 16
            path.write_bytes(
                b"".join(pickle.dumps(x, 2) for x in head) + pickled + pickle.dumps(["0"], 2)
                + values
            )
        with pytest.raises(UserError, match=path.name):
            PickledTensors(path)
    assert not (tmp_path / "ran").exists()


def test_the_global_is_named(tmp_path):
    with pytest.raises(UserError, match=r"asks for 'posix\.system'.*safetensors"):
        PickledTensors(zipped(tmp_path / "a.bin", pickle.dumps({"w": executing(tmp_path)}, 2)))
    with pytest.raises(UserError, match=r"object\.bin.*asks for 'torch\.nn"):
        PickledTensors(HERE / "object.bin")


def test_zip_tricks(tmp_path):
    bomb = zipped(
        tmp_path / "bomb.bin", tensor(), {"0": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED
    )
    assert bomb.stat().st_size < 100_000
    with pytest.raises(UserError, match="compressed"):
        PickledTensors(bomb)
    path = tmp_path / "paths.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", tensor())
        archive.writestr("model/data/0", b"\0" * 16)
        archive.writestr("../../escaped", b"x")
    assert PickledTensors(path)["w"].shape == (4,)  # nothing is ever unpacked
    assert not (tmp_path.parent.parent / "escaped").exists()
    with zipfile.ZipFile(tmp_path / "big.bin", "w") as archive:
        archive.writestr("model/data.pkl", tensor())
        archive.writestr("model/byteorder", "big")
        archive.writestr("model/data/0", b"\0" * 16)
    with pytest.raises(UserError, match="big-endian"):
        PickledTensors(tmp_path / "big.bin")
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        PickledTensors(tmp_path / "empty.bin")


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
def test_cut_short_anywhere(name, tmp_path):
    whole = (HERE / name).read_bytes()
    for end in np.linspace(0, len(whole) - 1, 100).astype(int):
        (tmp_path / name).write_bytes(whole[:end])
        with pytest.raises(UserError, match=name):
            PickledTensors(tmp_path / name)


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
def test_changed_anywhere(name, tmp_path):
    """Whatever the bytes, an error of ours or arrays within the file."""
    whole, rng = (HERE / name).read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 6)):
            data[at] = rng.integers(256)
        (tmp_path / name).write_bytes(data)
        try:
            found = PickledTensors(tmp_path / name)
            assert sum(found[key].nbytes for key in found) < 20 * len(whole)
        except UserError as error:
            assert name in str(error)
            refused += 1
    assert 20 < refused < 200


def test_nothing_is_unpickled(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(io, "open", open)
    assert len(PickledTensors(HERE / "zip.bin")) == 13
