"""What a quantised live engine tells, here a stand-in that holds what the goldens say."""

import json
import sys
import types

import jax.numpy as jnp
import pytest
from conftest import GOLDEN, engine_mesh

import portax
from portax.integrations import tpu_inference
from portax.layouts import Quantization
from portax.testing.golden import Golden

FP8 = {"weight_block_size": [128, 128], "quant_method": "fp8"}


def compressed(kind, **options):
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True} | options
    return {"config_groups": {"group_0": {"weights": weights}}}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.32.0")


@pytest.fixture
def environment(monkeypatch):
    def set_(**variables):
        package = types.ModuleType("tpu_inference")
        package.envs = types.ModuleType("tpu_inference.envs")
        vars(package.envs).update(variables)
        monkeypatch.setitem(sys.modules, "tpu_inference", package)
        monkeypatch.setitem(sys.modules, "tpu_inference.envs", package.envs)

    set_()
    return set_


class Native(dict):
    """An `nnx.State` is a mapping, too, and no dict."""


def engine(file, *, method=None, config=None, native=False, without=()):
    content = json.loads((GOLDEN / file).read_text())
    state = {
        name: types.SimpleNamespace(dtype=jnp.dtype(row["dtype"]), shape=tuple(row["shape"]))
        for name, row in content["leaves"].items()
        if not any(part in name for part in without)
    }
    backends = [types.SimpleNamespace(name=content["moe_backend"])] if content["moe_backend"] else []
    modules = [types.SimpleNamespace(quant_method=types.SimpleNamespace(moe_backend=backend)) for backend in backends]
    hf_config = types.SimpleNamespace(quantization_config=config)
    model_config = types.SimpleNamespace(dtype="torch.bfloat16", quantization=method, hf_config=hf_config)
    return types.SimpleNamespace(
        state=state,
        state_leaves={},
        mesh=engine_mesh(content["mesh"]["model"]),
        model=types.SimpleNamespace(model=types.SimpleNamespace(modules=lambda: modules)),
        vllm_config=types.SimpleNamespace(model_config=model_config),
    )


ONLINE = "qwen3-8b.scan/quantised-0.32.0.tp4.bf16-int8.json"
TILED = "qwen3-30b-a3b-fp8.scan/quantised-0.32.0.tp4.block-fp8-b64.json"
CHANNEL = "qwen3-8b-fp8.scan/quantised-0.32.0.tp4.ct-int8.json"
PATTERNS = {"BF16_LINEAR_REQUANTIZE_PATTERNS": ["re:.*"], "BF16_LINEAR_REQUANTIZE_WEIGHT_DTYPE": "int8"}
B64 = {"REQUANTIZE_BLOCK_SIZE": 64, "MOE_REQUANTIZE_BLOCK_SIZE": 64, "ENABLE_QUANTIZED_MATMUL_KERNEL": True}


@pytest.mark.parametrize(
    ("file", "variables", "told", "asked"),
    [
        (ONLINE, PATTERNS, {}, {}),
        (TILED, B64, {"method": "fp8", "config": FP8}, {"recipe": "fp8-block"}),
        (CHANNEL, {}, {"method": "compressed-tensors", "config": compressed("int")}, {}),
    ],
)
def test_the_layout_of_a_golden_is_read_off_an_engine_that_holds_it(file, variables, told, asked, environment):
    environment(**variables)
    assert tpu_inference.layout(engine(file, **told), **asked) == Golden.load(GOLDEN / file).layout


def test_an_engine_that_lost_its_scales_is_refused(environment):
    environment(MOE_REQUANTIZE_WEIGHT_DTYPE="float8_e4m3fn")
    with pytest.raises(
        portax.errors.QuantizationError, match=r"w13_weight as float8_e4m3fn and no scales.*computes wrong"
    ):
        tpu_inference.layout(engine("qwen3-30b-a3b.scan/quantised-0.32.0.tp2.moe-fp8.json"))


@pytest.mark.parametrize(
    ("file", "told", "asked", "match"),
    [
        (TILED, {"method": "fp8", "config": FP8}, {}, "recipe=None: the engine loaded an fp8 checkpoint in blocks"),
        (
            TILED,
            {"method": "fp8", "config": FP8 | {"weight_block_size": None}},
            {},
            r"weight_block_size=None, not \[128",
        ),
        (TILED, {"method": "mxfp4"}, {}, r"the engine is quantised \(mxfp4\), which was not run"),
        (
            CHANNEL,
            {"method": "compressed-tensors", "config": compressed("int", strategy="group")},
            {},
            "compressed-tensors checkpoint of a kind that was not run: .*group",
        ),
        (ONLINE, {}, {"recipe": "fp8-block"}, "recipe='fp8-block', and the engine loaded a checkpoint that is not"),
        (ONLINE, {}, {}, "holds .* as int8, and neither its checkpoint nor its environment says why"),
        ("qwen3-8b.scan/tpu-inference-0.32.0.tp4.json", {"method": "fp8"}, {}, r"\(fp8\), and holds no leaf of eight"),
    ],
)
def test_what_an_engine_does_not_tell_or_was_not_run_is_refused(file, told, asked, match, environment):
    with pytest.raises(portax.errors.QuantizationError, match=match):
        tpu_inference.layout(engine(file, **told), **asked)


def test_what_a_tpu_makes_of_scales_has_to_be_named(environment):
    environment(**PATTERNS | {"BF16_LINEAR_REQUANTIZE_PATTERNS": ["re:.*_proj", "model.layers.0.mlp.gate"]})
    runner = engine(ONLINE)
    device = types.SimpleNamespace(platform="tpu")
    runner.mesh = types.SimpleNamespace(
        shape={"model": 4}, devices=types.SimpleNamespace(flat=[device] * 4), axis_names=("model",)
    )
    with pytest.raises(portax.errors.QuantizationError, match=r"scale_form=None on tpu: .*sync.verify"):
        tpu_inference.layout(runner)
    assert tpu_inference.layout(runner, scale_form="wide").quantization == Quantization(
        checkpoint="bf16",
        scale_form="wide",
        bf16_linear_requantize_patterns=("re:.*_proj", "model.layers.0.mlp.gate"),
        bf16_linear_requantize_weight_dtype="int8",
    )


def test_without_the_engines_package_nothing_is_guessed():
    with pytest.raises(portax.MissingPackageError, match="make the WeightSync in the engine's process"):
        tpu_inference.layout(engine(ONLINE))
