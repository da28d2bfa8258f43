"""Quantised checkpoints of the hub: every recipe against the numpy reference, and what is refused."""

import functools
import pathlib
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import tree

import portax
from portax.layouts import HuggingFace, Quantization, TpuInference
from portax.weights.recipes import RECIPES

sys.path.append(str(pathlib.Path(__file__).parents[2] / "oracle"))
import quantised_reference as reference

DENSE, MOE, SMALL = "qwen3-8b-fp8.scan", "qwen3-30b-a3b-fp8.scan", "qwen3-8b.scan"
MAKES = {
    "fp8-block": reference.block_fp8,
    "fp8-block-hf": reference.block_fp8_hf,
    "ct-fp8": lambda w: reference.channel(w, "fp8"),
    "ct-int8": lambda w: reference.channel(w, "int8"),
}


@functools.cache
def values(name):
    return tree(name).fill("spread")


@functools.cache
def made(name, recipe):
    return portax.converter_for(tree(name).config, layout=HuggingFace(quantization=recipe)).convert(values(name))


@functools.cache
def plain(name):
    return portax.converter_for(tree(name).config, layout=HuggingFace(dtype="bfloat16")).convert(values(name))


def raw(array):
    return np.ascontiguousarray(array).view(np.uint8).ravel().tolist()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", [DENSE, MOE])
def test_every_recipe_makes_what_the_library_makes_of_the_bfloat16_tensors(name, recipe):
    got, suffix = made(name, recipe), RECIPES[recipe].scale
    quantised = 0
    for tensor, value in plain(name).items():
        scale = tensor.removesuffix("weight") + suffix
        if scale not in got:
            assert raw(got[tensor]) == raw(value)
            continue
        weights, scales = MAKES[recipe](np.asarray(value))
        assert raw(got[tensor]) == raw(weights)
        assert np.array_equal(np.asarray(got[scale], np.float32).ravel(), scales.astype(np.float32).ravel())
        quantised += 1
    assert len(got) == len(plain(name)) + quantised
    assert not any("mlp.gate." in scale or "lm_head" in scale or "embed" in scale for scale in got if suffix in scale)


def test_scales_have_the_shapes_and_dtypes_that_loaders_expect():
    weight = "model.layers.0.mlp.down_proj.weight"
    out, inputs = made(DENSE, "fp8-block")[weight].shape
    tiles = made(DENSE, "fp8-block")[f"{weight}_scale_inv"]
    assert (tiles.shape, tiles.dtype) == ((out // 128, inputs // 128), np.float32)
    channels = made(DENSE, "ct-fp8")[f"{weight}_scale"]
    assert (channels.shape, channels.dtype) == ((out, 1), jnp.bfloat16)


def test_float32_and_bfloat16_sources_give_the_same_bits():
    params = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in values(DENSE).items()}
    converter = portax.converter_for(tree(DENSE).config, layout=HuggingFace(quantization="fp8-block"))
    got = converter.convert(params)
    assert all(raw(got[name]) == raw(leaf) for name, leaf in made(DENSE, "fp8-block").items())


def test_an_engine_that_loads_the_checkpoint_as_it_is_holds_its_bits():
    settings = Quantization(checkpoint="ct-fp8", scale_form="narrow")
    layout = TpuInference(version="0.32", tp=1, quantization=settings)
    held = portax.converter_for(tree(DENSE).config, layout=layout).convert(values(DENSE))
    for layer in range(tree(DENSE).config["num_decoder_layers"]):
        for linear in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{linear}.weight"
            assert raw(held[f"vllm_model.{name}"]) == raw(np.asarray(made(DENSE, "ct-fp8")[name]).T)
            scale = np.asarray(made(DENSE, "ct-fp8")[f"{name}_scale"], np.float32).ravel()
            assert np.array_equal(held[f"vllm_model.{name}_scale"], scale)


def test_the_plan_says_which_recipe_is_exact_and_lists_the_lossy_step_once():
    converter = portax.converter_for(tree(DENSE).config, layout=HuggingFace(quantization="fp8-block"))
    plan = converter.plan(values(DENSE))
    assert "what recipe fp8-block makes of the bfloat16 checkpoint" in str(plan)
    assert set(plan.casts) == {"float32 -> bfloat16", "bfloat16 -> float8_e4m3fn (recipe fp8-block)"}
    with pytest.raises(portax.PlanError, match=r"narrowing cast.*recipe fp8-block"):
        converter.plan(values(DENSE), strict_dtype=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"quantization": "fp8-tensor"},
            "quantization='fp8-tensor' is no known recipe; known: fp8-block, fp8-block-hf",
        ),
        ({"quantization": "ct-fp8", "dtype": "float32"}, "ct-fp8 quantises bfloat16 values, and dtype is float32"),
    ],
)
def test_unknown_recipes_and_other_dtypes_are_refused(options, match):
    with pytest.raises(portax.errors.QuantizationError, match=match):
        HuggingFace(**options)


@pytest.mark.parametrize(
    ("name", "recipe", "match"),
    [
        (SMALL, "fp8-block", r"k_proj: outputs = 32 is no multiple of 128|down_proj: inputs = 96 is no multiple"),
        ("gemma4-26b.scan", "ct-fp8", "checkpoints with stacked experts were not made quantised"),
        ("qwen3-next-80b-a3b.scan", "ct-fp8", "checkpoints of models with this linear were not made quantised"),
    ],
)
def test_models_that_no_recipe_was_run_with_are_refused(name, recipe, match):
    converter = portax.converter_for(tree(name).config, layout=HuggingFace(quantization=recipe))
    with pytest.raises(portax.PlanError, match=match):
        converter.plan(values(name))


@pytest.mark.parametrize(("value", "recipe"), [(np.nan, "fp8-block"), (np.inf, "fp8-block-hf"), (1e-37, "ct-fp8")])
def test_values_that_cannot_be_quantised_are_refused(value, recipe):
    path = "base/decoder/layers/mlp/wo/kernel"
    leaf = values(DENSE)[path].copy()
    leaf[:, 1, :] = 0
    leaf[3, 1, 4] = value
    converter = portax.converter_for(tree(DENSE).config, layout=HuggingFace(quantization=recipe))
    with pytest.raises(portax.errors.QuantizationError, match=r"layers\.1\.mlp\.down_proj\.weight_scale.*\[\d, 0\]: "):
        converter.convert(values(DENSE) | {path: leaf})
