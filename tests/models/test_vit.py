"""The ViT model: numbers against PyTorch, precision, rematerialisation, dropout."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.vit.cases import (
    CASES,
    TINY,
    config_of,
    images_of,
    tokens_of,
    weights_of,
    write_folder,
)
from flax.traverse_util import flatten_dict
from marks import slow

from rmlora_jax.hub import load_vit
from rmlora_jax.models import ViT, ViTConfig, vit
from rmlora_jax.models.attention import cudnn_can_run

FIXTURES = Path(__file__).parent.parent / "fixtures" / "vit"
SMALL = ViTConfig(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=40,
    image_size=20,
    patch_size=4,
)


def load_case(name, folder):
    case = CASES[name]
    write_folder(folder, config_of(case), weights_of(case))
    images = images_of(case["image_size"], case["config"].get("num_channels", 3), case["seed"])
    return load_vit(folder, image_size=case["image_size"]), images


def small(config=SMALL, **fields):
    model = ViT(config, 5, **fields)
    return model, small_variables(config), images_of(config.image_size)


@functools.cache
def small_variables(config):
    return jax.jit(ViT(config, 5).init)(jax.random.key(0), images_of(config.image_size))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("train", "hidden_states"))
def forward(model, variables, images, key=None, **options):
    rngs = None if key is None else {"dropout": key}
    return model.apply(variables, images, rngs=rngs, **options)


def assert_agrees(pretrained, images, fixture):
    expected = np.load(FIXTURES / f"{fixture}.npz")
    model = ViT(pretrained.config, pretrained.num_classes)
    logits, states = forward(model, {"params": pretrained.params}, images, hidden_states=True)
    assert logits.dtype == jnp.float32
    states = np.asarray(states)[:, :, tokens_of(states.shape[2])]
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=0)
    assert states.shape == expected["hidden_states"].shape
    np.testing.assert_allclose(states, expected["hidden_states"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_random_models_agree_with_pytorch(name, tmp_path):
    assert_agrees(*load_case(name, tmp_path), name)


def test_real_checkpoint_agrees_with_pytorch():
    assert_agrees(load_vit(TINY), images_of(64), "tiny")


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("relu", lambda x: np.maximum(x, 0)),
        ("silu", lambda x: x / (1 + np.exp(-x))),
        (
            "gelu_pytorch_tanh",
            lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        ),
    ],
)
def test_activations(name, formula):
    config = dataclasses.replace(SMALL, num_hidden_layers=1, hidden_act=name)
    model, variables, images = small(config=config)
    _, states = forward(model, variables, images, hidden_states=True)
    without = {"params": silence(variables["params"], "mlp", "fc2")}
    _, before = forward(model, without, images, hidden_states=True)
    mlp = jax.tree.map(np.asarray, variables["params"]["encoder"]["layers"]["mlp"])
    x = np.asarray(before[-1], np.float64)
    norm = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    hidden = formula(norm @ mlp["fc1"]["kernel"][0] + mlp["fc1"]["bias"][0])
    np.testing.assert_allclose(
        states[-1], x + hidden @ mlp["fc2"]["kernel"][0] + mlp["fc2"]["bias"][0], atol=1e-5
    )


def silence(params, block, name):
    """The parameters with one Dense of the layers set to zero."""
    layers = params["encoder"]["layers"]
    zero = jax.tree.map(jnp.zeros_like, layers[block][name])
    layers = {**layers, block: {**layers[block], name: zero}}
    return {**params, "encoder": {**params["encoder"], "layers": layers}}


def test_parameter_paths_and_shapes():
    _, variables, _ = small()
    shapes = {k: v.shape for k, v in flatten_dict(variables["params"], sep="/").items()}
    dense = {
        "attention/query": (24, 24),
        "attention/key": (24, 24),
        "attention/value": (24, 24),
        "attention/out": (24, 24),
        "mlp/fc1": (24, 40),
        "mlp/fc2": (40, 24),
    }
    expected = {
        "embed/cls_token": (1, 1, 24),
        "embed/position": (1, 26, 24),
        "embed/patch/kernel": (4, 4, 3, 24),
        "embed/patch/bias": (24,),
        "encoder/norm/scale": (24,),
        "encoder/norm/bias": (24,),
        "head/kernel": (24, 5),
        "head/bias": (5,),
    }
    for path, shape in dense.items():
        expected[f"encoder/layers/{path}/kernel"] = (3, *shape)
        expected[f"encoder/layers/{path}/bias"] = (3, shape[1])
    for norm in ("norm1", "norm2"):
        expected[f"encoder/layers/{norm}/scale"] = (3, 24)
        expected[f"encoder/layers/{norm}/bias"] = (3, 24)
    assert shapes == expected


def test_initial_kernels_are_truncated_at_the_stated_deviation():
    init = ViTConfig(initializer_range=0.02).kernel_init
    kernel = init(jax.random.key(0), (400, 400), jnp.float32)
    assert abs(float(kernel.std()) - 0.02) < 2e-4
    assert float(jnp.abs(kernel).max()) <= 2 * 0.02 / 0.8796 + 1e-6


def test_layers_start_with_different_kernels():
    _, variables, _ = small()
    kernel = variables["params"]["encoder"]["layers"]["mlp"]["fc1"]["kernel"]
    assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 1e-3


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(model, variables, images):
    return jax.value_and_grad(lambda v: (model.apply(v, images) ** 2).sum())(variables)


@pytest.mark.parametrize(
    ("unroll", "remat"),
    [slow(2, "none"), (1, "dots"), (3, "attention"), slow(1, "full"), slow(3, "full")],
)
def test_unroll_and_remat_change_no_numbers(unroll, remat):
    expected = loss_and_gradient(*small())
    actual = loss_and_gradient(*small(unroll=unroll, remat=remat))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6), actual, expected
    )


@pytest.mark.parametrize("prefix", [0, slow(3)])
def test_tokens_filled_up_change_no_numbers(prefix, monkeypatch):
    """As where cuDNN runs, whose kernel wants 32 tokens in place of 26: in every layer at once."""
    config = dataclasses.replace(SMALL, prefix_length=prefix)
    plain, variables, images = small(config)
    expected = *forward(plain, variables, images, hidden_states=True), loss_and_gradient(
        plain, variables, images
    )
    monkeypatch.setattr(vit, "filled_length", lambda length, *_: length + 6)
    filled = dataclasses.replace(plain, attention="xla")  # traced anew
    actual = *forward(filled, variables, images, hidden_states=True), loss_and_gradient(
        filled, variables, images
    )
    assert f"{len(images)},32,24]" in str(jax.make_jaxpr(filled.apply)(variables, images))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5), actual, expected
    )


def test_dropout_draws_for_the_tokens_that_there_are(monkeypatch):
    config = dataclasses.replace(SMALL, hidden_dropout_prob=0.1)
    model, variables, images = small(config, attention="xla")
    monkeypatch.setattr(vit, "filled_length", lambda length, *_: length + 6)

    def tokens(train):
        call = functools.partial(model.apply, train=train, rngs={"dropout": jax.random.key(1)})
        text = str(jax.make_jaxpr(call)(variables, images))
        return {n for n in (26, 32) if f"{len(images)},{n},24]" in text}

    assert tokens(train=True) == {26} and 32 in tokens(train=False)


def residuals(remat):
    """Values kept from the forward for the backward pass, in numbers."""
    model, variables, images = small(remat=remat)
    _, backward = jax.vjp(lambda v: model.apply(v, images), variables)
    return sum(leaf.size for leaf in jax.tree.leaves(backward))


def test_remat_keeps_less():
    assert residuals("full") < residuals("attention") < residuals("dots") < residuals("none")


def test_bfloat16_is_close_and_logits_stay_float32():
    pretrained, images = load_vit(TINY), images_of(64)
    exact = np.load(FIXTURES / "tiny.npz")["logits"]
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pretrained.params)
    for params in (pretrained.params, half):
        model = ViT(pretrained.config, 200, dtype=jnp.bfloat16)
        logits, states = forward(model, {"params": params}, images, hidden_states=True)
        assert logits.dtype == jnp.float32
        assert states.dtype == jnp.bfloat16
        error = np.abs(np.asarray(logits) - exact).max()
        assert 1e-4 < error < 0.03 * np.abs(exact).max()


def test_auto_attention_is_xla_without_a_gpu():
    assert not cudnn_can_run(jnp.float32, 64)
    if jax.default_backend() != "gpu":
        assert not cudnn_can_run(jnp.bfloat16, 64)
    model, variables, images = small()
    auto = forward(model, variables, images)
    xla = forward(ViT(SMALL, 5, attention="xla"), variables, images)
    np.testing.assert_array_equal(auto, xla)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_honoured_in_training_alone(field):
    config = dataclasses.replace(SMALL, **{field: 0.4})
    model, variables, images = small(config=config)
    still = forward(ViT(SMALL, 5), variables, images)
    np.testing.assert_array_equal(forward(model, variables, images), still)
    draws = [forward(model, variables, images, jax.random.key(i), train=True) for i in (0, 1, 0)]
    assert float(jnp.abs(draws[0] - draws[1]).max()) > 1e-4
    assert float(jnp.abs(draws[0] - still).max()) > 1e-4
    np.testing.assert_array_equal(draws[0], draws[2])


def test_hidden_dropout_falls_on_embeddings_and_on_both_branches():
    config = dataclasses.replace(SMALL, num_hidden_layers=1, hidden_dropout_prob=0.4)
    model, variables, images = small(config=config)
    attention_only = {"params": silence(variables["params"], "mlp", "fc2")}
    mlp_only = {"params": silence(variables["params"], "attention", "out")}
    for kept, part in ((attention_only, "attention"), (mlp_only, "mlp")):
        _, states = forward(model, kept, images, jax.random.key(1), train=True, hidden_states=True)
        embedded, update = states[0], states[1] - states[0]
        # 1,248 entries each: the standard deviation of the fraction is 0.014.
        assert abs(float((embedded == 0).mean()) - 0.4) < 0.07
        assert abs(float((update == 0).mean()) - 0.4) < 0.07, part


def test_attention_dropout_is_unbiased():
    config = dataclasses.replace(SMALL, num_hidden_layers=1, attention_probs_dropout_prob=0.5)
    model, variables, images = small(config=config)
    params = silence(variables["params"], "mlp", "fc2")
    # Kernels large enough that the weights are far from uniform.
    params = jax.tree.map(lambda x: x * 8 if x.ndim == 3 and x.shape[0] == 1 else x, params)
    variables = {"params": params}

    def update(key):
        _, states = model.apply(
            variables, images, train=True, hidden_states=True, rngs={"dropout": key}
        )
        return states[1] - states[0]

    _, states = forward(model, variables, images, hidden_states=True)
    draws = jax.jit(jax.vmap(update))(jax.random.split(jax.random.key(0), 400))
    error = np.abs(np.asarray(draws.mean(0) - (states[1] - states[0])))
    noise = np.asarray(draws.std(0)) / 20
    assert (error <= 5 * noise + 1e-6).all()
    assert noise.max() > 0


def test_training_without_dropout_needs_no_rng():
    model, variables, images = small()
    np.testing.assert_array_equal(
        forward(model, variables, images, train=True), forward(model, variables, images)
    )


def test_works_under_vmap_and_eval_shape():
    model, variables, images = small()
    batch = jnp.stack([images, images[::-1]])
    stacked = jax.vmap(lambda x: forward(model, variables, x))(batch)
    np.testing.assert_allclose(stacked[1], forward(model, variables, images[::-1]), atol=1e-6)
    shape = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((7, 20, 20, 3), "bfloat16"))
    assert (shape.shape, shape.dtype) == ((7, 5), jnp.float32)


def test_model_is_hashable_and_traces_once():
    traces = []

    def traced(model, variables, images):
        traces.append(1)
        return model.apply(variables, images)

    run = jax.jit(traced, static_argnums=0)
    model, variables, images = small()
    run(model, variables, images)
    run(ViT(dataclasses.replace(SMALL), 5), variables, images)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (np.zeros((1, 20, 20, 3), np.uint8), TypeError, "uint8"),
        (np.zeros((1, 24, 24, 3), np.float32), ValueError, "image_size="),
        (np.zeros((1, 20, 20, 1), np.float32), ValueError, r"\(batch, 20, 20, 3\)"),
        (np.zeros((20, 20, 3), np.float32), ValueError, r"\(20, 20, 3\)"),
    ],
)
def test_wrong_images_are_named(images, error, words):
    model, variables, _ = small()
    with pytest.raises(error, match=words):
        model.apply(variables, images)


@pytest.mark.parametrize(
    "fields", [{"remat": "some"}, {"attention": "flash"}, {"unroll": 0}, {"unroll": 1.5}]
)
def test_wrong_attributes_are_named(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=name):
        forward(*small(**fields))
