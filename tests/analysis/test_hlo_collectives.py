"""Bytes between devices: of programs whose traffic is known, and of arrays that are moved."""

import jax
import jax.numpy as jnp
import pytest
from conftest import mesh, tree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import portax
from portax.analysis.cost_model import least_bytes
from portax.analysis.hlo_collectives import received_bytes
from portax.sync.transfer import moved_bytes
from portax.trainer.logical_axes import partition

MOE = "qwen3-30b-a3b.scan"
SHAPE, NBYTES = (64, 64), 64 * 64 * 2


def held(spec, on):
    return jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16, sharding=NamedSharding(on, spec))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (P("a", "b"), P("a", "b"), 0),
        (P("a", "b"), P(None, "b"), 8 * NBYTES // 2 * 3 // 4),  # of its half, each has a quarter
        (P("a"), P(), 8 * NBYTES * 3 // 4),
        (P("a"), P(None, "a"), 8 * NBYTES // 4 * 3 // 4),
    ],
)
def test_what_a_program_receives(before, after, expected):
    on = mesh(a=4, b=2)
    program = jax.jit(lambda x: x, out_shardings=NamedSharding(on, after))
    raw = jax.ShapeDtypeStruct(SHAPE, jnp.uint16, sharding=NamedSharding(on, before))
    assert received_bytes(program.lower(raw).compile().as_text(), 8) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%a = u16[8,4]{1,0} all-gather(%x), replica_groups={{0,1},{2,3}}, dimensions={0}", 4 * 64 // 2),
        ("%a = u16[8,4]{1,0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}", 4 * 64 * 3 // 4),
        ("%a = (u16[2,4], u16[8,4]) all-gather-start(%x), replica_groups=[1,4]<=[4]", 4 * 64 * 3 // 4),
        ("%a = u16[8,4] all-to-all(%x), replica_groups=mesh['x'=2,'y'=2], ids=(0) {'y'}", 4 * 64 // 2),
        ("%a = u16[8,4] all-to-all(%x), replica_groups=mesh['x'=1,'y'=4] {'y':(2)2}", 4 * 64 // 2),
        ("%a = f32[8] all-reduce(%x), replica_groups={}, to_apply=%sum", 4 * 32 * 2 * 3 // 4),
        ("%a = f32[8] reduce-scatter(%x), replica_groups=[2,2]<=[4], to_apply=%sum", 4 * 32),
        ("%a = u8[8] collective-permute(%x), source_target_pairs={{0,0},{1,2},{2,1}}", 8 * 2),
        ("%a = (u8[8], u8[8], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}", 8 * 2),
        ("%a = u16[8,4]{1,0} all-gather-done(%b)", 0),
        ("%a = u16[8,4]{1,0} all-gather(%x), replica_groups=written otherwise", None),
    ],
)
def test_every_spelling_of_a_collective(line, expected):
    assert received_bytes(f"HloModule m\n  {line}\n", 4) == expected


def test_what_devices_receive_when_an_array_is_moved():
    low, high = mesh(a=4), jax.sharding.Mesh(jax.devices()[4:8], ("a",))
    source = NamedSharding(low, P("a"))
    assert moved_bytes(held(P("a"), low), source) == 0
    assert moved_bytes(held(P("a"), high), source) == NBYTES
    assert moved_bytes(held(P(), high), source) == 4 * NBYTES
    assert moved_bytes(held(P(), high), None) == 4 * NBYTES
    shifted = jax.sharding.Mesh(jax.devices()[:2], ("a",))
    assert moved_bytes(held(P("a"), shifted), source) == NBYTES  # halves: none of them was there


@pytest.mark.parametrize(
    ("dtype", "trainer", "engine", "options", "most"),
    [
        (jnp.float32, {"fsdp": 8}, {"data": 2, "model": 4}, {}, 1.1),
        (jnp.bfloat16, {"fsdp": 2, "expert": 4}, {"data": 2, "model": 4}, {"moe_backend": "gmm_ep"}, 1.1),
        (jnp.bfloat16, {"fsdp": 4, "tensor": 2}, {"data": 1, "model": 8}, {}, 1.15),  # KV heads are cut between devices
    ],
)
def test_a_layer_moves_little_more_than_it_must(dtype, trainer, engine, options, most):
    """Neither the pads of w13, nor its copies, nor float32 that becomes bfloat16, nor anything twice."""
    config = dict(tree(MOE).config, num_decoder_layers=1, base_num_decoder_layers=1)
    layout = portax.layouts.TpuInference(version="0.32", tp=engine["model"], **options)
    converter = portax.converter_for(config, layout=layout)
    shapes = converter.expected_tree(dtype=dtype, partition=partition(mesh(**trainer)))
    conversion = converter.conversion(shapes)
    _, job = conversion.calls(None)
    targets = {entry.name: NamedSharding(mesh(**engine), entry.spec) for entry in job.entries}
    compiled = conversion.compile(job, tuple(targets.values()), donating=False)
    received = received_bytes(compiled.as_text(), 8)
    assert 0 < received <= most * least_bytes(converter, shapes, targets)


def test_more_elements_than_can_be_numbered():
    converter = portax.converter_for(tree(MOE).config, layout=portax.layouts.Canonical())
    with pytest.raises(ValueError, match=r"16777217 elements; numbers are exact below 2\*\*24"):
        least_bytes(converter, {"embedding": jax.ShapeDtypeStruct((2**12, 2**12), jnp.float32)}, {})
