"""MaxText's own model inside vLLM: every leaf of every golden, through families and by structure alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, filled, mesh, sharded, tree
from jax.sharding import PartitionSpec

import portax
from portax.layouts import MaxTextVllm
from portax.testing.golden import Golden, compare

GOLDENS = [f"{path.parent.name}/{path.name}" for path in sorted(GOLDEN.glob("*/maxtext-vllm-*.json"))]
FAMILIES = portax.converters.families()


def serves_wrong_model(layout):
    """As measured by log-probabilities: experts split over another axis, or gate and up apart, while S > 1."""
    shards = layout.mesh_axes["attn_dp"] * layout.mesh_axes["model"]
    return shards > 1 and (layout.expert_parallel > 1 or not layout.prefused)


def has_experts(name):
    return tree(name).config["num_experts"] > 1


RIGHT = [
    g for g in GOLDENS if not (has_experts(g.split("/")[0]) and serves_wrong_model(Golden.load(GOLDEN / g).layout))
]
WRONG = [g for g in GOLDENS if g not in RIGHT]


def converters(name, layout, **options):
    config = tree(name).config
    found = [portax.MaxTextConverter(config, layout=layout, **options)]
    if config["decoder_block"] in FAMILIES:
        found.append(portax.converter_for(config, layout=layout, **options))
    return found


def engine_mesh(layout):
    return mesh(data=1, **layout.mesh_axes, dcp=1, pcp=1)


def differences(weights, golden):
    return [f"{row.name}: {row.difference}" for row in compare(weights, golden) if row.difference]


@pytest.mark.parametrize("name", RIGHT)
def test_every_leaf_is_as_the_engine_holds_it(name):
    golden, source = Golden.load(GOLDEN / name), name.split("/")[0]
    for converter in converters(source, golden.layout):
        specs = {entry.name: entry.spec for entry in converter.plan(filled(source)).entries}
        assert specs == {leaf: row.spec for leaf, row in golden.leaves.items()}
        assert differences(converter.convert(filled(source)), golden) == []


@pytest.mark.parametrize("name", WRONG)
def test_what_serves_a_wrong_model_is_refused_and_made_for_comparison_alone(name):
    golden, source = Golden.load(GOLDEN / name), name.split("/")[0]
    for converter in converters(source, golden.layout):
        with pytest.raises(portax.PlanError, match=r"serves a wrong model; expected .*experts='as_loaded'"):
            converter.plan(filled(source))
    for converter in converters(source, dataclasses.replace(golden.layout, experts="as_loaded")):
        assert differences(converter.convert(filled(source)), golden) == []


PLACES = [  # one of each form of tree, and of each kind of mesh
    ("qwen3-8b.unscan", "tp8"),
    ("qwen3-30b-a3b.scan", "tp4.adp2"),
    ("qwen3-30b-a3b.unscan", "tp8"),
    ("qwen3.5-35b-a3b.scan", "tp1.ep4"),
    ("qwen3-next-80b-a3b.scan", "tp2"),
    ("gemma4-26b.scan", "tp8.adp2"),
    ("gemma4-e4b.unscan", "tp4"),
]


@pytest.mark.parametrize(("name", "size"), PLACES)
def test_a_bfloat16_trainer_that_is_spread_over_the_devices_gives_the_same(name, size):
    golden = Golden.load(GOLDEN / name / f"maxtext-vllm-0.32.0.{size}.json")
    on = engine_mesh(golden.layout)
    rounded = {path: leaf.astype(jnp.bfloat16) for path, leaf in filled(name).items()}
    for converter in converters(name, golden.layout, mesh=on):
        weights = converter.convert(sharded(rounded, mesh(fsdp=4, tensor=2)))
        assert differences(weights, golden) == []
        assert {leaf.sharding.mesh for leaf in weights.values()} == {on}


def planned(name, *, layout, config=None, params=None, by_structure=True, target=None):
    config = tree(name).config | (config or {})
    make = portax.MaxTextConverter if by_structure else portax.converter_for
    return make(config, layout=layout).plan(tree(name).shapes if params is None else params, target)


def held(name, size):
    """A live engine's leaves as a golden says: shapes and dtypes, its own included."""
    rows = portax.testing.golden._load(GOLDEN / name / f"maxtext-vllm-0.32.0.{size}.json")["leaves"]
    return {leaf: jax.ShapeDtypeStruct(tuple(row["shape"]), jnp.dtype(row["dtype"])) for leaf, row in rows.items()}


MOE = "qwen3-30b-a3b.scan"


@pytest.mark.parametrize(
    ("name", "size"), [(MOE, "tp4"), ("qwen3.5-35b-a3b.scan", "tp2"), ("deepseek3-671b.unscan", "tp4.adp2")]
)
def test_leaves_of_the_engines_own_are_told_by_name(name, size):
    golden = Golden.load(GOLDEN / name / f"maxtext-vllm-0.32.0.{size}.json")
    plan = planned(name, layout=golden.layout, target=held(name, size))
    assert {*plan.engine_owned} == {*golden.engine_owned}


def test_whole_experts_are_all_of_gate_then_all_of_up_each_padded_at_its_end():
    layout = MaxTextVllm(version="0.2.5", tp=2, expert_parallel=2, experts="whole")
    params = filled(MOE)
    gate, up, down = (params[f"base/decoder/layers/moe_block/{name}"][:, 1] for name in ("wi_0", "wi_1", "wo"))
    for converter in converters(MOE, layout):
        weights = converter.convert(params)
        padding = ((0, 0), (0, 0), (0, 512 - gate.shape[2]))
        fused = np.concatenate([np.pad(gate, padding), np.pad(up, padding)], axis=2)
        at = "model.decoder.layers_1.moe_block"
        np.testing.assert_array_equal(weights[f"{at}.wi"], fused.astype(jnp.bfloat16))
        wo = np.pad(down, ((0, 0), (0, 512 - gate.shape[2]), (0, 0)))
        np.testing.assert_array_equal(weights[f"{at}.wo"], wo.astype(jnp.bfloat16))


@pytest.mark.parametrize("options", [{"tp": 2}, {"tp": 2, "expert_parallel": 2, "prefused": False}])
def test_whole_experts_are_refused_where_the_engine_cuts_every_expert(options):
    with pytest.raises(portax.PlanError, match="experts='whole' is for experts that expert_parallel > 1 splits"):
        planned(MOE, layout=MaxTextVllm(version="0.2.5", experts="whole", **options))


def test_a_custom_block_needs_to_be_told_how_the_engine_cuts_it():
    shape = jax.ShapeDtypeStruct((128, 4, 64), np.float32)
    params = {**tree(MOE).shapes, "base/decoder/layers/mixer/in/kernel": shape}
    config = {"decoder_block": "custom_moe"}
    layout = MaxTextVllm(version="0.2.5", tp=2)
    with pytest.raises(portax.PlanError, match=r"mixer\.in\.kernel: no rule says how the engine cuts \[128, 64\]"):
        planned(MOE, layout=layout, config=config, params=params)
    told = dataclasses.replace(layout, specs=((r"mixer\.in\.kernel", PartitionSpec(None, "model")),))
    plan = portax.converter_for(tree(MOE).config | config, layout=told).plan(params)
    [entry] = [entry for entry in plan.entries if entry.name == "model.decoder.layers_2.mixer.in.kernel"]
    assert (entry.shape, entry.spec) == ((128, 64), PartitionSpec(None, "model"))


@pytest.mark.parametrize("by_structure", [True, False])
@pytest.mark.parametrize(
    ("path", "size", "options", "message"),
    [
        (
            "token_embedder/embedding",
            "vocab_size=330",
            {"tp": 4},
            r"model\.token_embedder\.embedding: .*330.*model=4 divides",
        ),
        (
            "",
            "",
            {"tp": 8, "expert_parallel": 2},
            r"query\.kernel: found a dimension of 8; expected one that model=8 \* expert=2 divides",
        ),
        (
            "",
            "",
            {"tp": 1, "expert_parallel": 16},
            r"moe_block\.wi: found a dimension of 8; expected one that expert=16 divides",
        ),
        ("", "", {"tp": 64}, r"MoE width 96 is not divisible by attn_dp \* model=64"),
    ],
)
def test_sizes_that_do_not_fit_are_named(by_structure, path, size, options, message):
    params, config = dict(tree(MOE).shapes), {}
    if path:
        axis, value = size.split("=")
        config = {axis: int(value)}
        params["base/token_embedder/embedding"] = jax.ShapeDtypeStruct((int(value), 128), np.float32)
        params["base/decoder/logits_dense/kernel"] = jax.ShapeDtypeStruct((128, int(value)), np.float32)
    layout = MaxTextVllm(version="0.2.5", experts="as_loaded", **options)
    with pytest.raises(portax.PlanError, match=message):
        planned(MOE, layout=layout, config=config, params=params, by_structure=by_structure)


def test_kv_heads_that_cannot_be_repeated_are_named():
    params = dict(tree(MOE).shapes)
    for name in ("key", "value"):
        params[f"base/decoder/layers/self_attention/{name}/kernel"] = jax.ShapeDtypeStruct((128, 4, 3, 16), np.float32)
    with pytest.raises(portax.PlanError, match=r"key\.kernel: 3 KV heads cannot be repeated for model \* expert=8"):
        planned(MOE, layout=MaxTextVllm(version="0.2.5", tp=8), params=params)


def test_experts_that_are_not_complete_are_named():
    params = {path: leaf for path, leaf in tree(MOE).shapes.items() if not path.endswith("wi_1")}
    for by_structure in (True, False):
        with pytest.raises(portax.PlanError, match=r"layers/moe_block/wi_1: found nothing"):
            planned(MOE, layout=MaxTextVllm(version="0.2.5", tp=2), params=params, by_structure=by_structure)


def test_a_router_bias_that_a_filter_left_behind_is_missed_without_an_engine():
    name, layout = "deepseek3-671b.unscan", MaxTextVllm(version="0.2.5", tp=4, attention_dp=2)
    whole, config = tree(name).shapes, {"routed_bias": True}
    params = {path: leaf for path, leaf in whole.items() if not path.endswith("gate/bias")}
    assert len(planned(name, layout=layout, config=config).entries) > len(
        planned(name, layout=layout, params=params).entries
    )
    with pytest.raises(portax.PlanError, match=r"gate/bias: found nothing; .*routed_bias=True.*in a MoEBiasVar, which"):
        planned(name, layout=layout, config=config, params=params)
    assert planned("qwen3.5-35b-a3b.scan", layout=MaxTextVllm(version="0.2.5", tp=2)).entries


def test_a_leaf_that_the_family_does_not_know_is_left_over_and_named():
    params = {**tree(MOE).shapes, "base/decoder/layers/adapter/kernel": jax.ShapeDtypeStruct((128, 4, 8), np.float32)}
    with pytest.raises(portax.PlanError, match=r"layers/adapter/kernel: found shape \[128, 4, 8\], which no hook uses"):
        planned(MOE, layout=MaxTextVllm(version="0.2.5", tp=2), params=params, by_structure=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "0.3.0", "tp": 2}, r"MaxText '0\.3\.0' is not among the versions .*0\.2\.5.*allow_untested=True"),
        ({"version": "0.2.5", "tp": 0}, "tp=0 is not a positive integer"),
        ({"version": "0.2.5", "tp": 4, "attention_dp": 3}, "attention_dp=3 does not divide tp=4"),
        ({"version": "0.2.5", "tp": 4, "experts": "shuffled"}, "experts='shuffled' is unknown; known: per_shard"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(options, message):
    with pytest.raises(portax.LayoutError, match=message):
        MaxTextVllm(**options)


def test_an_untested_version_is_taken_for_the_known_one_if_it_is_allowed():
    assert planned(MOE, layout=MaxTextVllm(version="0.3.0", tp=2, allow_untested=True)).entries


def test_gpt_oss_is_refused_by_name():
    expert_biases = {"base/decoder/layers/moe_block/wo_bias": jax.ShapeDtypeStruct((8, 4, 128), np.float32)}
    with pytest.raises(portax.PlanError, match=r"MaxText 0\.2\.5 cannot boot gpt-oss in vLLM"):
        planned(MOE, layout=MaxTextVllm(version="0.2.5", tp=2), params={**tree(MOE).shapes, **expert_biases})
    with pytest.raises(portax.LayoutError, match=r"MaxText 0\.2\.5 cannot boot gpt-oss in vLLM"):
        MaxTextVllm(version="0.2.5", tp=2).for_architecture("GptOssForCausalLM")


def test_a_mesh_of_two_axes_is_refused():
    with pytest.raises(portax.LayoutError, match="pass the engine's mesh, with an axis 'attn_dp' of that size"):
        portax.converter_for(tree(MOE).config, layout=MaxTextVllm(version="0.2.5", tp=2), mesh=mesh(data=4, model=2))


def test_structure_alone_has_no_names_for_other_engines():
    with pytest.raises(portax.ConfigError, match="needs the converter of its family"):
        portax.MaxTextConverter(tree(MOE).config, layout=portax.layouts.HuggingFace())
