"""The examples of RM-LoRA inside other people's code, against the same steps taken by hand."""

import importlib.util
import math
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import qwix
from flax import nnx
from flax.traverse_util import unflatten_dict
from threefry import reference_bits, reference_uniform

from rmlora_jax.optim.masking import MaskState

README = Path(__file__).parent.parent / "README.md"
FOLDER = Path(__file__).parent / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
SHORT = ("plain_jax", "data_parallel")  # README shows them in full


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_runs_as_a_script(name, capsys):
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    numbers = re.findall(r"\d+\.?\d*", capsys.readouterr().out)
    assert numbers and all(math.isfinite(float(number)) for number in numbers)


@pytest.mark.parametrize("name", SHORT)
def test_readme_shows_it_in_full(name):
    lines = [line.strip() for line in (FOLDER / f"{name}.py").read_text().splitlines()]
    code = [line for line in lines if line and not line.startswith(("#", '"""'))]
    shown = [line.strip() for line in README.read_text().splitlines() if line.strip()]
    first = next(i for i in range(len(shown)) if shown[i : i + 6] == code[:6])
    assert shown[first : first + len(code)] == code


# --- RM-LoRA by hand: numpy in float64, masks from the independent generator -----------------


def matrices(a, b):
    return a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)


def penalty_gradient(factors):
    """Of the mean of |A^T A - I|_F and |B B^T - I|_F over all matrices."""
    out = {}
    for label, (a, b) in factors.items():
        flat_a, flat_b = matrices(a, b)
        error_a = flat_a.T @ flat_a - np.eye(flat_a.shape[1])
        error_b = flat_b @ flat_b.T - np.eye(flat_b.shape[0])
        g_a = 2 * flat_a @ error_a / np.linalg.norm(error_a) / (2 * len(factors))
        g_b = 2 * error_b @ flat_b / np.linalg.norm(error_b) / (2 * len(factors))
        out[label] = (g_a.reshape(a.shape), g_b.reshape(b.shape))
    return out


def train_by_hand(task_loss, factors, steps, *, clip=1.0, mask_after=True, penalty=0.1):
    """Factors {module path: (A, B)} after Adam(1e-2) with keep 0.5 and no mask in step 0."""
    task_gradient = jax.jit(jax.grad(task_loss))
    factors = jax.tree.map(np.float64, factors)
    m = jax.tree.map(np.zeros_like, factors)
    v = jax.tree.map(np.zeros_like, factors)
    for t in range(steps):
        g = jax.tree.map(np.float64, task_gradient(jax.tree.map(jnp.float32, factors)))
        g = jax.tree.map(lambda g, p: g + penalty * p, g, penalty_gradient(factors))
        norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(g)))
        g = jax.tree.map(lambda leaf, norm=norm: leaf * min(1, clip / norm), g)
        keep = {}
        for label, (a, b) in factors.items():
            chosen = (reference_uniform(0, t, label, (b.shape[0],)) < 0.5) | (t == 0)
            keep[label] = (chosen + 0 * a, chosen.reshape(-1, *(1,) * (b.ndim - 1)) + 0 * b)
        if not mask_after:
            g = jax.tree.map(np.multiply, g, keep)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
        step = jax.tree.map(
            lambda m, v, t=t: 1e-2 * m / (1 - 0.9 ** (t + 1))
            / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8),
            m, v,
        )  # fmt: skip
        if mask_after:
            step = jax.tree.map(np.multiply, step, keep)
        factors = jax.tree.map(np.subtract, factors, step)
    return factors


def assert_close(found, wanted, start):
    for label, pair in wanted.items():
        for mine, theirs, first in zip(found[label], pair, start[label], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=2e-4)
            assert np.abs(theirs - first).max() > 0.02  # it moved a hundred times the tolerance


def relu(x):
    return jnp.maximum(x, 0)


# --- loops ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHORT)
def test_plain_loops_against_numpy(name):
    example = load(name)
    x = example.x.reshape(-1, 8)
    y = x @ example.target
    assert len(x) == 64

    def task_loss(factors):
        a, b = factors[""]
        return jnp.mean((x @ (example.base + 2 * a @ b) - y) ** 2)

    start = {"": (jax.random.normal(jax.random.key(2), (8, 4)), np.zeros((4, 8)))}
    wanted = train_by_hand(task_loss, start, 30, clip=np.inf, mask_after=False)
    params, _ = example.main(30)
    assert_close({"": (params["lora_a"], params["lora_b"])}, wanted, start)


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_eight_devices_give_the_numbers_of_jit_on_one(how):
    assert jax.device_count() == 8
    example, one = load("data_parallel"), load("plain_jax")
    batch = example.x, example.x @ example.target
    one.batch = [jax.device_put(leaf.reshape(-1, 8), jax.devices()[0]) for leaf in batch]
    found, found_loss = example.main(100, how)
    wanted, wanted_loss = one.main(100)
    assert len(wanted["lora_a"].sharding.device_set) == 1
    assert len(found["lora_a"].sharding.device_set) == 8
    np.testing.assert_allclose(found_loss, wanted_loss, rtol=1e-5)
    for side in ("lora_a", "lora_b"):
        np.testing.assert_allclose(found[side], wanted[side], rtol=1e-4, atol=1e-5)
        for shard in found[side].addressable_shards:  # the copies never part
            np.testing.assert_array_equal(shard.data, found[side])


def test_the_state_is_small_and_goes_on_from_an_orbax_checkpoint(tmp_path):
    example = load("plain_jax")
    params = example.main(1)[0]
    state = example.tx.init(params)
    assert isinstance(state[0], MaskState)
    assert sum(leaf.nbytes for leaf in state[0]) == 20  # count, key, kept
    for _ in range(5):
        params, state, _ = example.step(params, state, example.batch)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", (params, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "run", jax.eval_shape(lambda: (params, state)))
    assert isinstance(restored[1][0], MaskState)
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(),
                        restored, (params, state))  # fmt: skip
    assert jax.tree.all(same)
    for _ in range(5):
        restored = example.step(*restored[:2], example.batch)
        params, state, _ = example.step(params, state, example.batch)
    jax.tree.map(np.testing.assert_array_equal, restored[:2], (params, state))


# --- models --------------------------------------------------------------------------------


def linear(layer, x, pair, scale):
    a, b = pair
    return x @ (layer.kernel[...] + scale * a @ b) + layer.bias[...]


def test_nnx_loop():
    example = load("nnx_loop")
    base = example.Model(nnx.Rngs(1))
    fresh = example.rm.adapt(base, example.lora, rngs=nnx.Rngs(2))
    labels = {"body/layers/0": 0, "body/layers/2": 2}

    def factors_of(model):
        layers = {label: model.body.layers[i] for label, i in labels.items()}
        return {label: (np.asarray(layer.lora_a[...]), np.asarray(layer.lora_b[...]))
                for label, layer in layers.items()}  # fmt: skip

    def task_loss(factors):
        fc1, _, fc2 = base.body.layers
        x = relu(linear(fc1, example.x, factors["body/layers/0"], 2))
        x = linear(fc2, x, factors["body/layers/2"], 2)
        return jnp.mean((x @ base.head.kernel[...] + base.head.bias[...] - example.y) ** 2)

    start = factors_of(fresh)
    trained_base, model, _ = example.main(30)
    assert_close(factors_of(model), train_by_hand(task_loss, start, 30), start)
    kernels = [m.body.layers[0].kernel[...] for m in (base, trained_base, model)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    np.testing.assert_array_equal(kernels[0], kernels[2])


def test_nnx_lora_modules():
    example = load("nnx_lora_modules")

    def factors_of(model):
        layers = {"fc1/lora": model.fc1.lora, "fc2": model.fc2}
        return {label: (np.asarray(layer.lora_a[...]), np.asarray(layer.lora_b[...]))
                for label, layer in layers.items()}  # fmt: skip

    fresh = example.Model(nnx.Rngs(1))

    def task_loss(factors):
        x = relu(linear(fresh.fc1, example.x, factors["fc1/lora"], 1))
        return jnp.mean((linear(fresh.fc2.base_module, x, factors["fc2"], 1) - example.y) ** 2)

    start = factors_of(fresh)
    model, _ = example.main(30)
    assert_close(factors_of(model), train_by_hand(task_loss, start, 30), start)
    np.testing.assert_array_equal(model.fc1.kernel[...], fresh.fc1.kernel[...])


def test_equinox_model():
    example = load("equinox_model")
    mlp = example.eqx.nn.MLP(8, 8, 16, 1, key=jax.random.key(1))

    def factors_of(model):
        return {f"layers/{i}": (layer.lora_a, layer.lora_b)
                for i, layer in enumerate(model.layers)}  # fmt: skip

    def task_loss(factors):
        x = example.x
        for i, layer in enumerate(mlp.layers):
            a, b = factors[f"layers/{i}"]
            x = (relu(x) if i else x) @ (layer.weight.T + 2 * a @ b) + layer.bias
        return jnp.mean((x - example.y) ** 2)

    start = factors_of(example.adapted(mlp, 4, jax.random.key(2)))
    model, _ = example.main(30)
    assert_close(factors_of(model), train_by_hand(task_loss, start, 30), start)
    np.testing.assert_array_equal(model.layers[0].linear.weight, mlp.layers[0].weight)


def test_qwix_linen():
    example = load("qwix_model")
    adapted = qwix.apply_lora_to_model(example.Linen(), example.provider)
    params = adapted.init(jax.random.key(1), example.x)["params"]

    def task_loss(factors):
        merged = {"conv": {}, "heads": {}, "out": {}}
        for label, (a, b) in factors.items():
            layer = label.removesuffix("/kernel")
            kernel = params[layer]["kernel"]
            delta = jnp.tensordot(a, b, 1).reshape(kernel.shape)
            merged[layer] = {"kernel": kernel + 2 * delta, "bias": params[layer]["bias"]}
        return jnp.mean((example.Linen().apply({"params": merged}, example.x) - example.y) ** 2)

    def factors_of(layers):
        return {f"{name}/kernel": (layer["kernel_lora_a"], layer["kernel_lora_b"])
                for name, layer in layers.items()}  # fmt: skip

    start = factors_of(params)
    assert [leaf.shape for leaf in start["conv/kernel"]] == [(3, 8, 4), (4, 12)]
    factors, _ = example.main(30)
    found = factors_of(unflatten_dict(factors, sep="/"))
    assert_close(found, train_by_hand(task_loss, start, 30), start)


def test_qwix_nnx():
    example = load("qwix_model")
    model = qwix.apply_lora_to_model(
        example.Nnx(nnx.Rngs(1)), example.provider, example.x, rngs=nnx.Rngs(2)
    )

    def factors_of(state):
        return {f"{name}/kernel": (layer["kernel_lora_a"], layer["kernel_lora_b"])
                for name, layer in state.items()}  # fmt: skip

    heads, out = model.heads.kernel[...], model.out.kernel[...]

    def task_loss(factors):
        (a1, b1), (a2, b2) = factors["heads/kernel"], factors["out/kernel"]
        x = jnp.einsum("btd,dnh->btnh", example.x, heads + 2 * jnp.tensordot(a1, b1, 1))
        x = jnp.einsum("btnh,nhd->btd", x, out + 2 * jnp.tensordot(a2, b2, 1))
        return jnp.mean((x - example.y) ** 2)

    start = factors_of(nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))
    assert [leaf.shape for leaf in start["heads/kernel"]] == [(8, 4), (4, 2, 5)]
    assert [leaf.shape for leaf in start["out/kernel"]] == [(2, 5, 4), (4, 8)]
    found = factors_of(example.nnx_main(30)[0])
    assert_close(found, train_by_hand(task_loss, start, 30), start)


# --- other parameters, and optax's wrappers --------------------------------------------------


def test_subsets():
    """What moves in the second update, which is step 1, entry by entry."""
    found = load("subsets").main(2)

    def check(name, **named):
        """``named`` are the masked leaves, every other one moves."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(found[name]):
            path = "/".join(key.key for key in path)
            wanted = np.broadcast_to(named.pop(path, True), leaf.shape)
            np.testing.assert_array_equal(leaf, wanted, err_msg=f"{name}: {path}")
        assert not named

    def coins(path, *shape):
        return reference_uniform(0, 1, path, shape) < 0.5

    attention = {"layers/attention/kernel": coins("layers/attention/kernel", 2, 8, 8)}
    biases = {"layers/attention/bias": coins("layers/attention/bias", 2, 8)}
    down, up = "layers/bottleneck/down/kernel", "layers/bottleneck/up/kernel"
    check("attention", **attention)
    check("bitfit", **biases)
    entries = {down: coins(down, 2, 8, 4), up: coins(up, 2, 4, 8)}
    entries["layers/prefix"] = coins("layers/prefix", 2, 5, 8)
    check("layers", **attention, **biases, **entries)
    check("prefix", **{"layers/prefix": coins("layers/prefix", 2)[:, None, None]})
    bits = reference_bits(0, 1, "layers/bottleneck", (2, 4))
    drawn = bits <= np.sort(bits, axis=-1)[:, 1:2]
    check("bottleneck", **{down: drawn[:, None, :], up: drawn[:, :, None]})


@pytest.fixture(scope="module")
def wrapped():
    return load("optax_wrappers").main()


def drawn(step):
    """The two directions of four that step draws, for A (6, 4) and B (4, 5) of ones."""
    bits = reference_bits(0, step, "fc", (4,))
    chosen = bits <= np.sort(bits)[1]
    return np.broadcast_to(chosen, (6, 4)), np.broadcast_to(chosen[:, None], (4, 5))


def assert_updates(updates, a, b, head):
    np.testing.assert_allclose(updates["fc"]["lora_a"], a, rtol=1e-6)
    np.testing.assert_allclose(updates["fc"]["lora_b"], b, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["kernel"], np.full((5, 3), head), rtol=1e-6)


def test_multi_steps(wrapped):
    history, _ = wrapped["multi_steps"]
    for micro_step, updates in enumerate(history):
        if micro_step % 2 == 0:
            assert_updates(updates, np.zeros((6, 4)), np.zeros((4, 5)), 0)
        else:
            a, b = drawn(micro_step // 2)
            assert_updates(updates, -1.0 * a, -1.0 * b, -1)


def test_masked(wrapped):
    history, _ = wrapped["masked"]
    g_a, g_b = penalty_gradient({"fc": (np.ones((6, 4)), np.ones((4, 5)))})["fc"]
    for step, updates in enumerate(history):
        a, b = drawn(step)
        assert_updates(updates, a * -(1 + 0.1 * g_a), b * -(1 + 0.1 * g_b), 0)


def test_lora_plus(wrapped):
    history, _ = wrapped["lora_plus"]
    for step, updates in enumerate(history):
        a, b = drawn(step)
        assert_updates(updates, -1e-3 * a, -16e-3 * b, -1e-3)


def test_injected_hyperparameters(wrapped):
    history, state = wrapped["injected"]
    rates, fractions = zip(*history, strict=True)
    np.testing.assert_allclose(rates, [0.01, 0.009, 0.008], rtol=1e-6)
    half = np.mean(reference_uniform(0, 1, "fc", (4,)) < 0.5)
    np.testing.assert_allclose(fractions, [1, half, 0], rtol=1e-6)
    assert 0 < half < 1 and float(state.hyperparams["keep"]) == 0


def test_without_params(wrapped):
    updates, _ = wrapped["without_params"]
    assert_updates(updates, *drawn(0), 1)


def test_extra_arguments(wrapped):
    history, _ = wrapped["extra_arguments"]
    for step, (updates, scale) in enumerate(zip(history, (1, 0.5, 0.25), strict=True)):
        a, b = drawn(step)
        assert_updates(updates, -scale * a, -scale * b, -scale)
