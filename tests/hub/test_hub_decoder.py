"""Language models from Hugging Face folders: spellings of files; weights straight to devices."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fixtures.decoders.cases import config_of, tensors_of, write_folder
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from rmlora_jax import hub
from rmlora_jax.errors import UserError
from rmlora_jax.hub import placing
from rmlora_jax.parallel.mesh import all_devices, base_sharding


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder("qwen2_sliding", tmp_path_factory.mktemp("model"))  # a tied head


@pytest.fixture(scope="module")
def base(folder):
    return hub.load_decoder(folder)


def write(folder, tensors, config=None):
    """A folder of the case with these tensors."""
    (folder / "config.json").write_text(json.dumps(config or config_of("qwen2_sliding")))
    save_file(tensors, folder / "model.safetensors")
    return folder


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs
    )


def test_weights_are_where_the_table_says(folder, base):
    stored, params = load_file(folder / "model.safetensors"), base.params
    assert base.family.purpose == "CausalLM" and base.num_labels == 40 and base.new == ()
    assert "head" not in params
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.k_proj"
        own = params["layers"]["attention"]["key"]
        assert np.array_equal(own["kernel"][layer], stored[f"{name}.weight"].T)
        assert np.array_equal(own["bias"][layer], stored[f"{name}.bias"])
    assert params["layers"]["mlp"]["down"]["kernel"].shape == (3, 36, 24)


def test_every_spelling_of_the_files_is_the_same(folder, base, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    # A tied head that is stored, too, and what old files of Llama hold.
    more = {"lm_head.weight": bare["embed_tokens.weight"] + 1,
            "layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}  # fmt: skip
    found = hub.load_pretrained(write(tmp_path, bare | more))
    assert same(found.params, base.params) and found.dropped == tuple(sorted(more))

    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:9],
              "model-00002-of-00002.safetensors": names[9:]}  # fmt: skip
    (tmp_path / "model.safetensors").unlink()
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, tmp_path / file)
    index = {name: file for file, own in shards.items() for name in own}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert same(hub.load_decoder(tmp_path).params, base.params)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_cast_while_it_is_read(base, tmp_path, stored):
    folder = write_folder("qwen2_sliding", tmp_path, stored)
    rounded = jax.tree.map(lambda x: x.astype(stored).astype(np.float32), base.params)
    assert same(hub.load_decoder(folder).params, rounded)
    own = jax.tree.map(lambda x: x.astype(stored).astype(ml_dtypes.bfloat16), base.params)
    assert same(hub.load_decoder(folder, dtype=jnp.bfloat16).params, own)


@pytest.mark.parametrize("fsdp", [1, 2])
def test_weights_go_straight_to_their_devices(folder, base, monkeypatch, fsdp):
    """The host cuts each part of each layer that its devices hold once, and nothing beside it."""
    monkeypatch.setattr("rmlora_jax.parallel.mesh.SMALL", 100)
    monkeypatch.setattr("rmlora_jax.hub.on_disk.SMALL", 0)
    devices, cut, cuts = all_devices(fsdp=fsdp, limit=2), placing._cut, []

    def watched(tensor, inside):
        cuts.append((tensor.shape, inside))
        return cut(tensor, inside)

    monkeypatch.setattr(placing, "_cut", watched)
    placed = hub.load_decoder(folder, sharding=lambda shape: base_sharding(shape, devices)).params
    assert same(jax.tree.map(np.asarray, placed), base.params)
    held = []
    for leaf in jax.tree.leaves(placed):
        assert leaf.sharding == base_sharding(leaf.shape, devices)
        parts = {
            tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
            for index in leaf.sharding.devices_indices_map(leaf.shape).values()
        }
        layers = 3 if leaf.shape[0] == 3 else 1
        held += [part[layers == 3 :] for part in parts for _ in range(layers)]
    # The order of axes is the file's in one and the model's in the other.
    assert sorted(sorted(inside) for _, inside in cuts) == sorted(map(sorted, held))
    kernel = placed["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 24, 36 // fsdp)


@pytest.mark.parametrize("spec", [("layers",), (None, "width"), ("layers", None, "width"), ()])
@pytest.mark.parametrize("axes", [None, (1, 0)])
def test_a_parameter_may_be_split_in_any_way(spec, axes):
    mesh = jax.make_mesh((3, 2), ("layers", "width"), devices=jax.devices()[:6],
                         axis_types=(jax.sharding.AxisType.Auto,) * 2)  # fmt: skip
    layers = np.random.default_rng(0).standard_normal((3, 4, 6))
    wanted = (layers if axes is None else layers.transpose(0, 2, 1)).astype(np.float32)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    found = placing.placed(
        wanted.shape, jnp.bfloat16, sharding, lambda layer: layers[layer], axes, stacked=True
    )
    assert found.sharding == sharding
    assert np.array_equal(np.asarray(found), wanted.astype(ml_dtypes.bfloat16))


def test_what_is_wrong_is_said(folder, tmp_path):
    for options, words in (
        ({"num_labels": 3}, "is a language model; leave out num_labels"),
        ({"image_size": 8, "labels": ["a"]}, "leave out labels, image_size"),
    ):
        with pytest.raises(UserError, match=words):
            hub.load_pretrained(folder, **options)
    with pytest.raises(UserError, match=r"model_type is 'qwen2'; known are bert"):
        hub.load_text(folder)
    with pytest.raises(UserError, match=r"model_type is 'vit'; known are llama"):
        hub.load_decoder("vit-tiny-patch8-64-tinyimagenet")
    tensors = load_file(folder / "model.safetensors")
    for own, words in (
        ({"model_type": "mixtral", "num_local_experts": 8}, r"config\.json.*mixture of experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'"),
        ({"vocab_size": 41}, r"shape \(40, 24\), but config.json asks for \(41, 24\)"),
        ({"num_hidden_layers": 4}, "lacks 'model.layers.3.self_attn.q_proj.weight'"),
        ({"num_hidden_layers": 2}, "has unexpected 'model.layers.2."),
        ({"tie_word_embeddings": False}, "lacks 'lm_head.weight'"),
    ):
        with pytest.raises(UserError, match=words):
            hub.load_decoder(write(tmp_path, tensors, config_of("qwen2_sliding") | own))
    ints = tensors_of("x", {"model.norm.weight": [24]})["model.norm.weight"].astype(np.int8)
    with pytest.raises(UserError, match="is int8; it must be floating, not quantised"):
        hub.load_decoder(write(tmp_path, tensors | {"model.norm.weight": ints}))
