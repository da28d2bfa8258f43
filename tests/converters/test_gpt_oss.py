"""gpt-oss: what only this family has, and trees, configurations and engines that are refused."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, engine_mesh, filled, tree
from engines import scrambled

import portax
from portax.integrations import tpu_inference
from portax.layouts import Canonical, HuggingFace, Quantization, TpuInference
from portax.testing.golden import Golden, compare

NAME = "gpt-oss-20b.scan"
TP2 = TpuInference(version="0.32", tp=2)
BLOCK = "base/decoder/layers/layers_1"
EXPERTS = "model.layers.1.mlp.experts"
HUB = json.loads((GOLDEN / NAME / "config.json").read_text())


def converter(layout=TP2, **config):
    return portax.converter_for(dict(tree(NAME).config, **config), layout=layout)


def problems(params, match, **config):
    with pytest.raises(portax.PlanError, match=match) as caught:
        converter(**config).plan(params)
    return [problem.leaf for problem in caught.value.problems]


@pytest.mark.parametrize("leaf", ["GptOssAttention/sinks", "GptOssAttention/value/bias", "GptOssMlp/gate/bias"])
def test_a_leaf_that_is_missing_in_one_slot_of_the_cycle(leaf):
    lost = {path: value for path, value in filled(NAME).items() if path != f"{BLOCK}/{leaf}"}
    assert problems(lost, "found nothing; expected a leaf of shape") == [f"{BLOCK}/{leaf}"]


def test_a_bias_that_no_gpt_oss_has():
    more = filled(NAME) | {f"{BLOCK}/pre_self_attention_layer_norm/bias": np.zeros((96, 2), np.float32)}
    assert problems(more, "which no hook uses") == [f"{BLOCK}/pre_self_attention_layer_norm/bias"]


@pytest.mark.parametrize("field", ["attention_bias", "attention_sink", "mlp_bias", "routed_bias"])
def test_a_config_without_a_bias_or_sinks(field):
    with pytest.raises(portax.ConfigError, match=f"{field}: not set, and every gpt-oss has biases in all projections"):
        converter(**{field: False})


def test_a_dense_gpt_oss():
    with pytest.raises(portax.ConfigError, match="num_experts=1: every layer of gpt-oss is a mixture of experts"):
        converter(num_experts=1)


@pytest.mark.parametrize("cycle", [1, 3])
def test_a_cycle_that_contradicts_the_sliding_windows(cycle):
    with pytest.raises(portax.ConfigError, match=f"interval={cycle}: MaxText's layers of gpt-oss take turns, sliding"):
        converter(inhomogeneous_layer_cycle_interval=cycle)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, r"full attention in layers \[1, 3\]"),
        ({"layer_types": (["sliding_attention"] * 3 + ["full_attention"])}, "full attention in the last of 4; MaxText"),
        ({"num_local_experts": None}, "num_local_experts: missing from the hub config"),
        ({"attention_bias": False}, "attention_bias: not set, and every gpt-oss has biases"),
    ],
)
def test_hub_configs_that_cannot_be(change, match):
    with pytest.raises(portax.ConfigError, match=match):
        portax.converter_for(HUB | change, layout=TP2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sliding_window_size": 0}, "sliding_window_size: 0; every second layer of gpt-oss has a window"),
        ({"mlp_activations_limit": -1.0}, "mlp_activations_limit: -1.0 has no place"),
        ({"rope_interleave": True}, "rope_interleave: True has no place"),
        ({"rope_type": "default"}, "rope_type: 'default'; models of this family have yarn"),
        ({"rope_factor": None}, "rope_factor: missing"),
    ],
)
def test_trainers_that_the_hubs_class_cannot_be(change, match):
    with pytest.raises(portax.ConfigError, match=match):
        portax.derive_hub_config(dict(tree(NAME).config) | change)


def test_the_hub_takes_turns_between_columns_of_gate_and_up():
    weights = converter(HuggingFace()).convert(filled(NAME))
    gate, up = (filled(NAME)[f"{BLOCK}/GptOssMlp/wi_{i}"][:, 0] for i in range(2))
    np.testing.assert_array_equal(weights[f"{EXPERTS}.gate_up_proj"][..., ::2], gate)
    np.testing.assert_array_equal(weights[f"{EXPERTS}.gate_up_proj"][..., 1::2], up)
    np.testing.assert_array_equal(weights[f"{EXPERTS}.gate_up_proj_bias"][..., 1::2], filled_bias("wi_1_bias"))


def filled_bias(name):
    return filled(NAME)[f"{BLOCK}/GptOssMlp/{name}"][:, 0]


def test_vllms_own_parameters_keep_the_hubs_order_under_vllms_names():
    weights = converter(Canonical()).convert(filled(NAME))
    hub = converter(HuggingFace()).convert(filled(NAME))
    np.testing.assert_array_equal(
        weights[f"{EXPERTS}.routed_experts.w13_weight"], hub[f"{EXPERTS}.gate_up_proj"].swapaxes(1, 2)
    )
    np.testing.assert_array_equal(weights[f"{EXPERTS}.routed_experts.w13_bias"], hub[f"{EXPERTS}.gate_up_proj_bias"])
    np.testing.assert_array_equal(
        weights["model.layers.3.attn.o_proj.bias"], hub["model.layers.3.self_attn.o_proj.bias"]
    )
    assert "model.embedding.weight" in weights


def test_biases_of_experts_are_rounded_to_bfloat16_before_they_are_widened():
    path = f"{BLOCK}/GptOssMlp/wo_bias"
    fine = filled(NAME) | {path: np.full((8, 2, 96), 1 + 2**-12, np.float32)}
    held = converter().convert(fine)["vllm_model.model.layers.1.mlp.experts.routed_experts.w2_bias"]
    assert held.dtype == jnp.float32
    assert np.unique(np.asarray(held)).tolist() == [1.0]


def test_and_a_strict_plan_says_so():
    with pytest.raises(portax.PlanError, match=r"w13_bias: found a narrowing cast, float32 -> bfloat16"):
        converter().plan(filled(NAME), strict_dtype=True)


@pytest.mark.parametrize("bits", [0x7FA1, 0xFFC2, 0x0001, 0x8001, 0x7F80])
def test_nans_and_denormals_of_biases_keep_their_bits(bits):
    odd = np.full((8, 2, 96), bits, np.uint16).view(jnp.bfloat16)
    params = {path: np.asarray(leaf, jnp.bfloat16) for path, leaf in filled(NAME).items()}
    held = converter().convert(params | {f"{BLOCK}/GptOssMlp/wo_bias": odd})
    leaf = np.asarray(held["vllm_model.model.layers.1.mlp.experts.routed_experts.w2_bias"])
    assert {*leaf.view(np.uint32).flat} == {bits << 16}


@pytest.mark.parametrize("scanned", [True, False])
def test_a_hub_checkpoint_is_read_back_bit_for_bit(scanned):
    name = NAME if scanned else "gpt-oss-20b.unscan"
    hub = converter(HuggingFace())
    back = hub.restore(hub.convert(filled(name)), scanned=scanned)
    assert portax.diff(filled(name), back).equal


def test_a_checkpoint_in_mxfp4():
    hub = converter(HuggingFace())
    weights = dict(hub.convert(filled(NAME)))
    for layer in range(4):
        for name in ("gate_up_proj", "down_proj"):
            packed = weights.pop(f"model.layers.{layer}.mlp.experts.{name}")
            weights[f"model.layers.{layer}.mlp.experts.{name}_blocks"] = np.zeros((8, len(packed), 16), np.uint8)
            weights[f"model.layers.{layer}.mlp.experts.{name}_scales"] = np.zeros((8, len(packed)), np.uint8)
    with pytest.raises(portax.PlanError, match=r"a checkpoint in mxfp4 \(.*gate_up_proj_blocks and _scales\): dequant"):
        hub.restore(weights)


def test_a_config_json_that_says_mxfp4_is_refused_for_an_export(tmp_path):
    config = HUB | {"quantization_config": {"quant_method": "mxfp4"}}
    with pytest.raises(portax.ConfigError, match=r"says quantization_config \(mxfp4\), and the tensors are not quanti"):
        portax.export(converter(HuggingFace()), filled(NAME), tmp_path / "hub", hub_config=config)


@pytest.mark.parametrize(
    "layout",
    [
        TpuInference(version="0.22", tp=2),
        TpuInference(version="0.32", tp=2, moe_backend="fused_moe"),
        TpuInference(
            version="0.32",
            tp=2,
            quantization=Quantization("bf16", "narrow", bf16_linear_requantize_patterns=("re:.*",)),
        ),
    ],
    ids=["old", "fused_moe", "quantised"],
)
def test_engines_that_were_not_run_with_these_biases(layout):
    with pytest.raises(
        portax.LayoutError, match="experts with biases were run with gmm_tp and gmm_ep, unquantised, since"
    ):
        layout.lower(experts())


def experts():
    gate, down = jnp.ones((8, 96, 80)), jnp.ones((8, 80, 96))
    bias = (jnp.ones((8, 80)), jnp.ones((8, 80)), jnp.ones((8, 96)))
    return portax.extend.blocks.FusedMoE("mlp.experts", gate, gate, down, hub="alternating", bias=bias)


def test_the_hub_has_no_form_of_biases_for_experts_side_by_side():
    block = portax.extend.blocks.FusedMoE(**{**vars(experts()), "hub": "stacked"})
    with pytest.raises(
        portax.LayoutError, match="on the hub, experts with biases alternate, and this form is 'stacked'"
    ):
        HuggingFace().lower(block)


def test_a_sync_writes_every_leaf_in_place():
    golden = Golden.load(GOLDEN / NAME / "tpu-inference-0.32.0.tp4.json")
    state = scrambled(NAME, 4, engine_mesh(4))
    portax.WeightSync(converter(golden.layout), state)(filled(NAME))
    assert [row for row in compare({name: state[name] for name in golden.leaves}, golden) if row.difference] == []


def engine(sinks):
    """As much of a runner as `engine_state` looks at, with attention modules as vLLM has them."""
    state = {f"vllm_model.model.layers.{layer}.attn.sinks": jnp.ones(8) for layer in range(2)}
    impl = types.SimpleNamespace(sinks=sinks)
    modules = [types.SimpleNamespace(), types.SimpleNamespace(impl=impl)]
    model = types.SimpleNamespace(model=types.SimpleNamespace(modules=lambda: modules), vllm_model=None)
    config = types.SimpleNamespace(hf_config=types.SimpleNamespace(architectures=["GptOssForCausalLM"]))
    return types.SimpleNamespace(
        state=state, state_leaves={}, model=model, vllm_config=types.SimpleNamespace(model_config=config)
    )


def test_an_engine_that_computes_with_a_copy_of_the_sinks_is_not_synced():
    match = (
        r"with a float32 copy of vllm_model.model.layers.\{0...1\}.attn.sinks that its attention made .* an export inst"
    )
    with pytest.raises(portax.SyncError, match=match):
        tpu_inference.engine_state(engine(jnp.ones(8)))


def test_one_whose_attention_reads_the_leaf_is():
    assert len(tpu_inference.engine_state(engine(None))) == 2
