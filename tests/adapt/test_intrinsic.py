"""Intrinsic dimension against the singular value decomposition of the full matrices, in numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmlora_jax.adapt.intrinsic import intrinsic_dimension, trajectory_dimension
from rmlora_jax.adapt.lora import LoRA

LORA = LoRA(rank=4, alpha=6)


def layer(seed, stack=(), size_in=12, size_out=9, rank=4, shape=None, b_scale=1.0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(*stack, size_in, rank)).astype(np.float32)
    b = (b_scale * rng.normal(size=(*stack, rank, size_out))).astype(np.float32)
    kernel = np.zeros(shape or (*stack, size_in, size_out), np.float32)
    return {"kernel": kernel, "lora_a": a, "lora_b": b}


def figures(s, rtol=1e-3):
    """The definitions, of singular values in float64."""
    p = s / s.sum()
    p = p[p > 0]
    return {
        "numerical_rank": np.sum(s > rtol * s.max()),
        "stable_rank": np.sum(s**2) / s.max() ** 2,
        "effective_rank": np.exp(-np.sum(p * np.log(p))),
        "participation_ratio": np.sum(s**2) ** 2 / np.sum(s**4),
    }


def check(found, matrix, count, rtol=1e-3):
    s = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)[:count]
    np.testing.assert_allclose(found["singular_values"][: len(s)], s, rtol=1e-4, atol=1e-5)
    for name, value in figures(s, rtol).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


def test_it_equals_the_full_svd():
    params = {"fc": layer(0), "attn": {"out": layer(1, shape=(3, 4, 9))}}
    found = intrinsic_dimension(params, LORA)
    assert sorted(found) == ["attn/out", "fc"]
    for path, leaves in (("fc", params["fc"]), ("attn/out", params["attn"]["out"])):
        assert found[path]["singular_values"].shape == (4,)
        check(found[path], 1.5 * leaves["lora_a"] @ leaves["lora_b"], 4)
        assert all(value.dtype == jnp.float32 for value in found[path].values())


def test_stacked_layers_have_a_leading_axis_and_jit_agrees():
    params = {"layers": {"fc": layer(2, stack=(3,))}}
    for function in (intrinsic_dimension, jax.jit(intrinsic_dimension, static_argnums=1)):
        found = function(params, LORA)["layers/fc"]
        assert found["singular_values"].shape == (3, 4)
        assert found["stable_rank"].shape == (3,)
        for i in range(3):
            leaves = params["layers"]["fc"]
            one = {name: value[i] for name, value in found.items()}
            check(one, 1.5 * leaves["lora_a"][i] @ leaves["lora_b"][i], 4)


def test_zero_update_gives_zeros_and_tiny_or_huge_ones_do_not_overflow():
    found = intrinsic_dimension({"fc": layer(3, b_scale=0.0)}, LORA)["fc"]
    assert all(np.all(np.asarray(value) == 0) for value in found.values())
    plain = intrinsic_dimension({"fc": layer(3)}, LORA)["fc"]
    for scale in (1e-15, 1e15):
        scaled = intrinsic_dimension({"fc": layer(3, b_scale=scale)}, LORA)["fc"]
        for name in ("numerical_rank", "stable_rank", "effective_rank", "participation_ratio"):
            np.testing.assert_allclose(scaled[name], plain[name], rtol=1e-4)


def test_numerical_rank_follows_the_tolerance():
    leaves = layer(4)
    leaves["lora_a"] = np.eye(12, 4, dtype=np.float32)
    leaves["lora_b"] = np.diag([1.0, 1e-1, 1e-3, 1e-5]).astype(np.float32) @ np.eye(4, 9)
    for rtol, rank in ((1e-2, 2), (1e-4, 3), (1e-6, 4)):
        found = intrinsic_dimension({"fc": leaves}, LORA, rtol=rtol)["fc"]
        assert found["numerical_rank"] == rank
        assert rank == np.linalg.matrix_rank(leaves["lora_a"] @ leaves["lora_b"], rtol=rtol)


def test_a_weight_narrower_than_the_rank():
    params = {"fc": layer(5, size_in=3)}
    found = intrinsic_dimension(params, LORA)["fc"]
    assert found["singular_values"].shape == (4,)
    assert found["singular_values"][3] == 0
    check(found, 1.5 * params["fc"]["lora_a"] @ params["fc"]["lora_b"], 3)


def walk(steps, stack=(), step=1.0):
    """Snapshots of one module whose factors move at random."""
    start, out = layer(10, stack=stack), []
    for k in range(steps):
        move = layer(11 + k, stack=stack)
        out.append({"fc": {n: start[n] + step * k * move[n] for n in start}})
    return out


def increments(snapshots, layer_index=...):
    deltas = [
        1.5 * s["fc"]["lora_a"][layer_index].astype(np.float64) @ s["fc"]["lora_b"][layer_index]
        for s in snapshots
    ]
    return [after - before for before, after in itertools.pairwise(deltas)]


@pytest.mark.parametrize("side", ["out", "in"])
def test_trajectory_equals_the_svd_of_the_stacked_increments(side):
    snapshots = walk(3)
    found = trajectory_dimension(snapshots, LORA, side=side)["fc"]
    stacked = np.concatenate(increments(snapshots), axis=0 if side == "out" else 1)
    size = 9 if side == "out" else 12
    assert found["singular_values"].shape == (min(2 * 4 * 2, size),)
    check(found, stacked, size)
    assert found["numerical_rank"] > 4  # what one update can never exceed


def test_trajectory_of_small_steps_keeps_its_digits():
    snapshots = walk(3, step=1e-4)
    found = trajectory_dimension(snapshots, LORA)["fc"]
    s = np.linalg.svd(np.concatenate(increments(snapshots)), compute_uv=False)
    np.testing.assert_allclose(found["singular_values"][:8], s[:8], rtol=2e-3, atol=1e-7)


def test_trajectory_of_stacked_layers():
    snapshots = walk(3, stack=(2,))
    found = trajectory_dimension(snapshots, LORA)["fc"]
    for i in range(2):
        one = {name: value[i] for name, value in found.items()}
        check(one, np.concatenate(increments(snapshots, i)), 9)


def test_trajectory_that_stands_still_is_zero():
    found = trajectory_dimension(walk(1) * 3, LORA)["fc"]
    assert all(np.all(np.asarray(value) == 0) for value in found.values())


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="two or more snapshots, not 1"):
        trajectory_dimension(walk(1), LORA)
    with pytest.raises(ValueError, match="side is 'left'"):
        trajectory_dimension(walk(2), LORA, side="left")
    with pytest.raises(ValueError, match="different modules"):
        trajectory_dimension([walk(1)[0], {"other": layer(0)}], LORA)
    with pytest.raises(ValueError, match="no factors"):
        intrinsic_dimension({"fc": {"kernel": np.zeros((2, 2))}}, LORA)
