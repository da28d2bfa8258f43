"""Conversion and sync from wherever a trainer calls: inside its mesh, its switches, its host memory."""

import contextlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import filled, mesh, sharded, tree
from engines import golden_of, grid, scrambled, wrong
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import portax
from portax.testing.golden import compare

NAMES = ["qwen3-8b.scan", "qwen3-30b-a3b.scan", "gemma4-26b.scan"]


def explicit(count, *shape):
    return jax.make_mesh(shape, ("fsdp", "tensor"), devices=jax.devices()[:count], axis_types=(AxisType.Explicit,) * 2)


CONTEXTS = {
    "set_mesh of other devices": lambda: jax.set_mesh(Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))),
    "set_mesh, explicit": lambda: jax.set_mesh(explicit(8, 4, 2)),
    "set_mesh of four, explicit": lambda: jax.set_mesh(explicit(4, 2, 2)),
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion raises": lambda: jax.numpy_rank_promotion("raise"),
    "another default device": lambda: jax.default_device(jax.devices()[7]),
    "no transfers": lambda: jax.transfer_guard("disallow"),
}


def params_of(name, dtype, on):
    return sharded({path: leaf.astype(dtype) for path, leaf in filled(name).items()}, on)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("name", "dtype"), [*((n, np.float32) for n in NAMES), (NAMES[1], ml_dtypes.bfloat16)])
def test_a_conversion_in_any_context_is_exact(name, dtype, context):
    golden = golden_of(name, 2)
    params = params_of(name, dtype, mesh(fsdp=4, tensor=2))
    converter = portax.converter_for(tree(name).config, layout=golden.layout, mesh=mesh(data=4, model=2))
    with CONTEXTS[context]():
        weights = converter.convert(params)
    assert [row.difference for row in compare(weights, golden) if row.difference] == []


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("disjoint", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [(NAMES[0], np.float32), (NAMES[1], ml_dtypes.bfloat16)])
def test_a_sync_in_any_context_is_exact(name, dtype, disjoint, context):
    golden = golden_of(name, 2)
    state = scrambled(name, 2, grid(4, 4, data=2, model=2) if disjoint else grid(0, 8, data=4, model=2))
    params = params_of(name, dtype, grid(0, 4, fsdp=2, tensor=2) if disjoint else grid(0, 8, fsdp=4, tensor=2))
    converter = portax.converter_for(tree(name).config, layout=golden.layout)
    with CONTEXTS[context]():
        sync = portax.WeightSync(converter, state)
        sync(params)
        assert sync.verify(params).different == ()
    assert wrong(state, golden) == []


@pytest.mark.parametrize("name", NAMES)
def test_arrays_with_explicit_axes_convert_as_automatic_ones(name):
    golden = golden_of(name, 2)
    params = params_of(name, np.float32, explicit(8, 4, 2))
    on = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    converter = portax.converter_for(tree(name).config, layout=golden.layout, mesh=on)
    assert [row.difference for row in compare(converter.convert(params), golden) if row.difference] == []


KINDS = ["pinned_host", "unpinned_host"]


def on_host(params, kind, some=False):
    def moved(path, leaf):
        keep = some and hash(path) % 2
        return leaf if keep else jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))

    return {path: moved(path, leaf) for path, leaf in params.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", NAMES)
def test_parameters_in_host_memory_are_read_to_the_devices(name, devices, some, kind):
    golden = golden_of(name, 2)
    trainer = mesh(fsdp=4, tensor=2) if devices == 8 else mesh(fsdp=1)
    params = on_host(params_of(name, np.float32, trainer), kind, some)
    engine = mesh(data=4, model=2) if devices == 8 else None
    weights = portax.converter_for(tree(name).config, layout=golden.layout, mesh=engine).convert(params)
    assert {leaf.sharding.memory_kind for leaf in weights.values()} <= {"device", None}
    assert [row.difference for row in compare(weights, golden) if row.difference and "spec" not in row.difference] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_sync_of_parameters_in_host_memory(kind):
    name = NAMES[1]
    golden = golden_of(name, 2)
    state = scrambled(name, 2, grid(0, 8, data=4, model=2))
    params = on_host(params_of(name, np.float32, grid(0, 8, fsdp=4, tensor=2)), kind)
    sync = portax.WeightSync(portax.converter_for(tree(name).config, layout=golden.layout), state)
    sync(params)
    assert wrong(state, golden) == []


def test_layers_whose_scan_axis_is_cut_are_read_from_host_memory():
    name = NAMES[0]
    on = mesh(fsdp=2)
    params = {}
    for path, leaf in filled(name).items():
        cut = PartitionSpec(None, "fsdp") if "/layers/" in path and leaf.shape[1] % 2 == 0 else PartitionSpec()
        params[path] = jax.device_put(leaf, NamedSharding(on, cut, memory_kind="pinned_host"))
    golden = golden_of(name, 2)
    weights = portax.converter_for(tree(name).config, layout=golden.layout, mesh=mesh(model=2)).convert(params)
    assert [row.difference for row in compare(weights, golden) if row.difference] == []


def test_two_streams_of_one_converter_do_not_disturb_each_other():
    name = NAMES[1]
    golden = golden_of(name, 2)
    converter = portax.converter_for(tree(name).config, layout=golden.layout)
    twice = [converter.stream(filled(name), bucket_bytes=2**16) for _ in range(2)]
    found = [{}, {}]
    for buckets in zip(*twice, strict=True):
        for into, bucket in zip(found, buckets, strict=True):
            into |= bucket
    for weights in found:
        assert not any(row.difference for row in compare(weights, golden) if "spec" not in row.difference)


def test_nothing_of_the_callers_context_is_changed_by_a_stream():
    converter = portax.converter_for(tree(NAMES[0]).config, layout=golden_of(NAMES[0], 2).layout)
    on = Mesh(np.array(jax.devices()[:4]), ("a",))
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(on))
        for _ in converter.stream(filled(NAMES[0]), bucket_bytes=2**20):
            assert jax.sharding.get_mesh() == on
            assert jnp.zeros(4).shape == (4,)
