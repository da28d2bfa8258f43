"""DeepSeek and Kimi-K2: what only this family has, and trees, configurations and engines that are refused."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, engine_mesh, filled, tree
from engines import scrambled

import portax
from portax.config.shipped import config_path
from portax.errors import QuantizationError
from portax.layouts import Canonical, HuggingFace, MaxTextVllm, TpuInference
from portax.testing.golden import Golden, compare

V2, V3 = "deepseek2-16b.scan", "deepseek3-671b-mla.scan"
CACHE = {"kv_cache_dtype": "fp8", "kv_scale_form": "narrow"}
TP2 = TpuInference(version="0.32", tp=2, attention_dp=2, **CACHE)
MOE = "base/decoder/moe_layers"
BIAS = f"{MOE}/DeepSeekMoeBlock_0/MoeBlock_0/gate/bias"
HUB = json.loads((GOLDEN / V3 / "config.json").read_text())
V32 = {"use_indexer": True, "indexer_n_heads": 4, "indexer_head_dim": 16}


def converter(name=V3, layout=TP2, **config):
    return portax.converter_for(dict(tree(name).config, **config), layout=layout)


def refused(match, params=None, name=V3, layout=TP2, **config):
    with pytest.raises(portax.PlanError, match=match) as caught:
        converter(name, layout, **config).plan(filled(name) if params is None else params)
    return {problem.leaf for problem in caught.value.problems}


@pytest.mark.parametrize(("dense", "name"), [(1, V3), (3, V3), (1, "deepseek3-671b-mla.unscan"), (4, V2)])
def test_a_number_of_dense_layers_that_contradicts_the_tree(dense, name):
    refused(
        f"the config says first_num_dense_layers={dense}, and the tree has another number of dense layers",
        name=name,
        first_num_dense_layers=dense,
    )


def test_a_config_whose_layers_are_all_dense():
    with pytest.raises(portax.ConfigError, match="first_num_dense_layers=5 of 5 layers: none is left for experts"):
        converter(first_num_dense_layers=5)


def test_queries_in_one_step_where_the_tree_has_two():
    leaves = refused(r"the config says q_lora_rank=0, and the tree has wq_a/kernel: one of them", q_lora_rank=0)
    assert "base/decoder/dense_layers/self_attention/query/kernel" in leaves


def test_queries_in_two_steps_where_the_tree_has_one():
    refused(r"the config says q_lora_rank=56, and the tree has query/kernel: one", name=V2, q_lora_rank=56)


def test_a_v3_without_the_routers_bias():
    lost = {path: leaf for path, leaf in filled(V3).items() if path != BIAS}
    assert refused("keeps this bias in a MoEBiasVar, which is no nnx.Param", lost) == {BIAS}


@pytest.mark.parametrize("shape", [(3, 7), (2, 8), (8, 3)])
def test_a_routers_bias_of_another_length_or_in_another_order(shape):
    other = filled(V3) | {BIAS: np.zeros(shape, np.float32)}
    assert refused(r"expected \[3, 8\] = \[layers=3, num_experts=8\]", other) == {BIAS}


def test_a_v3_whose_config_denies_the_bias():
    with pytest.raises(portax.ConfigError, match="routed_score_func='sigmoid' with routed_bias=False: V2 has softmax"):
        converter(routed_bias=False)


def test_a_v2_tree_with_a_bias_that_no_v2_has():
    name = f"{MOE}/DeepSeekMoeBlock_0/MoeBlock_0/gate/bias"
    more = filled(V2) | {name: np.zeros((3, 8), np.float32)}
    assert refused("which no hook uses", more, V2) == {name}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"mtp_num_layers": 1}, r"mtp_num_layers=1: layers that predict further tokens \(MTP\) are not converted"),
        ({"rope_interleave": False}, "rope_interleave=False: rotary pairs in another order than the hub's"),
        ({"attention_type": "global"}, "attention_type='global': all of them have latent attention"),
        ({"num_experts": 1}, "num_experts=1, shared_experts=1: all have both kinds of expert"),
        ({"use_indexer": True, "q_lora_rank": 0}, "use_indexer=True needs q_lora_rank"),
        ({"kv_lora_rank": 0}, "decoder_block='deepseek' needs kv_lora_rank"),
    ],
)
def test_configurations_that_are_refused(config, match):
    with pytest.raises(portax.ConfigError, match=match):
        converter(**config)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scoring_func": "softmax"}, "scoring_func: 'softmax', moe_layer_freq: 1; a deepseek_v3 has 'sigmoid'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: 2; a deepseek_v3 has"),
        ({"kv_lora_rank": None}, "kv_lora_rank: missing from the hub config"),
        ({"mlp_layer_types": ["dense"] + ["sparse"] * 4}, "mlp_layer_types: not 2 dense layers"),
        ({"rope_interleave": False}, "rope_interleave=False"),
    ],
)
def test_hub_configs_that_are_refused(change, match):
    with pytest.raises(portax.ConfigError, match=match):
        portax.converter_for(HUB | change, layout=TP2)


def test_groups_of_experts_are_derived_where_the_trainer_routes_by_them():
    derived = portax.derive_hub_config(config_path("deepseek3-671b"))
    assert (derived["n_group"], derived["topk_group"]) == (1, 1)
    config = {**portax.config.model_config.load(config_path("deepseek3-671b")), "n_routing_groups": 8}
    derived = portax.derive_hub_config(config | {"topk_routing_group": 4})
    assert (derived["n_group"], derived["topk_group"]) == (8, 4)
    config = {**portax.config.model_config.load(config_path("deepseek2-16b")), "n_routing_groups": 8}
    with pytest.raises(portax.ConfigError, match="n_routing_groups: 8; transformers' V2 ranks groups in another way"):
        portax.derive_hub_config(config | {"topk_routing_group": 4})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"kv_cache_dtype": "auto"},
            r"with 'auto' the engine quantises to no dtype at all: .* half of which are infin",
        ),
        ({"kv_cache_dtype": None}, "kv_cache_dtype=None: any other dtype gives other weights"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype='fp8_e5m2': any other dtype gives other weights"),
        ({"kv_scale_form": None}, "rounds scales as its compiler does: pass kv_scale_form, one of narrow, wide"),
        ({"attention_dp": None}, "has attention_dp=2, as many as tp, and the layout has attention_dp=None"),
        ({"attention_dp": 1}, "has attention_dp=2, as many as tp, and the layout has attention_dp=1"),
        ({"dtype": "float32"}, "was run with dtype bfloat16, and this is float32"),
    ],
)
def test_engines_that_were_not_run_with_latent_attention(options, match):
    layout = TpuInference(**{"version": "0.32", "tp": 2, "attention_dp": 2, **CACHE, **options})
    refused(match, layout=layout)


def v32_tree():
    sparse = converter(layout=HuggingFace(), **V32)
    shapes = sparse.expected_tree()
    random = np.random.default_rng(0)
    return sparse, {path: random.standard_normal(leaf.shape).astype(np.float32) for path, leaf in shapes.items()}


def test_v32_is_exported_with_its_indexer():
    sparse, params = v32_tree()
    weights = sparse.convert(params)
    at = "decoder/moe_layers/self_attention/indexer"
    name = "model.layers.2.self_attn.indexer"
    np.testing.assert_array_equal(
        weights[f"{name}.wq_b.weight"], params[f"{at}/wq_b/kernel"][:, 0].reshape(56, 4 * 16).T
    )
    np.testing.assert_array_equal(weights[f"{name}.wk.weight"], params[f"{at}/wk/kernel"][:, 0].T)
    np.testing.assert_array_equal(weights[f"{name}.weights_proj.weight"], params[f"{at}/weights_proj/kernel"][:, 0].T)
    for hub, own in (("weight", "scale"), ("bias", "bias")):
        np.testing.assert_array_equal(weights[f"{name}.k_norm.{hub}"], params[f"{at}/k_norm/{own}"][:, 0])
    assert portax.diff(params, sparse.restore(weights)).equal


def test_an_engine_with_v32_is_refused_by_name():
    refused("does not load DeepSeek V3.2", params=v32_tree()[1], **V32)


@pytest.mark.parametrize("name", [V2, V3, "deepseek2-16b.unscan", "deepseek3-671b-mla.unscan"])
def test_a_hub_checkpoint_is_read_back_bit_for_bit(name):
    hub = converter(name, HuggingFace())
    back = hub.restore(hub.convert(filled(name)), scanned=name.endswith(".scan"))
    assert portax.diff(filled(name), back).equal


def test_vllms_own_parameters_keep_latent_attention_in_one_matrix():
    weights, hub = (converter(layout=layout).convert(filled(V3)) for layout in (Canonical(), HuggingFace()))
    at = "model.layers.1.self_attn"
    np.testing.assert_array_equal(weights[f"{at}.kv_b_proj.weight"], hub[f"{at}.kv_b_proj.weight"])
    both = [hub[f"{at}.{part}.weight"] for part in ("q_a_proj", "kv_a_proj_with_mqa")]
    np.testing.assert_array_equal(weights[f"{at}.fused_qkv_a_proj.weight"], np.concatenate(both))


def test_the_routers_bias_stays_float32_and_is_held_twice():
    fine = filled(V3) | {BIAS: np.full((3, 8), 1 + 2**-20, np.float32)}
    weights = converter().convert(fine)
    for name in ("mlp.gate", "mlp.experts.routed_experts"):
        leaf = weights[f"vllm_model.model.layers.4.{name}.e_score_correction_bias"]
        assert leaf.dtype == jnp.float32
        assert {*np.asarray(leaf).tolist()} == {1 + 2**-20}
    hub = converter(layout=HuggingFace(dtype=jnp.bfloat16)).convert(fine)
    assert hub["model.layers.4.mlp.gate.e_score_correction_bias"].dtype == jnp.float32


def test_stacks_on_the_first_axis_and_the_routers_bias_with_them():
    moved = {
        path: np.moveaxis(leaf, 1, 0) if "_layers/" in path and path != BIAS else leaf
        for path, leaf in filled(V3).items()
    }
    golden = Golden.load(GOLDEN / V3 / "hf.json")
    weights = converter(layout=HuggingFace(), param_scan_axis=0).convert(moved)
    assert [row for row in compare(weights, golden) if row.difference] == []


def numpy_latent(kernel, key_dim):
    """In numpy and ml_dtypes, rounding by rounding: `W_UK_T`, its scale, `W_UV`, its scale."""

    def bf16(x):
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)

    def quantised(x):
        scale = bf16(np.abs(x).max(1, keepdims=True) * (np.float32(1) / np.float32(448)))
        scaled = bf16(x * bf16(np.float32(1) / scale))
        return np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn), scale

    by_head = bf16(kernel).transpose(1, 2, 0)
    key, value = by_head[:, :key_dim], by_head[:, key_dim:].transpose(0, 2, 1)
    (key, key_scale), (value, value_scale) = quantised(key), quantised(value)
    return {"W_UK_T": key, "W_UK_T_scale": key_scale, "W_UV": value, "W_UV_scale": value_scale[:, 0][None]}


def test_weights_of_the_cache_are_quantised_as_the_engine_does_it():
    """Of values that are no probe's: they have all bits, and channels of many sizes."""
    random = np.random.default_rng(7)
    path = "base/decoder/moe_layers/self_attention/wkv_b/kernel"
    kernel = (random.standard_normal((64, 3, 8, 40)) * np.exp2(random.integers(-9, 9, (1, 3, 8, 40)))).astype("float32")
    weights = converter().convert(filled(V3) | {path: kernel})
    for leaf, expected in numpy_latent(kernel[:, 1], 16).items():
        found = np.asarray(weights[f"vllm_model.model.layers.3.self_attn.mla_attn.mla_attn.{leaf}"])
        assert found.dtype == expected.dtype
        assert found.tobytes() == np.ascontiguousarray(expected).tobytes(), leaf


@pytest.mark.parametrize(
    ("column", "leaf", "value", "what"),
    [
        (0, "W_UK_T_scale", np.nan, "NaN"),
        (-1, "W_UV_scale", np.inf, "infinity"),
        (0, "W_UK_T_scale", 2.0**-120, "a scale that would be denormal"),
    ],
)
def test_latent_attention_whose_values_cannot_be_quantised_is_named(column, leaf, value, what):
    path = next(path for path in filled(V3) if path.endswith("moe_layers/self_attention/wkv_b/kernel"))
    kernel = np.array(filled(V3)[path])
    keys = slice(0, 16) if column == 0 else slice(16, None)  # of a head: its keys, then its values
    kernel[:, 0, 1, keys] = value if what.startswith("a scale") else kernel[:, 0, 1, keys]
    kernel[3, 0, 1, column] = value
    match = rf"layers\.2\.self_attn\.mla_attn\.mla_attn\.{leaf}: the values of these channels .*: {what}"
    with pytest.raises(QuantizationError, match=match):
        converter().convert(filled(V3) | {path: kernel})


def test_scales_may_stay_unrounded():
    wide = TpuInference(version="0.32", tp=2, attention_dp=2, kv_cache_dtype="fp8", kv_scale_form="wide")
    name = "vllm_model.model.layers.0.self_attn.mla_attn.mla_attn.W_UV_scale"
    fine = jax.tree.map(lambda leaf: leaf * np.float32(1.1), filled(V3))
    narrow, wide = (np.asarray(converter(layout=layout).convert(fine)[name]) for layout in (TP2, wide))
    assert (narrow != wide).any()
    np.testing.assert_array_equal(wide.astype(ml_dtypes.bfloat16).astype(np.float32), narrow)


def test_a_strict_plan_names_the_loss():
    refusal = r"W_UK_T: found a narrowing cast, float32 -> bfloat16, bfloat16 -> float8_e4m3fn"
    with pytest.raises(portax.PlanError, match=refusal):
        converter().plan(filled(V3), strict_dtype=True)


@pytest.mark.parametrize(("name", "tp"), [(V2, "8.adp8.ep"), (V3, "4.adp4")])
def test_a_sync_writes_every_leaf_in_place(name, tp):
    golden = Golden.load(GOLDEN / name / f"tpu-inference-0.32.0.tp{tp}.json")
    state = scrambled(name, tp, engine_mesh(golden.layout.tp, golden.layout.tp))
    before = {leaf: np.asarray(state[leaf]) for leaf in golden.engine_owned}
    portax.WeightSync(converter(name, golden.layout), state)(filled(name))
    assert [row for row in compare({leaf: state[leaf] for leaf in golden.leaves}, golden) if row.difference] == []
    for leaf, value in before.items():
        np.testing.assert_array_equal(np.asarray(state[leaf]), value)


def test_nothing_reads_the_models_name():
    golden = Golden.load(GOLDEN / V3 / "tpu-inference-0.32.0.tp2.adp2.json")
    weights = converter(model_name="my-model").convert(filled(V3))
    assert [row for row in compare(weights, golden) if row.difference] == []


def test_maxtexts_own_model_in_the_engine_keeps_the_trainers_names():
    layout = MaxTextVllm(version="0.2.5", tp=2, attention_dp=2)
    by_family = converter(layout=layout)
    assert isinstance(by_family, portax.DeepSeekConverter)
    lost = {path: leaf for path, leaf in filled(V3).items() if path != BIAS}
    refused("keeps this bias in a MoEBiasVar", lost, layout=layout)


def test_one_whose_config_lacks_the_sizes_of_latent_attention_goes_by_structure():
    layout = MaxTextVllm(version="0.2.5", tp=2, attention_dp=2)
    sizes = {"kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
    config = {name: value for name, value in tree(V3).config.items() if name not in sizes}
    by_structure = portax.converter_for(config, layout=layout)
    assert isinstance(by_structure, portax.MaxTextConverter)
    own = converter(layout=layout).convert(filled(V3))
    assert portax.diff(own, by_structure.convert(filled(V3))).equal
