"""BERT, RoBERTa and DeBERTa against PyTorch (fixtures of make_text.py), and against themselves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.text import cases
from marks import slow, slow_but

import rmlora_jax as rm
from rmlora_jax.hub import load_text
from rmlora_jax.models import Bert, BertConfig, Deberta, DebertaConfig

HERE = cases.HERE
NAMES = sorted(cases.CASES)
KINDS = ("bert", "roberta", "deberta_v3", "deberta_v2_conv", "deberta_unshared")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return {name: cases.write_folder(root / name, name) for name in NAMES}


@pytest.fixture
def loaded(folders):
    @functools.cache
    def load(name, **fields):
        found = load_text(folders[name])
        model = found.family.model(found.config, found.num_labels, **fields)
        return model, found.params, {k: jnp.asarray(v) for k, v in cases.tokens_of(name).items()}

    return load


@pytest.mark.parametrize("name", NAMES)
def test_every_hidden_state_equals_pytorchs(name, loaded):
    model, params, batch = loaded(name)
    run = jax.jit(functools.partial(model.apply, hidden_states=True))
    logits, states = run({"params": params}, **batch)
    theirs = np.load(HERE / f"{name}.npz")
    assert states.shape == theirs["hidden_states"].shape
    real = np.asarray(batch["attention_mask"], bool)
    scale = np.abs(theirs["hidden_states"][:, real]).max()
    assert 1 < scale < 100  # weights of a size that shows differences
    np.testing.assert_allclose(
        np.asarray(states)[:, real], theirs["hidden_states"][:, real], atol=2e-4
    )
    np.testing.assert_allclose(logits, theirs["logits"], atol=2e-4)
    assert np.ptp(theirs["logits"], axis=0).min() > 0.01  # the examples do differ


@pytest.mark.parametrize("name", slow_but(KINDS, "roberta", "deberta_v3"))
def test_logits_do_not_depend_on_padding(name, loaded):
    model, params, batch = loaded(name)
    run = jax.jit(model.apply)
    together = run({"params": params}, **batch)
    for row, length in enumerate(np.asarray(batch["attention_mask"]).sum(1)):
        alone = {k: v[row : row + 1, :length] for k, v in batch.items()}
        own = run({"params": params}, **alone)
        np.testing.assert_allclose(own[0], together[row], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_unroll_and_remat_change_no_number(name, loaded):
    model, params, batch = loaded(name)

    def run(model, params):
        def loss(params):
            return jnp.square(model.apply({"params": params}, **batch)).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    value, grads = run(model, params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    for fields in ({"unroll": 3}, {"remat": "full"}, {"remat": "dots", "unroll": 2}):
        if fields.get("unroll", 1) > model.config.num_hidden_layers:
            continue
        other, other_grads = run(model.clone(**fields), params)
        np.testing.assert_allclose(other, value, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, other_grads
        )


@pytest.mark.parametrize("name", slow_but(KINDS, "roberta", "deberta_v3"))
def test_adapters_start_at_the_base_and_merge(name, loaded):
    model, params, batch = loaded(name)
    lora = rm.LoRA(rank=2, alpha=4, target=r"encoder/layers/.*", train="head|pooler")
    adapted = rm.adapt(model, lora)
    started = rm.attach(jax.random.key(0), adapted, params, *batch.values())
    run = jax.jit(lambda m, p: m.apply({"params": p}, **batch), static_argnums=0)
    np.testing.assert_array_equal(run(adapted, started), run(model, params))
    moved = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)
        if path[-1].key == "lora_b" else x,
        started,
    )
    ours = run(adapted, moved)
    assert np.abs(np.asarray(ours) - np.asarray(run(model, params))).max() > 1e-2
    np.testing.assert_allclose(ours, run(model, rm.merge(moved, lora)), atol=1e-4)
    trainable, _ = rm.split(moved, lora)
    layers = trainable["encoder"]["layers"]
    matrices = {"query", "key", "value", "out"} | (
        {"pos_key", "pos_query"} if name == "deberta_unshared" else set()
    )
    assert set(layers["attention"]) == matrices and set(layers["mlp"]) == {"fc1", "fc2"}


@pytest.mark.parametrize("name", (slow("bert"), slow("roberta"), "deberta_v2_conv"))
def test_dropout_acts_in_training_alone(name, loaded):
    model, params, batch = loaded(name)
    plain = model.apply({"params": params}, **batch)

    def train(key, config=model.config):
        rngs = {"dropout": jax.random.key(key)}
        return model.clone(config=config).apply({"params": params}, **batch, train=True, rngs=rngs)

    assert np.abs(train(0) - plain).max() > 1e-3
    assert np.abs(train(0) - train(1)).max() > 1e-3
    np.testing.assert_array_equal(train(0), train(0))
    off = {
        field.name: 0.0
        for field in dataclasses.fields(model.config)
        if field.name.endswith(("_prob", "dropout"))
    }
    still = train(0, dataclasses.replace(model.config, **off))
    np.testing.assert_allclose(still, plain, atol=1e-5)


@pytest.mark.parametrize("name", ("bert", "deberta_v3"))
def test_bfloat16_is_near(name, loaded):
    model, params, batch = loaded(name)
    exact = np.asarray(model.apply({"params": params}, **batch))
    short = model.clone(dtype=jnp.bfloat16).apply({"params": params}, **batch)
    assert short.dtype == jnp.float32
    assert 0 < np.abs(short - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("cls", "fields", "words"),
    [
        (BertConfig, {"model_type": "albert"}, "model_type"),
        (BertConfig, {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        (BertConfig, {"is_decoder": True}, "is_decoder"),
        (BertConfig, {"classifier_dropout": 1.5}, "classifier_dropout"),
        (BertConfig, {"hidden_size": 10, "num_attention_heads": 3}, "num_attention_heads"),
        (DebertaConfig, {"model_type": "deberta"}, "model_type"),
        (DebertaConfig, {"pos_att_type": "c2p|p2p", "relative_attention": True}, "pos_att_type"),
        (DebertaConfig, {"conv_kernel_size": 4}, "conv_kernel_size"),
        (DebertaConfig, {"z_steps": 2}, "z_steps"),
        (DebertaConfig, {"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd"),
        (DebertaConfig, {"pooler_hidden_size": 12}, "pooler_hidden_size"),
        (DebertaConfig, {"attention_head_size": 12}, "attention_head_size"),
        (DebertaConfig, {"talking_head": "in"}, "talking_head"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(cls, fields, words):
    with pytest.raises(ValueError, match=words):
        cls.from_hf(fields)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda x: (x.astype(float),), TypeError, "integers"),
        (lambda x: (x[0],), ValueError, "batch, tokens"),
        (lambda x: (np.tile(x, 9),), ValueError, "positions for 32"),
        (lambda x: (x, x[:, 1:]), ValueError, "attention_mask"),
        (lambda x: (x, None, x[:1]), ValueError, "token_type_ids"),
    ],
)
def test_wrong_inputs_are_named(make, error, words, loaded):
    model, params, batch = loaded("bert")
    with pytest.raises(error, match=words):
        model.apply({"params": params}, *make(np.asarray(batch["input_ids"])))
    with pytest.raises(ValueError, match="num_labels"):
        Bert(model.config, 0).apply({"params": params}, **batch)
    with pytest.raises(ValueError, match="remat"):
        Deberta(DebertaConfig(), 2, remat="half").apply({"params": params}, **batch)
