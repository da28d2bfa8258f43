"""Kernels against references written from the rules in plain numpy, element by element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portax.weights import bits, kernels
from portax.weights.scale_shift import ScaleShift

settings.register_profile("portax", deadline=None, max_examples=30)
settings.load_profile("portax")

sizes = st.integers(1, 5)
shards = st.sampled_from([1, 2, 3, 4, 8])


def numbered(*shape, start=0):
    return np.arange(start, start + np.prod(shape), dtype=np.uint32).reshape(shape)


@st.composite
def attention(draw):
    """Heads, KV heads and shards that an engine accepts: more shards than KV heads, as many, or fewer."""
    kv, repeats, group = draw(sizes), draw(sizes), draw(st.integers(1, 3))
    tp = draw(st.sampled_from([kv * repeats, *[d for d in range(1, kv + 1) if kv % d == 0]]))
    heads = np.lcm(kv, tp) * group
    return int(heads), kv, tp, draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))


@given(attention(), sizes)
def test_pack_qkv_gives_each_shard_its_queries_and_the_kv_heads_they_use(shape, rows):
    heads, kv, tp, dim, gate = shape
    q = numbered(rows, heads, dim * gate)
    k, v = numbered(rows, kv, dim, start=10**6), numbered(rows, kv, dim, start=2 * 10**6)
    packed = kernels.pack_qkv(jnp.array(q), jnp.array(k), jnp.array(v), shards=tp, replicate_kv=True)
    columns = []
    for shard in range(tp):
        own = range(shard * heads // tp, (shard + 1) * heads // tp)
        used = [shard * kv // tp] if tp >= kv else range(shard * kv // tp, (shard + 1) * kv // tp)
        columns += [q[:, h] for h in own] + [k[:, h] for h in used] + [v[:, h] for h in used]
        for query in own:  # grouped-query attention: each query head finds its KV head on its own shard
            assert query * kv // heads in used
    np.testing.assert_array_equal(packed, np.concatenate(columns, axis=1))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), shards, sizes)
def test_pack_qkv_without_replication_cuts_every_projection_evenly(q_units, kv_units, dim, tp, rows):
    q, k, v = numbered(rows, q_units * tp, dim), numbered(rows, kv_units, tp * dim, start=10**6), None
    v = k + 10**6
    packed = kernels.pack_qkv(jnp.array(q), jnp.array(k), jnp.array(v), shards=tp, replicate_kv=False)
    flat = [x.reshape(rows, -1) for x in (q, k, v)]
    want = [x[:, s * x.shape[1] // tp : (s + 1) * x.shape[1] // tp] for s in range(tp) for x in flat]
    np.testing.assert_array_equal(packed, np.concatenate(want, axis=1))


@given(st.lists(sizes, min_size=1, max_size=4), shards, sizes)
def test_interleave_puts_each_shards_slices_side_by_side(widths, tp, rows):
    parts = [numbered(rows, width * tp, start=i * 10**6) for i, width in enumerate(widths)]
    merged = np.asarray(kernels.interleave([jnp.array(part) for part in parts], shards=tp))
    for shard, block in enumerate(np.split(merged, tp, axis=1)):
        at = 0
        for part, width in zip(parts, widths, strict=True):
            np.testing.assert_array_equal(block[:, at : at + width], part[:, shard * width : (shard + 1) * width])
            at += width


@given(sizes, sizes, sizes, shards, st.sampled_from([1, 4, 128]))
def test_fuse_w13_pads_every_chunk_of_every_shard(experts, rows, width, tp, multiple):
    gate, up = numbered(experts, rows, width * tp, start=1), numbered(experts, rows, width * tp, start=10**6)
    fused = np.asarray(kernels.fuse_w13(jnp.array(gate), jnp.array(up), shards=tp, multiple=multiple))
    padded = -(-width // multiple) * multiple
    assert fused.shape == (experts, rows, 2 * tp * padded)
    want = np.zeros_like(fused)
    for shard in range(tp):
        at, mine = 2 * shard * padded, slice(shard * width, (shard + 1) * width)
        want[:, :, at : at + width] = gate[:, :, mine]
        want[:, :, at + padded : at + padded + width] = up[:, :, mine]
    np.testing.assert_array_equal(fused, want)


@given(st.lists(sizes, min_size=1, max_size=4), st.data())
def test_unscan_reads_one_layer_wherever_the_scan_axes_are(shape, data):
    depth = data.draw(st.integers(1, len(shape)))
    first = data.draw(st.integers(0, len(shape) - depth))
    position = [data.draw(st.integers(0, shape[first + i] - 1)) for i in range(depth)]
    stack = numbered(*shape)
    layer = kernels.unscan(jnp.array(stack), jnp.array(position, jnp.int32), axes=tuple(range(first, first + depth)))
    np.testing.assert_array_equal(layer, stack[(slice(None),) * first + tuple(position)])


@given(sizes, sizes, st.sampled_from([np.uint16, np.uint32]))
def test_transpose(rows, columns, dtype):
    x = (numbered(rows, columns) * 40503).astype(dtype)  # both bytes in use
    np.testing.assert_array_equal(kernels.transpose(jnp.array(x)), x.T)


@given(sizes, sizes, st.integers(0, 1), st.sampled_from([1, 3, 64]))
def test_pad_axis_appends_zeros(rows, columns, axis, multiple):
    x = numbered(rows, columns, start=1)
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, -x.shape[axis] % multiple)
    np.testing.assert_array_equal(kernels.pad_axis(jnp.array(x), axis=axis, multiple=multiple), np.pad(x, widths))


def test_bfloat16_is_its_bits_and_back():
    every = np.arange(2**16, dtype=np.uint16)
    values = jnp.array(every).view(jnp.bfloat16)
    np.testing.assert_array_equal(bits.to_bits(values), every)
    np.testing.assert_array_equal(np.asarray(bits.from_bits(bits.to_bits(values))).view(np.uint16), every)
    np.testing.assert_array_equal(bits.pin_bits(bits.to_bits(values), jnp.array(False)), every)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_other_floats_travel_as_they_are(dtype):
    x = jnp.ones(3, dtype)
    assert bits.to_bits(x) is bits.from_bits(x) is bits.pin_bits(x, jnp.array(False)) is x


@given(st.lists(sizes, min_size=1, max_size=4), sizes, sizes)
def test_ungroup_collects_each_product_from_every_group(widths, groups, rows):
    grouped = numbered(rows, groups * sum(widths))
    parts = kernels.ungroup(jnp.array(grouped), groups=groups, widths=tuple(widths))
    for i, (part, width) in enumerate(zip(parts, widths, strict=True)):
        starts = [group * sum(widths) + sum(widths[:i]) for group in range(groups)]
        want = [grouped[:, start + column] for start in starts for column in range(width)]
        np.testing.assert_array_equal(part, np.stack(want, axis=1))


@given(sizes, sizes, sizes)
def test_deinterleave_puts_the_first_of_every_pair_in_front(rows, heads, pairs):
    x = numbered(rows, heads, 2 * pairs)
    halves = np.asarray(kernels.deinterleave(jnp.array(x)))
    for pair in range(pairs):
        np.testing.assert_array_equal(halves[..., pair], x[..., 2 * pair])
        np.testing.assert_array_equal(halves[..., pairs + pair], x[..., 2 * pair + 1])


@given(attention())
def test_biases_are_packed_as_the_columns_that_they_are_added_to(shape):
    heads, kv, tp, dim, gate = shape
    q, k, v = numbered(heads, dim * gate), numbered(kv, dim, start=10**6), numbered(kv, dim, start=2 * 10**6)
    packed = [
        kernels.pack_qkv(jnp.array(x), jnp.array(y), jnp.array(z), shards=tp, replicate_kv=True)
        for x, y, z in ((q, k, v), (q[None], k[None], v[None]))
    ]
    np.testing.assert_array_equal(packed[0], packed[1][0])


@pytest.mark.parametrize(
    ("scale_shift", "reference"),
    [
        (ScaleShift(minus=1.0), lambda x: x - np.float32(1)),
        (ScaleShift(times=11.3137), lambda x: x * np.float32(11.3137)),
        (ScaleShift(over=53.0660), lambda x: x * (np.float32(1) / np.float32(53.0660))),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_affine_values_are_computed_in_float32_and_rounded_once(scale_shift, reference, dtype):
    x = np.random.default_rng(0).standard_normal(4096).astype(np.float32).astype(dtype)
    got = bits.from_bits(jax.jit(scale_shift)(bits.to_bits(jnp.asarray(x))))
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got), reference(x.astype(np.float32)).astype(dtype))
