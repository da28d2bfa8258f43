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
from portax.testing.doctor import examine
from portax.testing.golden import compare

NAMES = ["qwen3-8b.scan", "qwen3-30b-a3b.scan", "gemma4-26b.scan"]
FLOAT32, BFLOAT16 = np.float32, ml_dtypes.bfloat16
CASES = [(name, *case) for name in NAMES for case in ((FLOAT32, False), (BFLOAT16, True))]
CASES += [(NAMES[1], FLOAT32, True), (NAMES[1], BFLOAT16, False)]


def explicit(count, *shape):
    return jax.make_mesh(shape, ("fsdp", "tensor"), devices=jax.devices()[:count], axis_types=(AxisType.Explicit,) * 2)


MESHES = {
    "set_mesh of other devices": lambda: jax.set_mesh(Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))),
    "set_mesh, explicit": lambda: jax.set_mesh(explicit(8, 4, 2)),
    "set_mesh of four, explicit": lambda: jax.set_mesh(explicit(4, 2, 2)),
    "disable_jit": jax.disable_jit,
}
SWITCHES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "tracers that leak are looked for": lambda: jax.check_tracer_leaks(True),
    "no tracing": lambda: jax.no_tracing(True),
    "x64": lambda: jax.enable_x64(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion raises": lambda: jax.numpy_rank_promotion("raise"),
    "another default device": lambda: jax.default_device(jax.devices()[7]),
    "no transfers": lambda: jax.transfer_guard("disallow"),
    "no transfers, not even explicit ones": lambda: jax.transfer_guard("disallow_explicit"),
}
CONTEXTS = MESHES | SWITCHES


def in_any_context():
    """Every case inside every mesh and without `jit`, and one of them, of dtypes and devices both, with every switch."""
    one = (NAMES[1], BFLOAT16, True)
    where = [*((case, context) for context in MESHES for case in CASES), *((one, context) for context in SWITCHES)]
    cases = [
        pytest.param(*case, context, id=f"{case[0]}-{np.dtype(case[1])}-{'two meshes' * case[2] or 'one'}-{context}")
        for case, context in where
    ]
    return pytest.mark.parametrize(("name", "dtype", "disjoint", "context"), cases)


def params_of(name, dtype, on):
    return sharded({path: leaf.astype(dtype) for path, leaf in filled(name).items()}, on)


def two_sides(disjoint):
    """The trainer's mesh and the engine's: of the same devices, or of others."""
    if disjoint:
        return grid(0, 4, fsdp=2, tensor=2), grid(4, 4, data=2, model=2)
    return grid(0, 8, fsdp=4, tensor=2), grid(0, 8, data=4, model=2)


@in_any_context()
def test_a_conversion_in_any_context_is_exact(name, dtype, disjoint, context):
    golden = golden_of(name, 2)
    trainer, engine = two_sides(disjoint)
    params = params_of(name, dtype, trainer)
    converter = portax.converter_for(tree(name).config, layout=golden.layout, mesh=engine)
    with CONTEXTS[context]():
        weights = converter.convert(params)
    assert [row.difference for row in compare(weights, golden) if row.difference] == []


@in_any_context()
def test_a_sync_in_any_context_is_exact(name, dtype, disjoint, context):
    golden = golden_of(name, 2)
    trainer, engine = two_sides(disjoint)
    state, params = scrambled(name, 2, engine), params_of(name, dtype, trainer)
    converter = portax.converter_for(tree(name).config, layout=golden.layout)
    with CONTEXTS[context]():
        sync = portax.WeightSync(converter, state)
        sync(params)
        assert sync.verify(params).different == ()
    assert wrong(state, golden) == []


@pytest.mark.parametrize("context", CONTEXTS)
def test_every_other_way_in_is_exact_in_any_context(context, tmp_path):
    golden, engine = golden_of(NAMES[0], 2), grid(4, 4, data=2, model=2)
    converter = portax.converter_for(tree(NAMES[0]).config, layout=golden.layout)
    hub = portax.converter_for(tree(NAMES[0]).config, layout=portax.layouts.HuggingFace())
    on_the_host, params = filled(NAMES[0]), params_of(NAMES[0], FLOAT32, grid(0, 4, fsdp=2, tensor=2))
    state = scrambled(NAMES[0], 2, engine)
    with CONTEXTS[context]():
        assert [check for check in examine(converter, state, params) if not check.passed] == []
        assert portax.WeightSync(converter, state, verify=True, atomic=True)(on_the_host).verification.different == ()
        staging = portax.Staging(converter, engine)
        staging.stage(on_the_host)
        staged = [staging.stage(params), converter.on(engine).convert(on_the_host)]
        portax.export(hub, params, tmp_path / "hub")
        written = portax.open_checkpoint(tmp_path / "hub")
        assert portax.diff(hub.convert(params), written).equal
        portax.import_checkpoint(hub, written, tmp_path / "maxtext")
        back = portax.open_checkpoint(tmp_path / "maxtext")
        assert portax.diff(params, back).equal
        staged.append(converter.on(engine).convert(back))
    for weights in (*staged, {name: state[name] for name in golden.leaves}):
        assert [row.difference for row in compare(weights, golden) if row.difference] == []


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
@pytest.mark.parametrize(("name", "dtype"), [(NAMES[0], BFLOAT16), (NAMES[1], FLOAT32), (NAMES[2], BFLOAT16)])
def test_parameters_in_host_memory_are_read_to_the_devices(name, dtype, devices, some, kind):
    golden = golden_of(name, 2)
    trainer = mesh(fsdp=4, tensor=2) if devices == 8 else mesh(fsdp=1)
    params = on_host(params_of(name, dtype, trainer), kind, some)
    engine = mesh(data=4, model=2) if devices == 8 else None
    weights = portax.converter_for(tree(name).config, layout=golden.layout, mesh=engine).convert(params)
    assert {leaf.sharding.memory_kind for leaf in weights.values()} <= {"device", None}
    assert [row.difference for row in compare(weights, golden) if row.difference and "spec" not in row.difference] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "dtype", "disjoint"), CASES)
def test_a_sync_of_parameters_in_host_memory(name, dtype, disjoint, kind):
    golden = golden_of(name, 2)
    trainer, engine = two_sides(disjoint)
    state, params = scrambled(name, 2, engine), on_host(params_of(name, dtype, trainer), kind)
    with jax.transfer_guard("disallow_explicit"):
        portax.WeightSync(portax.converter_for(tree(name).config, layout=golden.layout), state)(params)
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
