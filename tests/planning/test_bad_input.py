"""Every way to hand over the wrong thing gives one clear error, before any weight is touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import filled, mesh, tree

import portax
from portax.layouts import TpuInference
from portax.weights import blocks

MOE, DENSE, TIED = "qwen3-30b-a3b.scan", "qwen3-8b.scan", "qwen3-0.6b.scan"
LAYER = "base/decoder/layers"


def converter(name, tp=2, **options):
    return portax.converter_for(tree(name).config, layout=TpuInference(version="0.32", tp=tp), **options)


def sized(name, **sizes):
    """The config with some sizes changed under both of MaxText's names."""
    config = dict(tree(name).config)
    for key, value in sizes.items():
        config |= {k: value for k in (key, f"base_{key}") if k in config}
    return config


def problems(converter, params, match):
    """The problems of a plan; `convert` must raise the very same."""
    with pytest.raises(portax.PlanError, match=match) as planned:
        converter.plan(params)
    with pytest.raises(portax.PlanError, match=match) as converted:
        converter.convert(params)
    assert str(planned.value) == str(converted.value)
    return planned.value.problems


def without(params, *paths):
    return {path: leaf for path, leaf in params.items() if path not in paths}


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_one_of_query_key_value_absent(part):
    path = f"{LAYER}/self_attention/{part}/kernel"
    match = rf"1 problem, nothing was changed:\n  1\. {path}: found nothing; expected a leaf of shape \[emb_dim=128, layers=4"
    assert len(problems(converter(DENSE), without(filled(DENSE), path), match)) == 1


def test_every_missing_leaf_is_named_at_once():
    gone = [f"{LAYER}/mlp/wo/kernel", "base/decoder/logits_dense/kernel", "base/decoder/decoder_norm/scale"]
    found = problems(converter(DENSE), without(filled(DENSE), *gone), "3 problems")
    assert sorted(problem.leaf for problem in found) == sorted(gone)


def test_a_leaf_missing_from_one_unscanned_layer():
    name = "qwen3-8b.unscan"
    path = "base/decoder/layers_2/self_attention/key/kernel"
    problems(converter(name), without(filled(name), path), rf"1\. {path}: found nothing")


def test_unknown_extra_key():
    params = filled(DENSE) | {f"{LAYER}/self_attention/query/bias": np.zeros((8, 4, 16), np.float32)}
    problems(converter(DENSE), params, r"self_attention/query/bias: found shape \[8, 4, 16\], which no hook uses")


def test_wrong_shape_names_the_config_fields():
    params = filled(DENSE) | {f"{LAYER}/mlp/wo/kernel": np.zeros((96, 4, 64), np.float32)}
    expected = r"found shape \[96, 4, 64\]; expected \[96, 4, 128\] = \[mlp_dim=96, layers=4, emb_dim=128\]"
    problems(converter(DENSE), params, rf"mlp/wo/kernel: {expected}")


def test_a_stack_that_lost_a_layer():
    path = f"{LAYER}/mlp/wo/kernel"
    params = filled(DENSE) | {path: filled(DENSE)[path][:, :3]}
    problems(converter(DENSE), params, r"wo/kernel: found shape \[96, 3, 128\]; expected \[96, 4, 128\]")


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.bool_, jnp.float8_e4m3fn])
def test_integer_and_quantised_leaves(dtype):
    path = f"{LAYER}/mlp/wi_0/kernel"
    params = filled(DENSE) | {path: filled(DENSE)[path].astype(dtype)}
    name = jnp.dtype(dtype).name
    problems(
        converter(DENSE), params, rf"{path}: found dtype {name}; expected float32, bfloat16 or float16.*dequantise"
    )


def test_a_rule_that_matches_nothing():
    class WithSinks(portax.Qwen3Converter):
        def attention(self, layer):
            sinks = layer.read("self_attention/sinks", "num_query_heads")
            return (*super().attention(layer), blocks.Param("self_attn.sinks", sinks))

    layout = TpuInference(version="0.32", tp=2)
    problems(
        WithSinks(tree(DENSE).config, layout=layout),
        filled(DENSE),
        r"self_attention/sinks: found nothing; expected a leaf",
    )


def test_a_leaf_that_is_read_and_dropped():
    class Forgetful(portax.Qwen3Converter):
        def norms(self, layer):
            before, _ = super().norms(layer)
            return (before,)

    layout = TpuInference(version="0.32", tp=2)
    path = f"{LAYER}/post_self_attention_layer_norm/scale"
    problems(
        Forgetful(tree(DENSE).config, layout=layout), filled(DENSE), rf"{path}: found shape .*, which no hook uses"
    )


def test_two_hooks_that_return_the_same_weight():
    class Stutter(portax.Qwen3Converter):
        def norms(self, layer):
            return super().norms(layer) + super().norms(layer)[:1]

    layout = TpuInference(version="0.32", tp=2)
    problems(
        Stutter(tree(DENSE).config, layout=layout),
        filled(DENSE),
        r"input_layernorm.weight: found two blocks of this name",
    )


@pytest.mark.parametrize(("kv_heads", "tp"), [(3, 2), (4, 6)])
def test_kv_heads_and_tp_that_do_not_divide_either_way(kv_heads, tp):
    config = sized(DENSE, num_query_heads=12, num_kv_heads=kv_heads)
    convert = portax.converter_for(config, layout=TpuInference(version="0.32", tp=tp))
    match = rf"self_attn: KV heads = {kv_heads} and tp={tp} do not divide either way"
    with pytest.raises(portax.PlanError, match=match):
        convert.plan(convert.expected_tree())


def test_kv_heads_are_cut_before_022_so_their_columns_must_divide():
    config = sized(DENSE, num_query_heads=12, num_kv_heads=1, head_dim=16)
    convert = portax.converter_for(config, layout=TpuInference(version="0.21", tp=3))
    with pytest.raises(portax.PlanError, match=r"KV heads \* head_dim = 16 is not divisible by tp=3"):
        convert.plan(convert.expected_tree())


def test_query_heads_that_tp_does_not_divide():
    problems(converter(DENSE, tp=16), filled(DENSE), r"self_attn: query heads = 8 is not divisible by tp=16")


def test_moe_width_that_tp_does_not_divide():
    config = sized(MOE, moe_mlp_dim=90)
    convert = portax.converter_for(config, layout=TpuInference(version="0.32", tp=4))
    with pytest.raises(portax.PlanError, match=r"mlp\.experts: MoE width 90 is not divisible by tp=4"):
        convert.plan(convert.expected_tree())


def test_mlp_width_that_tp_does_not_divide():
    config = sized(DENSE, mlp_dim=97)
    convert = portax.converter_for(config, layout=TpuInference(version="0.32", tp=2))
    with pytest.raises(portax.PlanError, match=r"mlp\.gate_up_proj: a part of width 97 is not divisible by tp=2"):
        convert.plan(convert.expected_tree())


def test_experts_that_expert_parallelism_does_not_divide():
    config = sized(MOE, num_experts=6)
    convert = portax.converter_for(config, layout=TpuInference(version="0.32", tp=4, moe_backend="gmm_ep"))
    with pytest.raises(
        portax.PlanError, match=r"w13_weight: found a dimension of 6; expected one that model=4 divides"
    ):
        convert.plan(convert.expected_tree())


def test_strict_dtype_refuses_to_round():
    match = r"qkv_proj\.weight: found a narrowing cast, float32 -> bfloat16; expected none"
    problems(converter(DENSE, strict_dtype=True), filled(DENSE), match)
    with pytest.raises(portax.PlanError, match=match):
        converter(DENSE).convert(filled(DENSE), strict_dtype=True)
    exact = {path: jnp.asarray(leaf, jnp.bfloat16) for path, leaf in filled(DENSE).items()}
    assert converter(DENSE, strict_dtype=True).plan(exact).casts == {}


@pytest.mark.parametrize(
    ("name", "sizes", "match"),
    [
        (DENSE, {"num_decoder_layers": 6}, r"base/decoder: found 4 layers, \{0...3\}; expected 6 layers"),
        (DENSE, {"num_query_heads": 16}, r"query/kernel: found shape \[128, 4, 8, 16\]; expected \[128, 4, 16, 16\]"),
        (MOE, {"num_experts": 16}, r"moe_block/gate/kernel: found shape \[128, 4, 8\]; expected \[128, 4, 16\]"),
        (DENSE, {"logits_via_embedding": True}, r"logits_dense/kernel: found shape \[128, 200\], which no hook uses"),
        (TIED, {"logits_via_embedding": False}, r"logits_dense/kernel: found nothing"),
        (DENSE, {"param_scan_axis": 0}, r"found 128 layers.*expected 4 layers"),
    ],
)
def test_a_config_that_contradicts_the_tree(name, sizes, match):
    convert = portax.converter_for(sized(name, **sizes), layout=TpuInference(version="0.32", tp=2))
    problems(convert, filled(name), f"(?s){match}")


def test_a_moe_tree_with_a_dense_config():
    config = sized(DENSE)
    convert = portax.converter_for(config, layout=TpuInference(version="0.32", tp=2))
    problems(
        convert, filled(MOE), r"(?s)moe_block/wi_0: found shape .*, which no hook uses.*mlp/wo/kernel|mlp/wo/kernel"
    )


@pytest.mark.parametrize("params", [{}, {"base": {"decoder": {}}}, {"base": {"decoder": None}}])
def test_an_empty_tree(params):
    problems(
        converter(DENSE), params, "params: found an empty tree; expected a mapping that holds the model's parameters"
    )


def test_something_that_is_no_tree():
    problems(converter(DENSE), [np.zeros(3)], "params: found a list; expected a mapping")


@pytest.mark.parametrize("leaf", [3, "0.1", {1.0}, object()])
def test_leaves_that_are_no_arrays(leaf):
    params = filled(DENSE) | {"base/step": leaf}
    match = rf"base/step: found a {type(leaf).__name__}; expected an array of JAX or numpy"
    problems(converter(DENSE), params, match)


def test_a_list_of_numbers_is_no_array():
    match = r"base/scale/1: found a float; expected an array of JAX or numpy"
    problems(converter(DENSE), filled(DENSE) | {"base/scale": [1.0, 2.0]}, match)


def test_shapes_can_be_planned_but_not_converted():
    shapes = tree(DENSE).shapes
    assert converter(DENSE).plan(shapes).bytes_out > 0
    with pytest.raises(portax.PlanError, match=r"found a shape; expected an array.*shapes are enough for plan\(\)"):
        converter(DENSE).convert(shapes)


def test_a_deleted_leaf():
    params = {path: jnp.asarray(leaf) for path, leaf in filled(DENSE).items()}
    params["base/decoder/decoder_norm/scale"].delete()
    with pytest.raises(portax.PlanError, match=r"decoder_norm/scale: found a deleted array; expected a live array"):
        converter(DENSE).convert(params)


def test_leaves_on_different_devices():
    params = {path: jax.device_put(leaf, jax.devices()[0]) for path, leaf in filled(DENSE).items()}
    params["base/decoder/decoder_norm/scale"] = jax.device_put(np.zeros(128, np.float32), jax.devices()[3])
    with pytest.raises(portax.PlanError, match=r"decoder_norm/scale on \[3\].*expected all leaves on the same devices"):
        converter(DENSE).convert(params)


def test_nan_and_infinity_pass_through_unchanged():
    params = dict(filled(MOE))
    for path in (f"{LAYER}/moe_block/wi_1", f"{LAYER}/self_attention/query/kernel", "base/token_embedder/embedding"):
        params[path] = np.full_like(params[path], np.nan)
    params[f"{LAYER}/moe_block/wo"] = np.full_like(params[f"{LAYER}/moe_block/wo"], -np.inf)
    weights = converter(MOE).convert(params)
    assert jnp.isnan(weights["vllm_model.model.embed_tokens.weight"][:200]).all()
    assert (weights["vllm_model.model.layers.3.mlp.experts.routed_experts.w2_weight"] == -jnp.inf).all()
    assert jnp.isnan(weights["vllm_model.model.layers.1.mlp.experts.routed_experts.w13_weight"]).sum() == 8 * 128 * 96


@pytest.mark.parametrize("version", ["0.19", "0.19.5"])
def test_an_engine_older_than_the_table(version):
    with pytest.raises(
        portax.LayoutError, match=rf"{version} is not among the known layouts, 0.20 to 0.32; older engines"
    ):
        TpuInference(version=version, tp=2)


@pytest.mark.parametrize("version", ["0.33", "0.40.1", "1.0"])
def test_an_engine_newer_than_the_table(version):
    with pytest.raises(portax.LayoutError, match=r"may hold weights differently. Pin the engine .*allow_untested=True"):
        TpuInference(version=version, tp=2)
    layout = TpuInference(version=version, tp=2, allow_untested=True)
    plan = portax.converter_for(tree(DENSE).config, layout=layout).plan(tree(DENSE).shapes)
    assert [entry.name for entry in plan.entries] == [e.name for e in converter(DENSE).plan(tree(DENSE).shapes).entries]


@pytest.mark.parametrize("version", ["", "latest", "0", "v0.32"])
def test_something_that_is_no_version(version):
    with pytest.raises(portax.LayoutError, match="is not a version of tpu-inference"):
        TpuInference(version=version, tp=2)


@pytest.mark.parametrize("tp", [0, -1, True])
def test_something_that_is_no_tensor_parallel_size(tp):
    with pytest.raises(portax.LayoutError, match=rf"tp={tp!r} is not a positive integer"):
        TpuInference(version="0.32", tp=tp)


def test_an_unknown_moe_backend():
    with pytest.raises(portax.LayoutError, match=r"moe_backend='triton' is unknown; known: gmm_tp, gmm_ep, fused_moe"):
        TpuInference(version="0.32", tp=2, moe_backend="triton")


@pytest.mark.parametrize("size", [0, -1, True])
def test_attention_dp_that_is_no_size(size):
    with pytest.raises(portax.LayoutError, match=rf"attention_dp={size!r} is not a positive integer"):
        TpuInference(version="0.32", tp=4, attention_dp=size)


@pytest.mark.parametrize(("tp", "size"), [(4, 3), (4, 8), (1, 2)])
def test_attention_dp_that_does_not_divide_tp(tp, size):
    match = rf"attention_dp={size} does not divide tp={tp}: .* engine was asked for"
    with pytest.raises(portax.LayoutError, match=match):
        TpuInference(version="0.32", tp=tp, attention_dp=size)


@pytest.mark.parametrize("version", ["0.20", "0.31"])
def test_attention_dp_of_a_version_that_was_not_run_with_it(version):
    match = rf"attention_dp=2 is covered since tpu-inference 0.32, and this is {version}; .*NEW_MODEL_DESIGN unset"
    with pytest.raises(portax.LayoutError, match=match):
        TpuInference(version=version, tp=4, attention_dp=2)
    assert TpuInference(version="0.33", tp=4, attention_dp=2, allow_untested=True).attention_dp == 2


@pytest.mark.parametrize(
    ("axes", "missing"),
    [
        ({"data": 2, "model": 4}, "attn_dp"),
        ({"attn_dp": 2, "model": 2}, "attn_dp_expert"),
        ({"attn_dp": 4, "attn_dp_expert": 1, "expert": 1, "model": 2, "dcp": 1, "pcp": 1}, "attn_dp"),
    ],
)
def test_a_mesh_without_the_axes_of_attention_dp(axes, missing):
    layout = TpuInference(version="0.32", tp=4, attention_dp=2)
    with pytest.raises(portax.LayoutError, match=rf"pass the engine's mesh, with an axis '{missing}' of that size"):
        portax.converter_for(tree(DENSE).config, layout=layout, mesh=mesh(**axes))


def test_sizes_that_linears_or_experts_cannot_be_cut_into_under_attention_dp():
    def convert(tp, size):
        return portax.converter_for(tree(MOE).config, layout=TpuInference(version="0.32", tp=tp, attention_dp=size))

    problems(convert(32, 2), filled(MOE), r"self_attn: query heads = 8 is not divisible by tp / attention_dp=16")
    problems(convert(64, 8), filled(MOE), r"mlp\.experts: MoE width 96 is not divisible by tp=64")
    match = r"embed_tokens.weight: found a dimension of 256; expected one that attn_dp=3 \* model=8 divides"
    problems(convert(24, 3), filled(MOE), match)


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 1, "model": 8}])
def test_a_mesh_that_is_not_the_engines(axes):
    with pytest.raises(portax.LayoutError, match=r"the mesh has axes .*: pass the engine's mesh, with an axis 'model'"):
        converter(DENSE, mesh=mesh(**axes))


def test_unknown_families_are_listed():
    config = dict(tree(DENSE).config, decoder_block="mamba")
    with pytest.raises(
        portax.ConfigError, match=r"decoder_block='mamba' has no converter; known: .*qwen3 \(Qwen3Converter\)"
    ):
        portax.converter_for(config, layout=TpuInference(version="0.32", tp=2))
    with pytest.raises(portax.ConfigError, match=r"decoder_block='mamba' is not for Qwen3Converter"):
        portax.Qwen3Converter(config, layout=TpuInference(version="0.32", tp=2))


def test_no_layout_and_nothing_to_read_it_from():
    with pytest.raises(portax.LayoutError, match=r"no layout: pass layout=.*rollout_tensor_parallelism"):
        portax.Qwen3Converter(tree(DENSE).config)


def test_nothing_is_converted_in_part(compilations):
    params = {path: jnp.asarray(leaf) for path, leaf in filled(DENSE).items()}
    params["base/decoder/extra"] = jnp.zeros(3)
    with compilations.measured() as compiled, pytest.raises(portax.PlanError):
        next(converter(DENSE).stream(params, bucket_bytes=1))
    assert compiled == [0]
