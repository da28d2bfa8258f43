"""Tree forms without a golden, and bad trees, of the families that have more than one kind of layer."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, filled, tree

import portax
from portax.execution import scale_check
from portax.layouts import TpuInference
from portax.testing.golden import Golden, compare

TP2 = TpuInference(version="0.32", tp=2)
MLA = TpuInference(version="0.32", tp=2, attention_dp=2, kv_cache_dtype="fp8", kv_scale_form="narrow")
CYCLES = {"gemma4-26b": 6, "gemma4-31b": 6, "gemma3-4b": 6, "qwen3.5-35b-a3b": 4, "qwen3-next-80b-a3b": 4}


def sized(config, **sizes):
    config = dict(config)
    for key, value in sizes.items():
        config |= {k: value for k in (key, f"base_{key}") if k in config}
    return config


def unscanned(name, depth):
    """The global leaves, and the leaves of the first layers, of an unscanned tree."""
    outside, layers = {}, [{} for _ in range(depth)]
    for path, leaf in filled(f"{name}.unscan").items():
        match = re.fullmatch(r"base/decoder/layers_(\d+)/(.+)", path)
        if match is None:
            outside[path] = leaf
        elif int(match[1]) < depth:
            layers[int(match[1])][match[2]] = leaf
    return outside, layers


def stacked(layers, axis):
    return {path: np.stack([layer[path] for layer in layers], axis) for path in layers[0]}


def below(container, leaves):
    return {f"base/decoder/{container}/{path}": leaf for path, leaf in leaves.items()}


def by_slot(block, prefix, layers, cycle, axis):
    """A stack for each layer of the cycle; the rest of the layers by themselves."""
    whole = len(layers) // cycle * cycle
    tree = {}
    for slot in range(cycle):
        tree |= below(f"{block}/{prefix}{slot}", stacked(layers[slot:whole:cycle], axis))
    for slot, layer in enumerate(layers[whole:]):
        tree |= below(f"layers_remainder/{prefix}{slot}", layer)
    return tree


def nested(block, layers, cycle, axis):
    """Two scan axes for all layers of the cycle but the last; one for the last ones."""
    whole = len(layers) // cycle * cycle
    local = [stacked(layers[i : i + cycle - 1], axis) for i in range(0, whole, cycle)]
    tree = below(f"{block}/local_layers", stacked(local, axis))
    tree |= below(f"{block}/global_layer", stacked(layers[cycle - 1 : whole : cycle], axis))
    if layers[whole:]:
        tree |= below("layers_remainder/local_layers", stacked(layers[whole:], axis))
    return tree


FORMS = {
    "nested": lambda name, layers, axis: nested(block(name), layers, CYCLES[name], axis),
    "layers_N": lambda name, layers, axis: by_slot(block(name), "layers_", layers, CYCLES[name], axis),
    "layer_N": lambda name, layers, axis: by_slot(block(name), "layer_", layers, CYCLES[name], axis),
}


def block(name):
    return "scanned_blocks" if name.startswith("gemma4") else "layers"


@pytest.mark.parametrize(("form", "axis"), [("nested", 0), ("nested", 1), ("layers_N", 1), ("layer_N", 0)])
@pytest.mark.parametrize("name", CYCLES)
def test_every_form_of_a_tree_converts_to_the_same_bytes(name, form, axis):
    golden = Golden.load(GOLDEN / f"{name}.unscan/tpu-inference-0.32.0.tp2.json")
    config = tree(f"{name}.unscan").config
    outside, layers = unscanned(name, config["num_decoder_layers"])
    converter = portax.converter_for(dict(config, param_scan_axis=axis), layout=TP2)
    weights = converter.convert(outside | FORMS[form](name, layers, axis))
    assert [row for row in compare(weights, golden) if row.difference] == []


@pytest.mark.parametrize(
    ("name", "depth"),
    [("gemma4-31b", 11), ("gemma4-31b", 7), ("gemma4-26b", 4), ("gemma3-4b", 9), ("qwen3-next-80b-a3b", 7)],
)
def test_depths_that_are_no_multiple_of_the_cycle(name, depth):
    golden = Golden.load(GOLDEN / f"{name}.unscan/tpu-inference-0.32.0.tp2.json")
    config = sized(tree(f"{name}.unscan").config, num_decoder_layers=depth)
    outside, layers = unscanned(name, depth)
    form = "layers_N" if name == "gemma3-4b" else "nested"
    if depth < CYCLES[name]:
        params = outside | below("layers_remainder/local_layers", stacked(layers, 1))
    else:
        params = outside | FORMS[form](name, layers, 1)
    weights = portax.converter_for(config, layout=TP2).convert(params)
    kept = {row.name for row in compare(weights, golden) if row.difference == ""}
    assert kept == set(weights)
    assert {int(n) for leaf in kept for n in re.findall(r"layers\.(\d+)\.", leaf)} == set(range(depth))
    implied = portax.converter_for(config, layout=TP2).expected_tree()
    assert implied.keys() == {path.removeprefix("base/") for path in params}


@pytest.mark.parametrize("name", ["gemma4-26b.scan", "gemma4-e2b.unscan", "qwen3.5-35b-a3b.scan", "gpt-oss-20b.scan"])
def test_nothing_reads_the_models_name(name):
    golden = Golden.load(GOLDEN / name / "tpu-inference-0.32.0.tp2.json")
    converter = portax.converter_for(dict(tree(name).config, model_name="my-model"), layout=TP2)
    assert [row for row in compare(converter.convert(filled(name)), golden) if row.difference] == []


@pytest.mark.parametrize(
    ("name", "programs"),
    [
        ("gemma4-26b.scan", 3),
        ("gemma4-31b.scan", 3),
        ("gemma4-31b.unscan", 3),
        ("gemma3-4b.unscan", 2),
        ("gemma4-e2b.unscan", 5),
        ("gemma4-e4b.unscan", 5),
        ("qwen3.5-35b-a3b.scan", 3),
        ("qwen3-next-80b-a3b.scan", 3),
        ("qwen2.5-7b.scan", 2),
        ("gpt-oss-20b.scan", 2),
        ("gpt-oss-20b.unscan", 2),
        ("deepseek3-671b-mla.scan", 3 + 1),  # one looks at the scales
        ("deepseek2-16b.unscan", 3 + 1),
    ],
)
def test_a_program_for_each_kind_of_layer_and_none_the_second_time(name, programs, compilations):
    converter = portax.converter_for(tree(name).config, layout=MLA if name.startswith("deepseek") else TP2)
    params = {path: jnp.asarray(leaf) for path, leaf in filled(name).items()}
    scale_check._all_finite.clear_cache()  # an earlier test may have made it
    for expected in (programs, 0):
        with compilations.measured() as compiled:
            converter.convert(params)
        assert compiled == [expected]


def problems(name, params, match, **config):
    converter = portax.converter_for(sized(dict(tree(name).config, **config), **config), layout=TP2)
    with pytest.raises(portax.PlanError, match=match) as caught:
        converter.convert(params)
    return caught.value.problems


def dropped(params, pattern):
    return {path: leaf for path, leaf in params.items() if not re.search(pattern, path)}


GEMMA, HYBRID = "gemma4-26b.scan", "qwen3.5-35b-a3b.scan"


def test_a_missing_layer_scalar():
    [problem] = problems(
        GEMMA, dropped(filled(GEMMA), "local_layers/layer_scalar"), "nothing; expected a leaf of shape"
    )
    assert problem.leaf == "base/decoder/scanned_blocks/local_layers/layer_scalar"


def test_a_local_layer_without_values_is_no_global_layer():
    [problem] = problems(GEMMA, dropped(filled(GEMMA), "local_layers/.*value"), "found nothing")
    assert problem.leaf == "base/decoder/scanned_blocks/local_layers/self_attention/value/kernel"


def test_an_unscanned_layer_without_keys_shares_none():
    name = "gemma4-e2b.unscan"
    lost = "layers_2/self_attention/(key|value)"
    found = problems(name, dropped(filled(name), lost), "found nothing")
    assert {problem.leaf.removeprefix("base/decoder/layers_2/self_attention/") for problem in found} == {
        "key/kernel",
        "key_norm/scale",
        "value/kernel",
    }


def test_more_shared_layers_than_the_config_has():
    name = "gemma4-e2b.unscan"
    found = problems(
        name, filled(name), "layers_4/self_attention/key/kernel.* which no hook uses", num_kv_shared_layers=6
    )
    assert {re.search(r"layers_\d+", problem.leaf)[0] for problem in found} == {"layers_4"}


def test_a_local_global_split_that_contradicts_the_config():
    found = problems(
        "gemma4-31b.unscan",
        filled("gemma4-31b.unscan"),
        r"expected \[128, 8, 32\] = \[emb_dim=128, num_query_heads=8, global_head_dim=32\] in a full_attention layer",
        inhomogeneous_layer_cycle_interval=5,
    )
    values = {problem.leaf: problem.found for problem in found if "/value/" in problem.leaf}
    assert values == {
        "base/decoder/layers_{4,9}/self_attention/value/kernel": "shape [128, 4, 16], which no hook uses",
        "base/decoder/layers_{5,11}/self_attention/value/kernel": "nothing",
    }


def test_global_heads_of_another_width():
    found = problems(
        GEMMA, filled(GEMMA), r"found shape \[8, 2, 32, 128\]; expected \[8, 2, 64, 128\]", global_head_dim=64
    )
    assert all("global_layer/self_attention" in problem.leaf for problem in found)


def test_keys_that_the_config_does_not_share():
    [problem] = problems(GEMMA, filled(GEMMA), "found nothing; expected a leaf of shape", share_kv_projections=False)
    assert problem.leaf == "base/decoder/scanned_blocks/global_layer/self_attention/value/kernel"


def test_a_tree_of_two_maxtext_versions():
    outside, layers = unscanned("gemma4-31b", 12)
    both = nested("scanned_blocks", layers, 6, 1) | by_slot("scanned_blocks", "layers_", layers, 6, 1)
    [problem] = problems("gemma4-31b.unscan", outside | both, "stacks of several forms")
    assert problem.leaf == "base/decoder/scanned_blocks"
    assert "base/decoder/scanned_blocks/layers_{0...5}/" in problem.found


def test_layers_both_scanned_and_not():
    outside, layers = unscanned("gemma4-31b", 12)
    both = nested("scanned_blocks", layers, 6, 1) | below("layers_3", layers[3])
    problems("gemma4-31b.unscan", outside | both, r"layers 3 twice; expected 12 layers")


def test_a_shared_expert_without_its_gate():
    [problem] = problems(HYBRID, dropped(filled(HYBRID), "layer_1/mlp/shared_expert_gate"), "found nothing")
    assert problem.leaf == "base/decoder/layers/layer_1/mlp/shared_expert_gate/kernel"


def test_a_shared_expert_that_the_config_does_not_have():
    found = problems(HYBRID, filled(HYBRID), "which no hook uses", shared_experts=0)
    assert {re.search(r"shared_expert\w*", problem.leaf)[0] for problem in found} == {
        "shared_expert",
        "shared_expert_gate",
    }


def test_per_expert_scales_of_another_length():
    path = "base/decoder/scanned_blocks/global_layer/mlp/moe_block/MoeBlock_0/per_expert_scale"
    params = filled(GEMMA) | {path: np.ones((7, 2), np.float32)}
    [problem] = problems(GEMMA, params, r"found shape \[7, 2\]; expected \[8, 2\] = \[num_experts=8, layers=2\]")
    assert problem.leaf == path


@pytest.mark.parametrize(("name", "depth"), [(GEMMA, 13), (GEMMA, 18), (HYBRID, 10), ("qwen3-next-80b-a3b.scan", 6)])
def test_a_depth_that_is_not_the_trees(name, depth):
    problems(name, filled(name), rf"layers, .*; expected {depth} layers", num_decoder_layers=depth)


def test_a_dense_config_for_experts():
    found = problems(GEMMA, filled(GEMMA), "which no hook uses", num_experts=1)
    assert any(problem.leaf.endswith("moe_block/MoeBlock_0/wi_0") for problem in found)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (GEMMA, {"use_multimodal": True}, "use_multimodal: the weights of other modalities are not converted"),
        (HYBRID, {"gdn_num_value_heads": 12}, "gdn_num_value_heads: 12 is no multiple of gdn_num_key_heads: 8"),
        (HYBRID, {"gdn_conv_kernel_dim": 0}, "decoder_block='qwen3_5' needs gdn_conv_kernel_dim"),
        ("gemma4-e4b.unscan", {"hidden_size_per_layer_input": 0}, "needs hidden_size_per_layer_input"),
        ("llama3.1-8b.scan", {"rope_type": "default"}, "rope_type='default' leaves open .* set rope_type: llama3.1 in"),
        ("llama3-8b.scan", {"rope_type": ""}, "rope_type='default' leaves open .* Llama 2 and 3.0 in halves"),
        ("llama3-8b.scan", {"rope_type": "yarn"}, "rope_type='yarn' leaves open in which order"),
        ("llama3-8b.scan", {"rope_type": "llama3"}, "rope_type='llama3': rotary frequencies that are not scaled as"),
        ("llama3-8b.scan", {"model_name": "llama3.3-70b"}, "a llama3.1-. or llama3.3-. that has no more than the def"),
        ("llama3-8b.scan", {"attention_bias": True}, "attention_bias=True: no Llama has biases"),
        ("mistral-7b.scan", {"rope_type": "llama3.1"}, "rope_type='llama3.1': the hub's mistral has unscaled"),
        ("mistral-7b.scan", {"attention_bias": True}, "attention_bias=True: no mistral has biases"),
        ("mixtral-8x7b.scan", {"rope_type": "yarn"}, "rope_type='yarn': the hub's mixtral has unscaled"),
        ("mixtral-8x7b.scan", {"num_experts": 1}, "num_experts=1: every layer of Mixtral is a mixture of experts"),
        ("gemma2-2b.scan", {"attention_bias": True}, "no Gemma2 is like that"),
        ("gemma2-2b.scan", {"logits_via_embedding": False}, "no Gemma2 is like that"),
        ("olmo3-7b.scan", {"inhomogeneous_layer_cycle_interval": 2}, "every fourth layer of OLMo3 has full attention"),
        ("olmo3-7b.scan", {"attention_bias": True}, "attention_bias=True: no OLMo3 has biases"),
        (GEMMA, {"decoder_block": "gemma5"}, r"'gemma5' has no converter; known: .*gemma4 \(Gemma4Converter\)"),
    ],
)
def test_configs_that_no_tree_could_mend(name, change, match):
    with pytest.raises(portax.ConfigError, match=match):
        portax.converter_for(dict(tree(name).config, **change), layout=TP2)


def test_experts_in_a_family_that_has_none():
    config = sized(tree("qwen2.5-7b.scan").config, num_experts=8, moe_mlp_dim=96)
    converter = portax.converter_for(config, layout=TP2)
    with pytest.raises(portax.ConfigError, match="num_experts=8: Qwen2Converter converts no mixtures of experts"):
        converter.plan(filled("qwen2.5-7b.scan"))


def test_gemma4_small_without_a_tree_or_a_cycle():
    converter = portax.converter_for(tree("gemma4-e4b.unscan").config, layout=TP2)
    with pytest.raises(portax.ConfigError, match=r"5 .E2B. or 6 layers .E4B., and this config does not say which"):
        converter.expected_tree()
