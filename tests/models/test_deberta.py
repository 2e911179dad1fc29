"""DeBERTa: attention against a gather, the published file, what its configuration may say.

Hidden states against PyTorch are in test_text_models.py.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import make_deberta_folder as published
from fixtures.text.cases import HERE, shapes_of, tokens_of, weights_of, write_folder
from flax.traverse_util import flatten_dict
from marks import slow_but
from safetensors.numpy import save_file

import rmlora_jax as rm
from rmlora_jax.errors import UserError
from rmlora_jax.hub import load_text, load_tokenizer
from rmlora_jax.models import Deberta, DebertaConfig
from rmlora_jax.models.blocks import Parts
from rmlora_jax.models.positions import (
    bucket,
    disentangled_scores,
    drop_rows,
    skew,
)

BUCKETS = np.load(HERE / "buckets.npz")
TINY = published.CONFIG | {
    "hidden_size": 8,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "num_attention_heads": 2,
    "position_buckets": 4,
    "vocab_size": 20,
}


@pytest.mark.parametrize("name", BUCKETS)
def test_buckets_equal_pytorchs(name):
    buckets, longest = map(int, name.split("_"))
    distances = np.arange(-2 * longest, 2 * longest + 1)
    np.testing.assert_array_equal(bucket(distances, buckets, longest), BUCKETS[name])


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_skew_equals_an_indexed_lookup(length):
    x = np.arange(6 * length**2, dtype=np.float32).reshape(3, length, 2 * length)
    i, j = np.indices((length, length))
    for start in (length - 1, length):
        np.testing.assert_array_equal(skew(jnp.asarray(x), start), x[:, i, j - i + start])


def gathered_scores(query, key, position_key, position_query, rows):
    """As published: all rows of the table, of which each pair takes its own."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    if position_key is not None:
        wide = jnp.einsum("bqhd,ehd->bhqe", query, position_key)
        scores += jnp.take_along_axis(wide, jnp.broadcast_to(rows, scores.shape), -1)
    if position_query is not None:
        wide = jnp.einsum("bkhd,ehd->bhke", key, position_query)
        turned = jnp.broadcast_to(rows.T, scores.shape)
        scores += jnp.take_along_axis(wide, turned, -1).swapaxes(-1, -2)
    return scores


@pytest.mark.parametrize("terms", slow_but(["c2p p2c", "c2p", "p2c"], "c2p p2c"))
@pytest.mark.parametrize("length", [1, 2, 7, 20])
@pytest.mark.parametrize("buckets", [4, -1])
def test_scores_and_gradients_equal_the_gathered_ones(length, buckets, terms):
    span, longest = (4, 9) if buckets > 0 else (5, 5)  # 20 tokens are beyond both
    random = np.random.RandomState(length)
    query, key = random.standard_normal((2, 2, length, 3, 4)).astype(np.float32)
    tables = random.standard_normal((2, 2 * span, 3, 4)).astype(np.float32)
    weight = random.standard_normal((2, 3, length, length)).astype(np.float32)
    kept = [term in terms for term in ("c2p", "p2c")]
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    pairs = np.clip(bucket(distance, buckets, longest) + span, 0, 2 * span - 1)
    config = DebertaConfig(position_buckets=buckets, max_relative_positions=longest)
    assert config.span == span
    rows = config.rows(length)

    def ours(query, key, tables):
        tables = [t[rows] if keep else None for t, keep in zip(tables, kept, strict=True)]
        scores = disentangled_scores(query, key, *tables)
        return (scores * weight).sum(), scores

    def naive(query, key, tables):
        tables = [t if keep else None for t, keep in zip(tables, kept, strict=True)]
        scores = gathered_scores(query, key, *tables, pairs)
        return (scores * weight).sum(), scores

    args = query, key, tables
    got, expected = (
        jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))(*args) for f in (ours, naive)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_attention_scores_need_no_gather_and_no_scatter():
    x, table = jnp.ones((2, 6, 3, 4)), jnp.ones((12, 3, 4))
    loss = lambda *args: disentangled_scores(*args).sum()  # noqa: E731
    code = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, x, table, table))
    assert "dot_general" in code
    assert "gather" not in code and "scatter" not in code


def test_distances_that_share_a_row_share_what_dropout_takes():
    rows = DebertaConfig(position_buckets=4, max_relative_positions=32).rows(40)
    kept = np.asarray(drop_rows(jax.random.key(0), jnp.ones((80, 24)), rows, 0.5))
    assert set(np.unique(kept)) == {0.0, 2.0}
    distinct = [np.unique(kept[rows == row], axis=0) for row in np.unique(rows)]
    assert all(len(patterns) == 1 for patterns in distinct)
    assert len(np.unique(np.concatenate(distinct), axis=0)) == len(distinct)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return load_text(write_folder(tmp_path_factory.mktemp("v3"), "deberta_v3"))


def test_adapters_reach_the_relative_positions(shared):
    """query and key alone, whose adapted projections the relative embeddings pass too."""
    model = Deberta(shared.config, shared.num_labels)
    lora = rm.LoRA(rank=2, target=r".*/(query|key)")
    adapted = rm.adapt(model, lora)
    batch = {name: jnp.asarray(value) for name, value in tokens_of("deberta_v3").items()}
    params = rm.attach(jax.random.key(0), adapted, shared.params, batch["input_ids"])
    forward = jax.jit(lambda m, p: m.apply({"params": p}, **batch), static_argnums=0)
    np.testing.assert_array_equal(forward(adapted, params), forward(model, shared.params))

    factors, frozen = rm.split(params, lora)
    random = np.random.RandomState(0)
    factors = jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), factors)
    params = rm.join(factors, frozen)
    got = forward(adapted, params)
    np.testing.assert_allclose(got, forward(model, rm.merge(params, lora)), atol=1e-5)
    assert np.abs(got - forward(model, shared.params)).max() > 1e-2


def test_logits_do_not_depend_on_padding(shared):
    model = Deberta(shared.config, shared.num_labels)
    batch = tokens_of("deberta_v3")
    wide = {name: np.pad(value, ((0, 0), (0, 30))) for name, value in batch.items()}
    forward = jax.jit(lambda batch: model.apply({"params": shared.params}, **batch))
    np.testing.assert_allclose(forward(wide), forward(batch), atol=1e-5)


def test_what_stands_under_padding_is_not_seen(shared):
    model = Deberta(shared.config, shared.num_labels)
    batch = tokens_of("deberta_v3")
    other = batch | {"input_ids": np.where(batch["attention_mask"], batch["input_ids"], 7)}
    forward = jax.jit(lambda batch: model.apply({"params": shared.params}, **batch))
    np.testing.assert_array_equal(forward(other), forward(batch))


def test_the_published_file_loads(tmp_path):
    """pytorch_model.bin in float16 with the heads of pre-training, and without pooler and head."""
    published.write_folder(tmp_path, config=TINY)
    found = load_text(tmp_path, num_labels=2)
    assert set(found.dropped) == set(published.leftovers())
    assert set(found.new) == {"pooler/kernel", "pooler/bias", "head/kernel", "head/bias"}
    stored = dict(published.tensors(TINY))
    params = flatten_dict(found.params, sep="/")
    word = stored["deberta.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(params["embed/word/embedding"], word)
    table = stored["deberta.encoder.rel_embeddings.weight"]
    np.testing.assert_array_equal(params["encoder/relative/embedding"], table)
    for n in range(12):
        kernel = stored[f"deberta.encoder.layer.{n}.output.dense.weight"].T
        np.testing.assert_array_equal(params["encoder/layers/mlp/fc2/kernel"][n], kernel)
    assert load_tokenizer(tmp_path)("The README has words.")["input_ids"][0] == 1


def test_published_names_are_those_of_transformers():
    """All but the absolute positions, which a model of this configuration has not."""
    theirs = json.loads((HERE / "deberta-v3-base.keys.json").read_text())
    ours = published.shapes(TINY)
    assert ours.keys() - theirs.keys() <= {"deberta.embeddings.position_embeddings.weight"}
    assert theirs.keys() <= ours.keys()
    assert sum(np.prod(shape) for shape in published.shapes().values()) == 185_537_893


def test_the_published_size():
    config = DebertaConfig.from_hf(published.CONFIG)
    model, tokens = Deberta(config, 2), jax.ShapeDtypeStruct((1, 128), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    sizes = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
    assert sizes["embed"] + sizes["encoder"] == 183_831_552
    assert sizes["pooler"] == 768 * 769 and sizes["head"] == 2 * 769


def test_a_file_without_prefix_loads_alike(shared, tmp_path):
    weights = weights_of(shapes_of("deberta_v3"))
    write_folder(tmp_path, "deberta_v3")
    bare = {name.removeprefix("deberta."): value for name, value in weights.items()}
    save_file(bare, tmp_path / "model.safetensors")
    same = load_text(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, same.params, shared.params)


def test_a_stray_tensor_is_an_error(tmp_path):
    weights = weights_of(shapes_of("deberta_v3"))
    write_folder(tmp_path, "deberta_v3")
    stray = {"deberta.encoder.conv.conv.weight": np.zeros((24, 24, 3), np.float32)}
    save_file(weights | stray, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"unexpected 'deberta.encoder.conv.conv.weight'"):
        load_text(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "deberta"}, "model_type"),
        ({"pos_att_type": "c2p|p2p"}, "pos_att_type"),
        ({"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd"),
        ({"conv_kernel_size": 4}, "conv_kernel_size"),
        ({"conv_groups": 5}, "conv_groups"),
        ({"conv_act": "mish"}, "conv_act"),
        ({"pooler_hidden_act": "mish"}, "pooler_hidden_act"),
        ({"pooler_hidden_size": 12}, "pooler_hidden_size"),
        ({"attention_head_size": 12}, "attention_head_size"),
        ({"cls_dropout": 1.5}, "cls_dropout"),
        ({"type_vocab_size": -1}, "type_vocab_size"),
        ({"relative_attention": True, "position_buckets": 1}, "position_buckets"),
        (
            {"relative_attention": True, "position_buckets": 64, "max_relative_positions": 33},
            "position_buckets",
        ),
        ({"talking_head": "in"}, "talking_head"),
        ({"z_steps": 2}, "z_steps"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=f"config field '{message}'"):
        DebertaConfig.from_hf(fields)


def test_configurations_of_the_hub_are_read():
    def head_dropout(config):
        return Parts(config).dropout(config.cls_dropout).rate

    config = DebertaConfig.from_hf(published.CONFIG | {"attention_head_size": 64, "legacy": True})
    assert (config.span, config.longest_distance, config.terms) == (256, 512, ("c2p", "p2c"))
    assert config.longest is None and head_dropout(config) == 0.1
    by_default = DebertaConfig.from_hf({"max_position_embeddings": 30, "cls_dropout": 0})
    assert by_default.longest == 30 and head_dropout(by_default) == 0 and by_default.terms == ()
