"""What is read off a live engine, here a stand-in; `tests/live` does the same with a real one."""

import enum
import types

import jax.numpy as jnp
import pytest
from conftest import engine_mesh, mesh

import portax
from portax.integrations import tpu_inference
from portax.layouts import TpuInference

Backend = enum.Enum("Backend", "GMM_TP GMM_EP")


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.32.0")


def engine(on, *, backends=(), quantization=None):
    """As much of a runner as `layout` reads."""
    experts = [types.SimpleNamespace(quant_method=types.SimpleNamespace(moe_backend=backend)) for backend in backends]
    model = types.SimpleNamespace(modules=lambda: [types.SimpleNamespace(), *experts])
    config = types.SimpleNamespace(dtype="torch.bfloat16", quantization=quantization)
    return types.SimpleNamespace(
        state={},
        state_leaves={},
        mesh=on,
        model=types.SimpleNamespace(model=model),
        vllm_config=types.SimpleNamespace(model_config=config),
    )


@pytest.mark.parametrize(
    ("on", "sizes"),
    [
        (engine_mesh(4), {"tp": 4}),
        (mesh(model=2), {"tp": 2}),
        (engine_mesh(4, 1), {"tp": 4, "attention_dp": 1}),
        (engine_mesh(8, 2), {"tp": 8, "attention_dp": 2}),
        (engine_mesh(4, 4), {"tp": 4, "attention_dp": 4}),
    ],
    ids=str,
)
def test_sizes_are_read_off_the_mesh(on, sizes):
    assert tpu_inference.layout(engine(on)) == TpuInference(version="0.32.0", **sizes)


@pytest.mark.parametrize("axis", ["attn_dp_expert", "expert", "dcp", "pcp"])
def test_a_mesh_that_cuts_along_other_axes(axis):
    axes = dict.fromkeys(("data", "attn_dp", "attn_dp_expert", "expert", "model", "dcp", "pcp"), 1) | {axis: 2}
    with pytest.raises(portax.LayoutError, match=rf"the engine's mesh has {axis}=2, and weights that are cut along"):
        tpu_inference.layout(engine(mesh(**axes)))


def test_the_experts_backend_is_read_off_the_model():
    assert tpu_inference.layout(engine(engine_mesh(2), backends=[Backend.GMM_EP])).moe_backend == "gmm_ep"
    with pytest.raises(portax.LayoutError, match="experts run on several backends: gmm_ep, gmm_tp"):
        tpu_inference.layout(engine(engine_mesh(2), backends=[*Backend]))


def latent():
    """An engine of latent attention, as much of it as `layout` reads."""
    runner = engine(engine_mesh(2, 2))
    at = "vllm_model.model.layers.0.self_attn.mla_attn.mla_attn"
    dtypes = {"W_UK_T": jnp.float8_e4m3fn, "W_UK_T_scale": jnp.float32, "W_UV": jnp.float8_e4m3fn}
    runner.state = {f"{at}.{leaf}": jnp.ones((2, 4, 4), dtype) for leaf, dtype in dtypes.items()}
    runner.vllm_config.cache_config = types.SimpleNamespace(cache_dtype="fp8")
    return runner


def test_the_dtype_of_the_cache_is_part_of_a_layout_with_latent_attention():
    expected = {"tp": 2, "attention_dp": 2, "kv_cache_dtype": "fp8"}
    told = tpu_inference.layout(latent())
    assert told == TpuInference(version="0.32.0", kv_scale_form="xla_cpu", **expected)
    told = tpu_inference.layout(latent(), scale_form="wide")
    assert told == TpuInference(version="0.32.0", kv_scale_form="wide", **expected)


def test_on_other_devices_the_form_of_its_scales_has_to_be_said():
    runner = latent()
    runner.mesh = types.SimpleNamespace(
        shape=runner.mesh.shape,
        devices=types.SimpleNamespace(flat=[types.SimpleNamespace(platform="tpu")]),
    )
    with pytest.raises(portax.LayoutError, match="scale_form=None on tpu: whether scales are rounded"):
        tpu_inference.layout(runner)
