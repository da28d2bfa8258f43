"""The likely cause that a plan names is the right one, for trees that people really hand over."""

import dataclasses
import re

import jax
import jaxtyping
import numpy as np
import pytest
from conftest import filled, tree

import portax
from portax.layouts import FlaxNnx, TpuInference

MOE, DENSE, TIED = "qwen3-30b-a3b.scan", "qwen3-8b.scan", "qwen3-0.6b.scan"
LAYER = "base/decoder/layers"
LAYOUT = TpuInference(version="0.32", tp=2)


def converter(name, layout=LAYOUT, leave=(), **config):
    return portax.converter_for(dict(tree(name).config, **config), layout=layout, leave=leave)


def causes(made, params):
    with pytest.raises(portax.PlanError) as caught:
        made.plan(params)
    return {problem.leaf: problem.cause for problem in caught.value.problems}


def leaf(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def with_encoder(params):
    return params | {"base/vision_encoder/Qwen3VLVisionEncoder_0/blocks_0/ln1/scale": leaf(32)}


def with_audio(params):
    return params | {"base/audio_encoder/layers_0/self_attention/query/kernel": leaf(32, 2, 16)}


def with_mtp(params):
    return params | {"base/mtp_block/mtp_layer_1/mtp_1_projection/kernel": leaf(256, 128)}


def with_lora(params):
    return params | {f"{LAYER}/self_attention/query/kernel_lora_a": leaf(128, 4, 8)}


def quantised(params):
    kernel = f"{LAYER}/mlp/wo/kernel"
    rest = {path: x for path, x in params.items() if path != kernel}
    return rest | {f"{kernel}/array/qvalue": leaf(96, 4, 128, dtype=np.int8), f"{kernel}/array/scale": leaf(1, 4, 128)}


def in_stages(params):
    """As MaxText's pipeline holds its layers: stages, and layers within each."""
    return {
        path: leaf(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]) if "/layers/" in path else x
        for path, x in params.items()
    }


def in_module(params):
    return {path.replace("/layers/", "/pipeline_module/layers/"): x for path, x in params.items()}


def padded(params):
    axes = {"wi_0": -1, "wi_1": -1, "wo": -2}
    found = dict(params)
    for path, x in params.items():
        if "moe_block" in path and (axis := axes.get(path.rpartition("/")[2])):
            shape = list(x.shape)
            shape[axis] = 128
            found[path] = leaf(*shape)
    return found


def on_first_axis(params):
    return {path: np.moveaxis(x, 1, 0) if "/layers/" in path else x for path, x in params.items()}


def short_stack(params):
    path = f"{LAYER}/mlp/wo/kernel"
    return params | {path: params[path][:, :3]}


@pytest.mark.parametrize(
    ("name", "config", "change", "at", "cause"),
    [
        (
            DENSE,
            {},
            with_encoder,
            "vision_encoder",
            r"images or sound.*leave it out with leave=\('\*vision_encoder/\*'",
        ),
        (DENSE, {}, with_audio, "audio_encoder", r"images or sound.*leave=\('\*audio_encoder/\*'"),
        (DENSE, {}, with_mtp, "mtp_block", r"\(MTP\).*leave=\('\*/mtp_block/\*'"),
        (DENSE, {}, with_lora, "lora_a", "LoRA adapters: merge them"),
        (DENSE, {}, quantised, "wo/kernel", "quantised by qwix"),
        (DENSE, {}, quantised, "array/qvalue", "quantised by qwix"),
        (DENSE, {}, quantised, "array/scale", "quantised by qwix"),
        (DENSE, {}, in_stages, "mlp/wo/kernel", "pipeline stages: a stack of stacks"),
        (DENSE, {}, in_stages, "base/decoder", "pipeline stages: a stack of stacks"),
        (DENSE, {}, in_module, "pipeline_module/layers/mlp/wo/kernel", "pipeline stages"),
        (MOE, {}, padded, "moe_block/wi_0", r"experts that were padded .* from moe_mlp_dim=96 to 128"),
        (MOE, {}, padded, "moe_block/wo", r"experts that were padded .* from moe_mlp_dim=96 to 128"),
        (DENSE, {"logits_via_embedding": True}, dict, "logits_dense", "config says that the output projection is tied"),
        (TIED, {"logits_via_embedding": False}, dict, "logits_dense", "the model ties its output projection"),
        (DENSE, {"num_decoder_layers": 6, "base_num_decoder_layers": 6}, dict, "base/decoder", "of another depth"),
        (DENSE, {}, on_first_axis, "mlp/wo/kernel", r"stacked on axis 0, and the config says param_scan_axis=1"),
        (DENSE, {}, on_first_axis, "base/decoder", r"stacked on axis 0, and the config says param_scan_axis=1"),
        (DENSE, {}, short_stack, "mlp/wo/kernel", "this stack holds 3 layers and the others 4"),
    ],
)
def test_the_likely_cause(name, config, change, at, cause):
    found = causes(converter(name, **config), change(filled(name)))
    [named] = {text for path, text in found.items() if path.endswith(at) or f"{at}/" in path}
    assert re.search(cause, named), named


def test_a_native_model_that_was_not_run_tied_is_refused_for_that():
    name = "llama3.1-8b.scan"
    made = converter(name, FlaxNnx(version="0.32", tp=2), logits_via_embedding=True)
    with pytest.raises(portax.PlanError, match=r"found a native LlamaForCausalLM whose .*Likely cause: a tied model"):
        made.plan(made.expected_tree())


@pytest.fixture
def as_users_run_it():
    """Without the types that tests check on every call."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@dataclasses.dataclass(frozen=True)
class Sinks:
    """A block that no layout knows, and no pytree."""

    name: str
    value: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Registered:
    """A block that no layout knows."""

    value: object


@pytest.mark.parametrize("block", [lambda value: Sinks("sinks", value), lambda value: Registered(value)])
def test_a_block_that_no_layout_knows(block, as_users_run_it):
    class WithSinks(portax.Qwen3Converter):
        def norms(self, layer):
            scale = layer.read("pre_self_attention_layer_norm/scale", "emb_dim")
            return (*super().norms(layer), block(scale))

    match = (
        r"found a test_causes.(Sinks|Registered), which TpuInference does not know; expected a block of portax.weights"
    )
    with pytest.raises(portax.PlanError, match=match):
        WithSinks(tree(DENSE).config, layout=LAYOUT).plan(filled(DENSE))


@pytest.mark.parametrize("layout", ["tpu-inference", TpuInference, 3])
def test_something_that_is_no_layout(layout, as_users_run_it):
    with pytest.raises(
        portax.LayoutError, match=r"is no layout: pass an object, such as portax.layouts.TpuInference\("
    ):
        converter(DENSE, layout)


def test_a_converter_without_a_layout():
    with pytest.raises(portax.LayoutError, match=r"no layout: pass layout=portax.layouts.TpuInference\("):
        portax.converter_for(tree(DENSE).config)


TOWER = {"base/vision_encoder/a/scale": np.ones(3, np.float32), "base/vision_encoder/b/scale": np.ones(4, np.float32)}
LEAVING = ("*/vision_encoder/*",)


def test_leaves_that_are_to_be_left_out_are_listed_and_nothing_else_changes():
    made, params = converter(DENSE, leave=LEAVING), filled(DENSE) | TOWER
    plan = made.plan(params)
    assert plan.left == (*TOWER,)
    assert plan.entries == converter(DENSE).plan(filled(DENSE)).entries
    assert plan.bytes_in == converter(DENSE).plan(filled(DENSE)).bytes_in
    assert "left out      2 leaves of the trainer: base/vision_encoder/a/scale, base/vision_encoder/b/scale" in str(
        plan
    )
    assert plan.to_dict()["left"] == plan.left
    expected = converter(DENSE).convert(filled(DENSE))
    for bucket in made.stream(params, bucket_bytes=10**5):
        for name, array in bucket.items():
            np.testing.assert_array_equal(array, expected[name])
    assert made.on(None).plan(params).left == plan.left
    with pytest.raises(portax.PlanError, match=r"vision_encoder/a/scale: .*which no hook uses"):
        converter(DENSE).plan(params)


def test_a_sync_and_an_export_leave_the_same_out_and_say_so(tmp_path):
    params = filled(DENSE) | TOWER
    made = converter(DENSE, leave=LEAVING)
    engine = {name: jax.numpy.zeros_like(array) for name, array in converter(DENSE).convert(filled(DENSE)).items()}
    report = portax.WeightSync(made, engine)(params)
    assert report.left == (*TOWER,)
    assert "left out   2 leaves of the trainer: base/vision_encoder/a/scale" in str(report)
    exporting = converter(DENSE, portax.layouts.HuggingFace(), LEAVING)
    assert portax.export(exporting, params, tmp_path / "out").left == (*TOWER,)


def test_a_pattern_that_matches_nothing_is_an_error():
    match = r"leave='\*/visual/\*': found no leaf that it matches; expected a pattern of whole paths, such as base/"
    with pytest.raises(portax.PlanError, match=match):
        converter(DENSE, leave=("*/visual/*",)).plan(filled(DENSE))


def test_leaving_out_what_the_engine_needs():
    found = causes(converter(DENSE, leave=("*/mlp/wo/kernel",)), filled(DENSE))
    assert found == {f"{LAYER}/mlp/wo/kernel": "leave= leaves out what the engine needs"}


def test_patterns_that_are_one_text_are_refused():
    with pytest.raises(portax.ConfigError, match=r"leave='\*vision\*': pass a sequence of patterns"):
        converter(DENSE, leave="*vision*")
