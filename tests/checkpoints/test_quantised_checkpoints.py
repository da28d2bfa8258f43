"""Quantised checkpoints of the hub: written, and imported only if that was asked for."""

import functools
import json

import ml_dtypes
import numpy as np
import pytest
import yaml
from conftest import command, tree

import portax
from portax.checkpoints.dequantised import dequantised
from portax.config.shipped import config_path
from portax.layouts import HuggingFace, Quantization, TpuInference

DENSE, MOE = "qwen3-8b-fp8.scan", "qwen3-30b-a3b-fp8.scan"
ROUTERS = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
WEIGHT = "model.layers.0.mlp.down_proj.weight"


@functools.cache
def values(name):
    return tree(name).fill("spread")


@functools.cache
def hub_config(name):
    shipped = yaml.safe_load(config_path(name.removesuffix("-fp8.scan")).read_text())
    return portax.derive_hub_config(shipped | dict(tree(name).config))


def converter_of(name, **options):
    return portax.converter_for(tree(name).config, layout=HuggingFace(**options))


@functools.cache
def folder_of(name, recipe, root):
    out = root / f"{name}.{recipe}"
    converter = converter_of(name, quantization=recipe)
    portax.export(converter, values(name), out, hub_config=hub_config(name), bucket_bytes=2**18)
    return out


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantised")
    return lambda name, recipe: folder_of(name, recipe, root)


def raw(array):
    return np.ascontiguousarray(array).view(np.uint8).ravel().tolist()


@pytest.mark.parametrize(
    ("name", "recipe"), [(DENSE, "fp8-block-hf"), (MOE, "fp8-block"), (MOE, "ct-fp8"), (DENSE, "ct-int8")]
)
def test_files_hold_what_the_layout_makes(name, recipe, exported):
    found = portax.open_checkpoint(exported(name, recipe))
    expected = converter_of(name, quantization=recipe).convert(values(name))
    assert found.keys() == expected.keys()
    assert all((found[name].dtype, raw(found[name][...])) == (leaf.dtype, raw(leaf)) for name, leaf in expected.items())


def test_loaders_are_told_of_tiles_and_of_what_is_not_quantised(exported):
    config = json.loads((exported(MOE, "fp8-block") / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", *ROUTERS],
    }


def test_loaders_are_told_of_channels(exported):
    config = json.loads((exported(DENSE, "ct-int8") / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"], config["ignore"]) == (
        "compressed-tensors",
        "int-quantized",
        ["lm_head"],
    )
    group = config["config_groups"]["group_0"]
    assert group["weights"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
    }
    assert group["input_activations"]["strategy"] == "token"


def test_a_config_that_says_another_quantisation_is_refused(tmp_path):
    config = hub_config(DENSE) | {"quantization_config": {"quant_method": "awq"}}
    with pytest.raises(portax.ConfigError, match=r"says quantization_config=.*awq.*, and the tensors are quantised as"):
        portax.export(converter_of(DENSE, quantization="ct-fp8"), values(DENSE), tmp_path / "out", hub_config=config)


@pytest.mark.parametrize("recipe", ["fp8-block", "ct-fp8"])
def test_a_quantised_checkpoint_is_imported_only_if_that_is_asked_for(recipe, exported, tmp_path, capsys):
    weights, out = portax.open_checkpoint(exported(DENSE, recipe)), tmp_path / "out"
    with pytest.raises(portax.CheckpointError, match=r"are quantised, and a trainer wants them .*dequantize=True"):
        portax.import_checkpoint(converter_of(DENSE), weights, out)
    assert command("import", exported(DENSE, recipe), "--out", out) == 2
    assert "--dequantize" in capsys.readouterr().err
    assert not out.exists()
    assert command("import", exported(DENSE, recipe), "--out", out, "--dequantize") == 0
    found = portax.open_checkpoint(out)
    kernel = found["params/params/decoder/layers/mlp/wo/kernel"]
    held = safetensors_of(exported(DENSE, recipe))
    weight, scale = held[WEIGHT], held[WEIGHT + ("_scale" if recipe == "ct-fp8" else "_scale_inv")]
    scale = scale.astype(np.float32)
    scale = scale if recipe == "ct-fp8" else scale.repeat(128, 0).repeat(128, 1)
    expected = (weight.astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
    assert kernel.dtype == ml_dtypes.bfloat16
    assert raw(kernel[:, 0, :]) == raw(expected.T)


def safetensors_of(folder):
    found = portax.open_checkpoint(folder)
    return {name: found[name][...] for name in found}


def test_what_was_dequantised_and_is_quantised_again_is_what_the_engine_makes_of_the_checkpoint(exported):
    online = Quantization(
        checkpoint="bf16",
        scale_form="narrow",
        bf16_linear_requantize_patterns=("re:.*",),
    )
    loaded = Quantization(checkpoint="fp8-block", scale_form="narrow")
    read = converter_of(DENSE).restore(dequantised(portax.open_checkpoint(exported(DENSE, "fp8-block"))))
    made = [
        portax.converter_for(
            tree(DENSE).config, layout=TpuInference(version="0.32", tp=2, quantization=settings)
        ).convert(params)
        for settings, params in ((online, read), (loaded, values(DENSE)))
    ]
    assert made[0].keys() == made[1].keys()
    assert [name for name, leaf in made[0].items() if raw(leaf) != raw(made[1][name])] == []


def test_dequantising_what_is_not_quantised_is_refused(tmp_path):
    plain = converter_of(DENSE).convert(values(DENSE))
    with pytest.raises(portax.CheckpointError, match="no tensor of this checkpoint is quantised"):
        portax.import_checkpoint(converter_of(DENSE), plain, tmp_path / "out", dequantize=True)


@pytest.mark.parametrize(
    ("scale", "match"),
    [
        (None, r"down_proj\.weight: is float8_e4m3fn and has no .*weight_scale_inv or .*weight_scale beside it"),
        ((1, 1), r"weight_scale_inv: has the shape \[1, 1\], and .*: expected \[\d, \d\], tiles of 128 x 128"),
    ],
)
def test_weights_whose_scales_are_missing_or_of_another_form_are_refused(scale, match, exported):
    weights = safetensors_of(exported(DENSE, "fp8-block"))
    del weights[f"{WEIGHT}_scale_inv"]
    if scale is not None:
        weights[f"{WEIGHT}_scale_inv"] = np.ones(scale, np.float32)
    with pytest.raises(portax.CheckpointError, match=match):
        dequantised(weights)


def test_an_export_of_values_that_cannot_be_quantised_leaves_nothing_that_loads(tmp_path):
    path = "base/decoder/layers/mlp/wo/kernel"
    leaf = values(DENSE)[path].copy()
    leaf[3, 1, 4] = np.nan
    with pytest.raises(portax.errors.QuantizationError, match=r"layers\.1\.mlp\.down_proj\.weight_scale_inv: .*NaN"):
        portax.export(converter_of(DENSE, quantization="fp8-block"), values(DENSE) | {path: leaf}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
