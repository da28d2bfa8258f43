"""What is read off a live engine, here a stand-in; `tests/live` does the same with a real one."""

import enum
import types

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
