"""Values that cannot be quantised stop a conversion and a sync, which names leaf and channels."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, engine_mesh, sharded, tree
from engines import grid, noise, wrong
from jax.sharding import NamedSharding, PartitionSpec

import portax
from portax.layouts import Quantization, TpuInference
from portax.testing.golden import Golden

DENSE, MOE = "qwen3-8b.scan", "qwen3-30b-a3b-fp8.scan"
FILES = {DENSE: "quantised-0.32.0.tp2.bf16-fp8.json", MOE: "quantised-0.32.0.tp4.block-fp8.json"}
WO = "base/decoder/layers/mlp/wo/kernel"  # [in, layers, out]
SCALE = "vllm_model.model.layers.2.mlp.down_proj.weight_scale"
KINDS = {"NaN": np.nan, "infinity": -np.inf, "a scale that would be denormal": 2.0**-120}


@functools.cache
def golden_of(name):
    return Golden.load(GOLDEN / name / FILES[name])


@functools.cache
def values(name):
    return tree(name).fill("spread")


@functools.cache
def converter_of(name):
    return portax.converter_for(tree(name).config, layout=golden_of(name).layout)


def poisoned(name, path, at, value):
    params = dict(values(name))
    leaf = params[path].copy()
    if abs(value) < 1:  # a whole channel is so small
        leaf[(slice(None), *at[1:])] = 0
    leaf[at] = value
    return params | {path: leaf}


def engine(name):
    """A live engine's state with random bits in every leaf."""
    rows = json.loads((GOLDEN / name / FILES[name]).read_text())["leaves"]
    on = engine_mesh(golden_of(name).layout.tp)
    return noise(
        {
            path: jax.ShapeDtypeStruct(
                tuple(row["shape"]), jnp.dtype(row["dtype"]), sharding=NamedSharding(on, PartitionSpec(*row["spec"]))
            )
            for path, row in rows.items()
        },
        0,
    )


def told(what):
    return (
        rf"2\.mlp\.down_proj\.weight_scale: the values of these channels cannot be quantised: \[7\]: {what}\. Expected"
    )


@pytest.mark.parametrize("what", KINDS)
def test_a_conversion_names_leaf_and_channel(what):
    with pytest.raises(portax.errors.QuantizationError, match=told(what)):
        converter_of(DENSE).convert(poisoned(DENSE, WO, (5, 2, 7), KINDS[what]))


@pytest.mark.parametrize("what", KINDS)
def test_a_stream_stops_before_the_bucket_that_would_hold_them(what):
    came = []
    stream = converter_of(DENSE).stream(poisoned(DENSE, WO, (5, 2, 7), KINDS[what]), bucket_bytes=2**16)
    with pytest.raises(portax.errors.QuantizationError, match=told(what)):
        came.extend(name for bucket in stream for name in bucket)
    assert came
    assert SCALE not in came


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_experts_of_a_block_checkpoint_are_named_too(value):
    path = "base/decoder/layers/moe_block/wo"
    params = poisoned(MOE, path, (3, 0, 5, 7), value)
    with pytest.raises(
        portax.errors.QuantizationError, match=r"layers\.0\.mlp\.experts\..*w2_weight_scale_inv: .*\[3, 0, 0, 0\]: "
    ):
        converter_of(MOE).convert(params)


@pytest.mark.parametrize("trainer", [(0, 8), (0, 4)], ids=["same devices", "fewer devices"])
@pytest.mark.parametrize("what", KINDS)
def test_a_sync_stops_and_the_engine_is_torn_until_the_next_one(what, trainer):
    state, on = engine(DENSE), grid(*trainer, fsdp=trainer[1])
    sync = portax.WeightSync(converter_of(DENSE), state, bucket_bytes=2**17)
    with pytest.raises(portax.errors.QuantizationError, match=told(what)):
        sync(sharded(poisoned(DENSE, WO, (5, 2, 7), KINDS[what]), on))
    assert SCALE in sync.torn.lost
    assert "cannot be quantised" in sync.torn.cause
    assert sync.version == 0
    sync(sharded(values(DENSE), on))
    assert (sync.torn, wrong(state, golden_of(DENSE))) == (None, [])


@pytest.mark.parametrize("what", KINDS)
def test_an_atomic_sync_keeps_the_old_weights(what):
    state, on = engine(DENSE), grid(0, 8, fsdp=8)
    sync = portax.WeightSync(converter_of(DENSE), state, atomic=True)
    sync(sharded(values(DENSE), on))
    before = dict(state)
    with pytest.raises(portax.errors.QuantizationError, match=told(what)):
        sync(sharded(poisoned(DENSE, WO, (5, 2, 7), KINDS[what]), on))
    assert all(state[name] is leaf for name, leaf in before.items())
    assert (sync.torn, sync.version) == (None, 1)


def test_many_channels_are_counted_and_not_listed():
    params = dict(values(DENSE)) | {WO: np.full_like(values(DENSE)[WO], np.nan)}
    with pytest.raises(portax.errors.QuantizationError, match=r"\[7\]: NaN and 120 more\. Expected"):
        converter_of(DENSE).convert(params)


def test_a_layout_may_hold_them_as_the_engine_does():
    told = Quantization(
        checkpoint="bf16",
        scale_form="xla_cpu",
        bf16_linear_requantize_patterns=("re:.*",),
        refuses_values=False,
    )
    converter = portax.converter_for(tree(DENSE).config, layout=TpuInference(version="0.32", tp=2, quantization=told))
    found = [
        float(converter.convert(poisoned(DENSE, WO, (5, 2, 7), value))[SCALE][7])
        for value in (2.0**-120, np.inf, np.nan)
    ]
    assert str(found) == "[0.0, inf, nan]"


def test_channels_of_zeros_and_an_outlier_are_quantised():
    params = dict(values(DENSE))
    leaf = params[WO].copy()
    leaf[:, 2, 7], leaf[5, 2, 8] = 0, 3e38
    scales = np.asarray(converter_of(DENSE).convert(params | {WO: leaf})[SCALE])
    assert scales[7] == 0
    assert np.isfinite(scales).all()


def test_a_second_sync_compiles_nothing(compilations):
    on = grid(0, 8, fsdp=8)
    sync = portax.WeightSync(converter_of(DENSE), engine(DENSE))
    sync(sharded(values(DENSE), on))
    with compilations.measured() as box:
        sync(sharded(values(DENSE), on))
    assert box == [0]
