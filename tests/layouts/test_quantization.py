"""Quantised engines: every leaf of every golden, and what is refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, engine_mesh, mesh, sharded, tree

import portax
from portax.layouts import FlaxNnx, Quantization, TpuInference
from portax.testing.golden import Golden, compare

FILES = [f"{path.parent.name}/{path.name}" for path in sorted(GOLDEN.glob("*/quantised-*.tp*.json"))]
BROKEN = [file for file in FILES if "broken" in json.loads((GOLDEN / file).read_text())]
ONE_OF_A_KIND = [  # of every setting and kernel one
    "qwen3-8b.scan/quantised-0.32.0.tp2.bf16-fp8-some.json",
    "qwen3-8b.scan/quantised-0.32.0.tp2.bf16-int4.json",
    "qwen3-8b-wide.scan/quantised-0.32.0.tp8.bf16-int8.json",
    "qwen3-30b-a3b-fp8.scan/quantised-0.32.0.tp4.bf16-int8-b16.json",
    "qwen3-30b-a3b-fp8.scan/quantised-0.32.0.tp4.block-fp8-clip.json",
    "qwen3-30b-a3b-fp8.scan/quantised-0.32.0.tp4.fused.block-fp8-b64.json",
    "qwen3-30b-a3b-fp8.scan/quantised-0.32.0.tp4.ep.block-fp8-asis.json",
    "qwen3-30b-a3b-fp8.scan/quantised-0.32.0.tp4.ct-fp8.json",
    "gemma4-26b-nnx.scan/quantised-flax-0.32.0.tp8.moe-fp8-b32.json",
    "qwen3-8b-fp8.scan/quantised-flax-0.32.0.tp2.block-fp8.json",
]
DENSE, MOE, TILED, TILED_MOE = "qwen3-8b.scan", "qwen3-30b-a3b.scan", "qwen3-8b-fp8.scan", "qwen3-30b-a3b-fp8.scan"
ALL = ("re:.*",)


@functools.cache
def values(name, kind):
    return tree(name).fill(kind)


def differences(converter, params, golden):
    specs = {entry.name: entry.spec for entry in converter.plan(params).entries}
    assert specs == {leaf: row.spec for leaf, row in golden.leaves.items()}
    return [f"{row.name}: {row.difference}" for row in compare(converter.convert(params), golden) if row.difference]


@pytest.mark.parametrize("file", [file for file in FILES if file not in BROKEN])
def test_reproduces_every_leaf_of_a_quantised_engine(file):
    golden = Golden.load(GOLDEN / file)
    name = file.partition("/")[0]
    converter = portax.converter_for(tree(name).config, layout=golden.layout)
    assert differences(converter, values(name, golden.values), golden) == []


@pytest.mark.parametrize("file", [file for file in ONE_OF_A_KIND if "gemma4" not in file])  # embeddings: rounded twice
def test_reproduces_it_from_bfloat16(file):
    golden = Golden.load(GOLDEN / file)
    name = file.partition("/")[0]
    converter = portax.converter_for(tree(name).config, layout=golden.layout)
    params = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in values(name, golden.values).items()}
    assert differences(converter, params, golden) == []


@pytest.mark.parametrize("file", ONE_OF_A_KIND)
def test_reproduces_it_from_a_trainer_that_is_spread_over_the_devices(file):
    golden = Golden.load(GOLDEN / file)
    name = file.partition("/")[0]
    converter = portax.converter_for(tree(name).config, layout=golden.layout, mesh=engine_mesh(golden.layout.tp))
    params = sharded(values(name, golden.values), mesh(fsdp=4, tensor=2))
    rows = compare(converter.convert(params), golden)
    assert [f"{row.name}: {row.difference}" for row in rows if row.difference] == []


@pytest.mark.parametrize("file", BROKEN)
def test_refuses_an_engine_that_computes_wrong(file):
    golden = Golden.load(GOLDEN / file)
    converter = portax.converter_for(tree(MOE).config, layout=golden.layout)
    with pytest.raises(portax.PlanError, match=r"mlp\.experts: .*torchax holds no scales of these experts"):
        converter.plan(values(MOE, "probe"))


def settings(checkpoint="bf16", **options):
    return Quantization(checkpoint=checkpoint, scale_form="xla_cpu", **options)


def planned(name, quantization, *, tp=4, backend="gmm_tp", kind=TpuInference, version="0.32", **options):
    layout = kind(version=version, tp=tp, moe_backend=backend, quantization=quantization)
    return portax.converter_for(tree(name).config, layout=layout).plan(values(name, "probe"), **options)


def test_the_plan_says_what_is_exact_and_lists_every_lossy_step_once():
    plan = planned(DENSE, settings(bf16_linear_requantize_patterns=ALL))
    assert "exact         as if the engine had loaded the bfloat16 checkpoint and quantised online" in str(plan)
    assert set(plan.casts) == {"float32 -> bfloat16", "bfloat16 -> float8_e4m3fn"}
    plan = planned(TILED, settings("fp8-block", requantize_weight_dtype="int8"))
    assert "the checkpoint that recipe fp8-block makes" in plan.definition
    assert set(plan.casts) == {
        "float32 -> bfloat16",
        "bfloat16 -> float8_e4m3fn (recipe fp8-block)",
        "dequantised float32 -> bfloat16",
        "bfloat16 -> int8",
    }
    assert json.loads(plan.to_json())["definition"] == plan.definition


def test_strict_dtype_refuses_to_quantise():
    with pytest.raises(portax.PlanError, match=r"o_proj\.weight_scale: found a narrowing cast.*bfloat16 -> int8"):
        planned(
            DENSE,
            settings(bf16_linear_requantize_patterns=ALL, bf16_linear_requantize_weight_dtype="int8"),
            strict_dtype=True,
        )


def test_one_program_for_each_kind_of_layer_also_where_patterns_tell_layers_apart():
    some = settings(bf16_linear_requantize_patterns=("model.layers.1.self_attn.o_proj",))
    held = {entry.name: entry.dtype for entry in planned(DENSE, some).entries if "o_proj.weight" in entry.name}
    assert held.pop("vllm_model.model.layers.1.self_attn.o_proj.weight") == jnp.float8_e4m3fn
    assert held.pop("vllm_model.model.layers.1.self_attn.o_proj.weight_scale") == np.float32
    assert {*held.values()} == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("form", ["narrow", "wide"])
def test_what_the_compiler_makes_of_scales_is_the_layouts_to_say(form):
    file = GOLDEN / "qwen3-8b.scan/quantised-0.32.0.tp2.bf16-fp8.json"
    golden = Golden.load(file)
    told = dataclasses.replace(golden.layout.quantization, scale_form=form)
    layout = dataclasses.replace(golden.layout, quantization=told)
    converter = portax.converter_for(tree(DENSE).config, layout=layout)
    exact = not any(row.difference for row in compare(converter.convert(values(DENSE, "spread")), golden))
    assert exact == (form == "narrow")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"checkpoint": "fp8-tensor"}, "checkpoint='fp8-tensor' is no known recipe; known: bf16, fp8-block"),
        ({"scale_form": "tpu"}, "scale_form='tpu' is unknown; known: narrow, wide, xla_cpu"),
        (
            {"bf16_linear_requantize_weight_dtype": "float8_e4m3b11fnuz"},
            "BF16_LINEAR_REQUANTIZE_WEIGHT_DTYPE=float8_e4m3b11fnuz is no dtype that was run",
        ),
        ({"bf16_linear_requantize_block_size": 0}, "BF16_LINEAR_REQUANTIZE_BLOCK_SIZE=0 is not a positive integer"),
        ({"checkpoint": "fp8-block", "requantize_block_size": 64}, "and ENABLE_QUANTIZED_MATMUL_KERNEL=1 go together"),
        ({"checkpoint": "fp8-block", "enable_quantized_matmul_kernel": True}, "go together"),
        ({"requantize_weight_dtype": "int8"}, "REQUANTIZE_WEIGHT_DTYPE: not run with checkpoint='bf16'"),
        (
            {"checkpoint": "ct-fp8", "moe_requantize_weight_dtype": "int8"},
            "MOE_REQUANTIZE_WEIGHT_DTYPE: not run with checkpoint='ct-fp8'",
        ),
        (
            {"checkpoint": "fp8-block", "bf16_linear_requantize_patterns": ALL},
            "BF16_LINEAR_REQUANTIZE_PATTERNS: not run with checkpoint='fp8-block'",
        ),
        (
            {"checkpoint": "fp8-block", "disable_weight_requantization": True, "requantize_weight_dtype": "int8"},
            "was not run together with REQUANTIZE_WEIGHT_DTYPE",
        ),
        ({"checkpoint": "fp8-block", "moe_requantize_clip_percentile": 101.0}, "is not between 0 and 100"),
        ({"moe_requantize_block_size": 16}, "does nothing without MOE_REQUANTIZE_WEIGHT_DTYPE"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, match):
    with pytest.raises(portax.errors.QuantizationError, match=match):
        Quantization(**{"checkpoint": "bf16", "scale_form": "narrow"} | options)


def test_settings_are_read_off_a_given_environment():
    told = {"BF16_LINEAR_REQUANTIZE_PATTERNS": "re:.*, model.norm", "BF16_LINEAR_REQUANTIZE_BLOCK_SIZE": "16"}
    assert Quantization.of_environment(told, checkpoint="bf16", scale_form="narrow") == Quantization(
        checkpoint="bf16",
        scale_form="narrow",
        bf16_linear_requantize_patterns=("re:.*", "model.norm"),
        bf16_linear_requantize_block_size=16,
    )
    assert Quantization.of_environment({"HOME": "/"}, checkpoint="bf16", scale_form="narrow") is None
    with pytest.raises(portax.errors.QuantizationError, match="REQUANTIZE_BLOCK_SIZE='x' is not a number"):
        Quantization.of_environment({"REQUANTIZE_BLOCK_SIZE": "x"}, checkpoint="fp8-block", scale_form="narrow")


BLOCK = "bf16_linear_requantize_block_size"
ONLINE = {"bf16_linear_requantize_patterns": ALL}


@pytest.mark.parametrize(
    ("name", "quantization", "where", "match"),
    [
        (DENSE, settings(**ONLINE, **{BLOCK: 60}), {}, r"BLOCK_SIZE=60 does not divide its 128 inputs"),
        (DENSE, settings(**ONLINE, **{BLOCK: 48}), {"tp": 4}, r"SIZE=48 makes 2 blocks of its 96 inputs, which tp=4"),
        (DENSE, settings("fp8-block"), {}, r"qkv_proj: outputs = 32 is no multiple of 128"),
        (
            TILED,
            settings("fp8-block", requantize_block_size=64, enable_quantized_matmul_kernel=True),
            {"tp": 8},
            r"down_proj: REQUANTIZE_BLOCK_SIZE=64 makes 6 blocks of its 384 inputs, which tp=8",
        ),
        (
            TILED,
            settings("fp8-block", disable_weight_requantization=True),
            {"tp": 2},
            r"DISABLE_WEIGHT_REQUANTIZATION=1 holds .* which tp=2 does not divide",
        ),
        (
            TILED_MOE,
            settings("fp8-block", disable_weight_requantization=True),
            {},
            r"DISABLE_WEIGHT_REQUANTIZATION=1 was run with expert parallelism alone",
        ),
        (TILED_MOE, settings("ct-int8"), {}, r"refuses compressed-tensors int8 experts"),
        (MOE, settings(moe_requantize_weight_dtype="int8"), {}, r"torchax holds no scales of these experts"),
        (MOE, settings("fp8-block"), {}, r"mlp.experts: width = \d+ is no multiple of 128"),
        ("qwen3.5-35b-a3b.scan", settings(**ONLINE), {}, r"models with this linear were not run quantised"),
        (
            "gemma4-26b-nnx.scan",
            settings(moe_requantize_weight_dtype="float8_e4m3fn", moe_requantize_block_size=16),
            {"kind": FlaxNnx, "tp": 2},
            r"MOE_REQUANTIZE_BLOCK_SIZE=16 makes 3 blocks of its width 48, which tp=2",
        ),
    ],
)
def test_what_an_engine_cannot_quantise_is_refused_by_leaf_and_setting(name, quantization, where, match):
    with pytest.raises(portax.PlanError, match=match):
        planned(name, quantization, **where)


def test_patterns_that_select_half_of_a_fused_linear_are_refused():
    with pytest.raises(
        portax.errors.QuantizationError, match=r"some but not all parts of model\.layers\.0\.self_attn\.qkv"
    ):
        planned(DENSE, settings(bf16_linear_requantize_patterns=(r"re:.*\.q_proj",)))


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (TpuInference, {"version": "0.22", "quantization": settings(**ONLINE)}, "run since tpu-inference 0.32"),
        (TpuInference, {"attention_dp": 2, "quantization": settings(**ONLINE)}, "with attention data parallelism"),
        (TpuInference, {"dtype": jnp.float32, "quantization": settings(**ONLINE)}, "with dtype bfloat16"),
        (FlaxNnx, {"quantization": settings(**ONLINE)}, r"native JAX models \(flax_nnx\) ignore it"),
        (FlaxNnx, {"quantization": settings("ct-fp8")}, "was not run with"),
    ],
)
def test_engines_that_were_not_run_quantised_are_refused(kind, options, match):
    with pytest.raises(portax.errors.QuantizationError, match=match):
        kind(**{"version": "0.32", "tp": 4} | options)


def test_native_models_of_other_classes_are_refused():
    with pytest.raises(
        portax.errors.QuantizationError, match=r"Qwen3ForCausalLM: native JAX models .* were not run with"
    ):
        planned(TILED, settings(moe_requantize_weight_dtype="int8"), kind=FlaxNnx, tp=2)


@pytest.mark.parametrize(("engine", "layout"), [("quantised", None), ("plain", settings(**ONLINE))])
def test_a_layout_and_an_engine_of_which_one_is_quantised_do_not_fit(engine, layout):
    file = "quantised-0.32.0.tp4.bf16-fp8.json" if engine == "quantised" else "tpu-inference-0.32.0.tp4.json"
    rows = Golden.load(GOLDEN / DENSE / file).leaves
    target = {name: jax.ShapeDtypeStruct(row.shape, jnp.dtype(row.dtype)) for name, row in rows.items()}
    with pytest.raises(portax.PlanError, match=r"o_proj\.weight_scale") as error:
        planned(DENSE, layout, target=target)
    assert "float8_e4m3fn[128, 128]" in str(error.value)


def test_a_scale_dtype_that_the_engine_does_not_have_is_refused():
    rows = Golden.load(GOLDEN / DENSE / "quantised-0.32.0.tp4.bf16-fp8.json").leaves
    target = {
        name: jax.ShapeDtypeStruct(row.shape, jnp.bfloat16 if "_scale" in name else jnp.dtype(row.dtype))
        for name, row in rows.items()
    }
    with pytest.raises(portax.PlanError, match=r"weight_scale: found bfloat16\[128\] in the engine"):
        planned(DENSE, settings(**ONLINE), target=target)


def test_trainers_that_hold_fp8_are_refused_by_name():
    path = "base/decoder/layers/mlp/wo/kernel"
    params = dict(values(DENSE, "probe"))
    params[path] = params[path].astype(ml_dtypes.float8_e4m3fn)
    params[f"{path}_scale"] = np.ones((1, 1, 128), np.float32)
    layout = TpuInference(version="0.32", tp=4, quantization=settings(**ONLINE))
    with pytest.raises(portax.PlanError, match=r"wo/kernel: found dtype float8_e4m3fn.*is quantised") as error:
        portax.converter_for(tree(DENSE).config, layout=layout).plan(params)
    assert "wo/kernel_scale: found shape [1, 1, 128], which no hook uses" in str(error.value)
    assert "the trainer holds its weights in fp8" in str(error.value)


def test_a_second_conversion_compiles_nothing(compilations):
    layout = TpuInference(version="0.32", tp=4, quantization=settings(**ONLINE))
    converter = portax.converter_for(tree(DENSE).config, layout=layout)
    converter.convert(values(DENSE, "spread"))
    with compilations.measured() as box:
        converter.convert(values(DENSE, "spread"))
    assert box == [0]
