"""What a step does: collectives counted in the compiled program, products in the trace."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from rmlora_jax.aot.counts import Collective, collectives, flops, total_bytes
from rmlora_jax.models import ViT, ViTConfig
from rmlora_jax.models.config import ACTIVATIONS
from rmlora_jax.parallel.mesh import AXIS, all_devices, shard
from rmlora_jax.train import setup
from rmlora_jax.train.config import resolve

FLOAT, SCALARS = 4, 2  # bytes; the loss and the accuracy are reduced with the gradients


def found_in(fn, *shape):
    """The collectives of a function of one device, each with an array (*shape,) of its own."""
    split = PartitionSpec(AXIS)
    mesh = all_devices().mesh
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    whole = jax.ShapeDtypeStruct((8 * shape[0], *shape[1:]), jnp.float32)
    return collectives(jax.jit(mapped).lower(whole).compile().as_text())


def loop(body, turns):
    return lambda x: jax.lax.scan(lambda c, _: (body(c), None), x, None, length=turns)[0]


def total(x):
    return 0.1 * jax.lax.psum(jnp.sin(x), AXIS)


@pytest.mark.parametrize(
    ("fn", "shape", "kind", "size"),
    [
        (total, (6, 2), "all-reduce", 12),
        (lambda x: jax.lax.all_gather(x, AXIS, tiled=True), (6, 2), "all-gather", 8 * 12),
        (lambda x: jax.lax.psum_scatter(x, AXIS, tiled=True), (16, 2), "reduce-scatter", 4),
        (lambda x: jax.lax.ppermute(x, AXIS, [(i, (i + 1) % 8) for i in range(8)]), (6, 2),
         "collective-permute", 12),
        (lambda x: jax.lax.all_to_all(x, AXIS, 0, 0, tiled=True), (8, 2), "all-to-all", 16),
    ],
)
def test_each_kind_counts_once_and_by_its_result(fn, shape, kind, size):
    assert found_in(fn, *shape) == [Collective(kind, FLOAT * size, 1)]


def test_a_loop_counts_as_often_as_it_turns():
    assert found_in(loop(total, 5), 3) == [Collective("all-reduce", 12, 5)]
    nested = found_in(loop(loop(total, 3), 4), 3)
    assert nested == [Collective("all-reduce", 12, 12)]
    both = found_in(lambda x: total(loop(total, 5)(x)), 3)
    assert sorted(c.times for c in both) == [1, 5]
    assert total_bytes(both) == 12 * 6


def test_a_loop_without_a_known_end_is_not_taken_for_one_turn():
    def until_small(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1e-3, total, x)

    found = found_in(until_small, 3)
    assert [c.times for c in found] == [None]
    assert total_bytes(found) is None


def test_both_branches_count():
    def either(x):
        return jax.lax.cond(x.sum() > 0, total, lambda x: jax.lax.pmax(x, AXIS), x)

    assert found_in(either, 3) == 2 * [Collective("all-reduce", 12, 1)]


# As compilers for accelerators write it: in pairs, in fusions, with tiled layouts and comments.
ACCELERATOR = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%scatter (p: f32[8,128]) -> f32[1,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%p), channel_id=3, to_apply=%add
  ROOT %slice = f32[1,128]{1,0:T(1,128)} slice(%all-reduce.1), slice={[0:1], [0:128]}
}

%body (c: (s32[], bf16[4,2])) -> (s32[], bf16[4,2]) {
  %c = (s32[], bf16[4,2]{1,0}) parameter(0)
  %x = bf16[4,2]{1,0} get-tuple-element(%c), index=1
  %start = ((bf16[4,2]{1,0}), bf16[32,2]{1,0:T(8,128)(2,1)}) all-gather-start(%x), channel_id=1
  %done = bf16[32,2]{1,0} all-gather-done(%start)
}

%condition (c: (s32[], bf16[4,2])) -> pred[] {
  %c = (s32[], bf16[4,2]{1,0}) parameter(0)
}

ENTRY %main.9_spmd (x: f32[8,128], y: bf16[3]) -> f32[] {
  %x = f32[8,128]{1,0} parameter(0), metadata={op_name="all-reduce(x)"}
  %w = (s32[], bf16[4,2]{1,0}) while(%t), condition=%condition, body=%body, backend_config={\
"known_trip_count":{"n":"7"},"x":"y"}
  %f = f32[1,128]{1,0} fusion(%x), kind=kCustom, calls=%scatter
  %s = (f32[10]{0:T(128)S(1)}, /*index=1*/bf16[3]{0}) all-reduce-start(%u, %y), to_apply=%add
  %d = (f32[10]{0}, bf16[3]{0}) all-reduce-done(%s)
  %p = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%v), channel_id=5
  ROOT %q = f32[5]{0} collective-permute-done(%p)
}
"""


def test_pairs_fusions_and_layouts():
    assert collectives(ACCELERATOR) == [
        Collective("all-gather", 2 * 64, 7),
        Collective("all-reduce", 4 * 1024, 1),
        Collective("all-reduce", 40 + 6, 1),
        Collective("collective-permute", 20, 1),
    ]
    with pytest.raises(ValueError, match="as_text"):
        collectives("%add (a: f32[]) -> f32[] {\n}")


def step_collectives(config, parallel="mesh"):
    devices = all_devices(parallel)
    assert devices.count == 8
    job = setup.build(resolve(config), devices)
    batch = shard(next(job.feed.train(0)), devices)
    program = job.train_step.lower(job.state, job.constants, batch).compile()
    return collectives(program.as_text()), job


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "changes"),
    [
        ("mesh", {"method": "rm_lora"}),
        ("mesh", {"method": "rm_lora", "accumulate": 2, "model.remat": "full"}),
        ("mesh", {"method": "full"}),
        ("pmap", {"method": "rm_lora"}),
    ],
    ids=str,
)
def test_a_step_reduces_its_gradients_once(config, parallel, changes):
    config.update_from_flattened_dict(changes)
    found, job = step_collectives(config, parallel)
    assert {c.kind for c in found} == {"all-reduce"}  # none gathers the replicated base
    assert all(c.times == 1 for c in found)  # none in a loop over layers or micro-batches
    assert len(found) <= 2
    assert total_bytes(found) == FLOAT * (job.base.trainable_parameters + SCALARS)


@pytest.mark.slow
def test_a_reduction_in_the_loop_would_be_seen(config, monkeypatch):
    """The same step with the reductions that jax would insert where a value is used."""

    def inserted(fn, devices, *, donate=False):
        replicated, split = PartitionSpec(), PartitionSpec(AXIS)
        mapped = jax.shard_map(fn, mesh=devices.mesh, in_specs=(replicated, replicated, split),
                               out_specs=replicated)
        return jax.jit(mapped)

    monkeypatch.setattr(setup, "spread", inserted)
    # jax 0.12 cannot type erf under such a shard_map; its approximation is tanh.
    monkeypatch.setitem(ACTIVATIONS, "gelu", jax.nn.gelu)
    found, _ = step_collectives(config)
    layers = 2
    assert max(c.times for c in found) == layers
    assert sum(c.times for c in found) > 2


# Operations of products


def of(fn, *shapes):
    return flops(jax.jit(fn).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)))


def test_products_and_convolutions():
    assert of(lambda a, b: a @ b, (5, 7), (7, 3)) == 2 * 5 * 7 * 3
    assert of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 5, 7), (4, 7, 3)) == 8 * 105
    conv = functools.partial(jax.lax.conv_general_dilated, window_strides=(2, 2), padding="VALID",
                             dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert of(conv, (1, 8, 8, 6), (2, 2, 6, 10)) == 2 * 16 * 10 * (2 * 2 * 6)
    grouped = functools.partial(conv, feature_group_count=2)
    assert of(grouped, (1, 8, 8, 6), (2, 2, 3, 10)) == 2 * 16 * 10 * (2 * 2 * 3)


def test_what_is_inside_counts_as_often_as_it_runs():
    def square(x):
        return x @ x

    def twice(x):
        return jax.lax.scan(lambda c, _: (square(c), None), x, None, length=2)[0]

    one = 2 * 3**3
    assert of(lambda x: jax.lax.fori_loop(0, 3, lambda i, c: twice(c), x), (3, 3)) == 6 * one
    assert of(lambda x: jax.lax.cond(x[0, 0] > 0, twice, square, x), (3, 3)) == 2 * one
    assert of(jax.jit(square), (3, 3)) == one
    ruled = jax.custom_jvp(square)
    ruled.defjvp(lambda x, t: (square(*x), square(*t)))
    assert of(ruled, (3, 3)) == one
    # x @ x has one product forward and two backward; recomputed, one more.
    cost = lambda f: of(jax.grad(lambda x: f(f(x)).sum()), (3, 3))  # noqa: E731
    assert cost(jax.checkpoint(square)) == cost(square) == 6 * one
    assert cost(lambda x: jax.checkpoint(lambda y: square(jnp.sin(square(y))))(x)) > cost(
        lambda x: square(jnp.sin(square(x)))
    )


@pytest.mark.parametrize("unroll", [1, 3])
def test_a_model_against_xla_unrolled(unroll):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(num_hidden_layers=3, image_size=32, patch_size=8, **sizes)
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

    def step(params, x, unroll):
        return jax.grad(lambda p: ViT(config, 10, unroll=unroll).apply({"params": p}, x).sum())(
            params
        )

    params = jax.eval_shape(ViT(config, 10).init, jax.random.key(0), image)["params"]
    ours = flops(jax.jit(functools.partial(step, unroll=unroll)).trace(params, image))
    whole = jax.jit(functools.partial(step, unroll=3)).lower(params, image)
    theirs = whole.cost_analysis()["flops"]  # of norms and the like, too
    assert 0.8 * theirs < ours < theirs
