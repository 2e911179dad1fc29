"""RM-LoRA's step against a re-computation in numpy, and its limits against plain LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import slow

from rmlora_jax.optim.masking import kept_fraction, step_masks
from rmlora_jax.optim.orthogonality import orthogonality
from rmlora_jax.optim.rm_lora import authors_exact, rm_lora

LAYERS, WIDTH, RANK, SCALE = 2, 6, 4, 2.0
PENALTY, CLIP, RATE, DECAY = 0.1, 0.5, 2e-2, 0.05


def problem(seed=0):
    """A linear network of two adapted layers and a head; (params, base, x, y) in float64."""
    rng = np.random.default_rng(seed)
    params = {
        "encoder": {
            "lora_a": rng.normal(size=(LAYERS, WIDTH, RANK)) * 0.3,
            "lora_b": rng.normal(size=(LAYERS, RANK, WIDTH)) * 0.1,
        },
        "head": {"kernel": rng.normal(size=(WIDTH, 3)) * 0.5, "bias": np.zeros(3)},
    }
    base = rng.normal(size=(LAYERS, WIDTH, WIDTH)) / np.sqrt(WIDTH)
    return params, base, rng.normal(size=(16, WIDTH)), rng.normal(size=(16, 3))


def to_jax(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def jax_loss(params, base, x, y):
    for layer in range(LAYERS):
        a, b = params["encoder"]["lora_a"][layer], params["encoder"]["lora_b"][layer]
        x = x @ base[layer] + SCALE * (x @ a) @ b
    out = x @ params["head"]["kernel"] + params["head"]["bias"]
    return jnp.mean((out - y) ** 2)


def numpy_gradient(params, base, x, y):
    """Back-propagation by hand."""
    a, b, hidden = params["encoder"]["lora_a"], params["encoder"]["lora_b"], [x]
    for layer in range(LAYERS):
        hidden.append(hidden[-1] @ (base[layer] + SCALE * a[layer] @ b[layer]))
    out = hidden[-1] @ params["head"]["kernel"] + params["head"]["bias"]
    d = 2 * (out - y) / out.size
    head = {"kernel": hidden[-1].T @ d, "bias": d.sum(0)}
    d = d @ params["head"]["kernel"].T
    da, db = np.zeros_like(a), np.zeros_like(b)
    for layer in reversed(range(LAYERS)):
        da[layer] = SCALE * hidden[layer].T @ d @ b[layer].T
        db[layer] = SCALE * (hidden[layer] @ a[layer]).T @ d
        d = d @ (base[layer] + SCALE * a[layer] @ b[layer]).T
    return {"encoder": {"lora_a": da, "lora_b": db}, "head": head}


def numpy_penalty_gradient(params):
    """d/dA of |A^T A - I|_F is 2 A (A^T A - I) / |A^T A - I|_F; the mean is over 2 L matrices."""
    a, b = params["encoder"]["lora_a"], params["encoder"]["lora_b"]
    da, db = np.zeros_like(a), np.zeros_like(b)
    for layer in range(LAYERS):
        error = a[layer].T @ a[layer] - np.eye(RANK)
        da[layer] = 2 * a[layer] @ error / np.linalg.norm(error)
        error = b[layer] @ b[layer].T - np.eye(RANK)
        db[layer] = 2 * error @ b[layer] / np.linalg.norm(error)
    return da / (2 * LAYERS), db / (2 * LAYERS)


class NumpyRun:
    """gradient -> + penalty gradient -> clip -> mask -> AdamW, in float64."""

    def __init__(self, params, placement="before", head_stops=False):
        self.params, self.placement, self.head_stops = params, placement, head_stops
        self.m = jax.tree.map(np.zeros_like, params)
        self.v = jax.tree.map(np.zeros_like, params)
        self.t = 0

    def step(self, masks, base, x, y, rate):
        g = numpy_gradient(self.params, base, x, y)
        pa, pb = numpy_penalty_gradient(self.params)
        g["encoder"]["lora_a"] += PENALTY * pa
        g["encoder"]["lora_b"] += PENALTY * pb
        norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(g)))
        g = jax.tree.map(lambda leaf: leaf * min(1, CLIP / norm), g)
        masks = jax.tree.map(lambda mask, leaf: np.broadcast_to(mask, leaf.shape), masks, g)
        if self.head_stops and self.t > 0:
            masks["head"] = jax.tree.map(np.zeros_like, masks["head"])
        before = (self.params, self.m, self.v)
        if self.placement != "after":
            g = jax.tree.map(lambda leaf, mask: leaf * mask, g, masks)
        self.t += 1
        self.m = jax.tree.map(lambda m, leaf: 0.9 * m + 0.1 * leaf, self.m, g)
        self.v = jax.tree.map(lambda v, leaf: 0.999 * v + 0.001 * leaf**2, self.v, g)
        self.params = jax.tree.map(
            lambda p, m, v: p - rate * (
                m / (1 - 0.9**self.t) / (np.sqrt(v / (1 - 0.999**self.t)) + 1e-8) + DECAY * p
            ),
            self.params, self.m, self.v,
        )  # fmt: skip

        def choose(new, old):
            return jax.tree.map(lambda n, o, mask: np.where(mask, n, o), new, old, masks)

        if self.placement in ("after", "lazy"):
            self.params = choose(self.params, before[0])
        if self.placement == "lazy":
            self.m, self.v = choose(self.m, before[1]), choose(self.v, before[2])
        return norm


def compare(tx, mask_options, steps=30, **numpy_options):
    """Runs ``tx`` and the re-computation side by side; returns the norms before clipping."""
    params, base, x, y = problem()
    reference = NumpyRun(params, **numpy_options)
    found = to_jax(params)
    state = tx.init(found)
    step = jax.jit(lambda p, s: tx.update(jax.grad(jax_loss)(p, *to_jax((base, x, y))), s, p))
    norms, moved = [], []
    for t in range(steps):
        masks = jax.tree.map(np.asarray, step_masks(state, found, **mask_options))
        updates, state = step(found, state)
        found = optax.apply_updates(found, updates)
        norms.append(reference.step(masks, base, x, y, schedule(t)))
        whole = jax.tree.map(lambda m, p: np.broadcast_to(m, p.shape), masks, params)
        kept = np.mean(np.concatenate([m.ravel() for m in whole["encoder"].values()]))
        np.testing.assert_allclose(kept_fraction(state), kept, rtol=1e-6)
        moved.append(kept)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
            found, reference.params,
        )  # fmt: skip
    assert moved[0] == 1 and 0.2 < np.mean(moved[1:]) < 0.8
    return norms


def schedule(t):
    return RATE * (1 - t / 40)


@pytest.mark.parametrize("placement", ["before", slow("after"), "lazy"])
@pytest.mark.parametrize("options", [
    {"keep": 0.5},
    {"keep": 2, "draw": "exact", "coupling": "independent"},
    {"keep": 0.4, "unit": "element"},
])  # fmt: skip
def test_rm_lora_against_numpy(placement, options):
    tx = rm_lora(optax.linear_schedule(RATE, 0, 40), penalty=PENALTY, clip=CLIP,
                 weight_decay=DECAY, placement=placement, seed=3, **options)  # fmt: skip
    norms = compare(tx, options, placement=placement)
    assert max(norms) > CLIP > min(norms)  # both sides of the clipping were tried


@pytest.mark.parametrize("version, coupling", [("v1", "paired"), ("v2", "independent")])
def test_authors_exact_against_numpy(version, coupling):
    tx = authors_exact(optax.linear_schedule(RATE, 0, 40), rank=RANK, k=2, version=version,
                       penalty=PENALTY, clip=CLIP, weight_decay=DECAY, seed=3)  # fmt: skip
    options = {"keep": 2, "draw": "exact", "coupling": coupling}
    compare(tx, options, head_stops=True)


def test_authors_exact_is_their_step():
    """First update whole; then k of r directions, and a head that only its moments move."""
    params, base, x, y = to_jax(problem())
    for version in ("v1", "v2"):
        tx = authors_exact(1e-3, rank=RANK, k=1, version=version, b1=0.0)
        state, shared = tx.init(params), []
        for step in range(12):
            gradients = jax.grad(jax_loss)(params, base, x, y)
            updates, state = tx.update(gradients, state, params)
            a = np.any(np.asarray(updates["encoder"]["lora_a"]) != 0, axis=1)
            b = np.any(np.asarray(updates["encoder"]["lora_b"]) != 0, axis=2)
            np.testing.assert_array_equal(a.sum(1), RANK if step == 0 else 1)
            np.testing.assert_array_equal(b.sum(1), RANK if step == 0 else 1)
            shared.append((a == b).all())
            # With b1 = 0 the first moment is the gradient, so a gradient of 0 is no movement.
            assert bool(jnp.any(updates["head"]["kernel"] != 0)) == (step == 0)
        assert all(shared) == (version == "v1")


@pytest.mark.parametrize("placement", ["before", "after", "lazy"])
@pytest.mark.parametrize("clip", [1.0, slow(None)])
def test_keep_one_and_no_penalty_is_plain_lora_bit_for_bit(placement, clip):
    params, base, x, y = to_jax(problem())
    rate = optax.linear_schedule(RATE, 0, 40)
    ours = rm_lora(rate, penalty=0, keep=1, clip=clip, weight_decay=0.1, placement=placement)
    adamw = optax.adamw(rate, weight_decay=0.1)
    plain = adamw if clip is None else optax.chain(optax.clip_by_global_norm(clip), adamw)

    def run(tx):
        @jax.jit
        def step(params, state):
            gradients = jax.grad(jax_loss)(params, base, x, y)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        p, state = params, tx.init(params)
        for _ in range(25):
            p, state = step(p, state)
        return p

    for a, b in zip(jax.tree.leaves(run(ours)), jax.tree.leaves(run(plain)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_placements_differ_in_what_they_move():
    params, base, x, y = to_jax(problem())
    moved = {}
    for placement in ("before", "after", "lazy"):
        tx = rm_lora(1e-2, keep=0.5, placement=placement)
        state, hidden = tx.init(params), 0.0
        for step in range(6):
            mask = step_masks(state, params, 0.5)["encoder"]["lora_a"]
            gradients = jax.tree.map(lambda g, s=step: g * (1 + s),
                                     jax.grad(jax_loss)(params, base, x, y))  # fmt: skip
            updates, state = tx.update(gradients, state, params)
            hidden += float(jnp.sum(jnp.where(mask, 0, jnp.abs(updates["encoder"]["lora_a"]))))
        moved[placement] = hidden
    assert moved["before"] > 0.1 and moved["after"] == moved["lazy"] == 0


def test_it_learns_and_the_penalty_makes_factors_orthonormal():
    params, base, x, y = to_jax(problem())

    def run(**options):
        tx = rm_lora(optax.linear_schedule(5e-2, 0.0, 600), **options)

        def body(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(jax_loss)(params, base, x, y), state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, tx.init(params))
        (end, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, length=600))(carry)
        return float(jax_loss(end, base, x, y)), float(orthogonality(end))

    start = float(jax_loss(params, base, x, y))
    plain, masked = run(penalty=0, keep=1), run(penalty=1.0, keep=0.5)
    assert plain[0] < 0.6 * start and masked[0] < 0.6 * start
    assert masked[1] < 0.1 < plain[1]


@pytest.mark.parametrize("placement", ["before", "after", "lazy"])
def test_bfloat16_parameters_have_a_float32_state(placement):
    params = to_jax(problem()[0], jnp.bfloat16)
    tx = rm_lora(1e-2, placement=placement)
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(params, state, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    for tree in (state, new_state):
        floats = {x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}
        assert floats == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("placement", ["before", "after", "lazy"])
def test_never_nan_at_orthonormal_factors_or_zero_b(placement):
    params = {"lora_a": jnp.eye(5, 3), "lora_b": jnp.zeros((3, 4))}
    zeros = optax.tree.zeros_like(params)
    for start in (params, {**params, "lora_b": jnp.eye(3, 4)}):
        tx = rm_lora(1e-2, penalty=0.5, placement=placement, rescale=True)
        state = tx.init(start)
        for _ in range(3):
            updates, state = tx.update(zeros, state, start)
            for leaf in jax.tree.leaves(updates):
                np.testing.assert_array_equal(leaf, 0.0)


def test_multi_steps_and_vmap_over_seeds():
    params, base, x, y = to_jax(problem())
    gradients = jax.grad(jax_loss)(params, base, x, y)

    def kept(seed):
        tx = optax.MultiSteps(rm_lora(1e-2, seed=seed), 2)
        state = tx.init(params)
        for _ in range(4):
            _, state = tx.update(gradients, state, params)
        return kept_fraction(state)

    found = jax.jit(jax.vmap(kept))(jnp.arange(8))
    for seed in (0, 5):
        tx = rm_lora(1e-2, seed=seed)
        state = tx.init(params)
        for _ in range(2):
            _, state = tx.update(gradients, state, params)
        assert found[seed] == kept_fraction(state)
    assert len(set(found.tolist())) > 1


def test_bad_arguments_are_named():
    one_of = "placement='during' must be one of 'before', 'after', 'lazy'"
    with pytest.raises(ValueError, match=one_of):
        rm_lora(1e-3, placement="during")
    with pytest.raises(ValueError, match=r"draw='exact'.*unit='element'"):
        rm_lora(1e-3, keep=2, draw="exact", unit="element")
    with pytest.raises(ValueError, match="version='v3' must be one of 'v1', 'v2'"):
        authors_exact(1e-3, rank=4, k=2, version="v3")
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k={k} with rank=4"):
            authors_exact(1e-3, rank=4, k=k)
    params = to_jax(problem()[0])
    with pytest.raises(ValueError, match=r"rank=8\): 'encoder/lora_a' of shape .* has rank 4"):
        authors_exact(1e-3, rank=8, k=4).init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx = rm_lora(1e-3)
        tx.update(params, tx.init(params))
