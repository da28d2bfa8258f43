"""Plans: what they say, and what they find wrong with a live engine's state."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, TREES, engine_mesh, filled, tree
from engines import engine_state
from jax.sharding import NamedSharding, PartitionSpec

import portax
from portax.layouts import TpuInference
from portax.testing.golden import Golden

MOE, DENSE, TIED = "qwen3-30b-a3b.scan", "qwen3-8b.scan", "qwen3-0.6b.scan"
TP2 = TpuInference(version="0.32", tp=2)
QKV = "vllm_model.model.layers.1.self_attn.qkv_proj.weight"


def converter(name, layout=TP2):
    return portax.converter_for(tree(name).config, layout=layout)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("tp", [2, 8])
def test_a_plan_against_the_live_engine(name, tp):
    plan = converter(name, TpuInference(version="0.32", tp=tp)).plan(tree(name).shapes, engine_state(name, tp))
    golden = Golden.load(GOLDEN / name / f"tpu-inference-0.32.0.tp{tp}.json")
    assert {entry.name: (entry.shape, entry.dtype.name, entry.spec) for entry in plan.entries} == {
        leaf: (row.shape, row.dtype, row.spec) for leaf, row in golden.leaves.items()
    }
    assert plan.engine_owned == golden.engine_owned


def test_planning_again_finds_the_same():
    """Sources are read off the traced program, not recorded on the way: a cached trace must not lose them."""
    convert = converter(MOE)
    first, second = convert.plan(tree(MOE).shapes), convert.plan(dict(tree(MOE).shapes), engine_state(MOE))
    assert first.entries == second.entries


def test_every_entry_names_the_leaves_it_is_made_of():
    sources = {entry.name: entry.sources for entry in converter(MOE).plan(filled(MOE)).entries}
    at = "base/decoder/layers"
    assert sources[QKV] == tuple(f"{at}/self_attention/{part}/kernel" for part in ("key", "query", "value"))
    w13 = "vllm_model.model.layers.1.mlp.experts.routed_experts.w13_weight"
    assert sources[w13] == (f"{at}/moe_block/wi_0", f"{at}/moe_block/wi_1")
    assert sources["vllm_model.lm_head.weight"] == ("base/decoder/logits_dense/kernel",)


def test_ties_and_bytes():
    plan = converter(TIED).plan(tree(TIED).shapes)
    assert plan.ties == {"vllm_model.lm_head.weight": "vllm_model.model.embed_tokens.weight"}
    assert plan.bytes_in == sum(leaf.nbytes for leaf in filled(TIED).values())
    weights = converter(TIED).convert(filled(TIED))
    assert plan.bytes_out == sum(leaf.nbytes for leaf in weights.values())
    assert plan.bytes_in + plan.bytes_out < plan.peak_bytes < plan.bytes_in + 3 * plan.bytes_out


@pytest.mark.parametrize(("version", "leaves"), [("0.27", 34), ("0.28", 35)])
def test_a_tied_head_is_a_leaf_from_028(version, leaves):
    plan = converter(TIED, TpuInference(version=version, tp=2)).plan(tree(TIED).shapes)
    assert len(plan.entries) == leaves
    assert bool(plan.ties) == (leaves == 35)


def test_narrowing_casts_are_listed_and_widening_ones_are_not():
    assert list(converter(DENSE).plan(filled(DENSE)).casts) == ["float32 -> bfloat16"]
    halves = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.float16) for path, leaf in filled(DENSE).items()}
    assert list(converter(DENSE).plan(halves).casts) == ["float16 -> bfloat16"]
    wide = portax.layouts.HuggingFace(dtype=jnp.float32)
    assert converter(DENSE, wide).plan(halves).casts == {}
    [mixed] = [
        entry
        for entry in converter(DENSE, wide)
        .plan(filled(DENSE) | {"base/decoder/decoder_norm/scale": jax.ShapeDtypeStruct((128,), np.float64)})
        .entries
        if entry.casts
    ]
    assert mixed.casts == ("float64 -> float32",)


def test_the_table_folds_layers_and_lists_what_matters():
    state = converter(TIED).plan(tree(TIED).shapes, engine_state(TIED))
    text = str(state)
    for line in (
        "vllm_model.model.layers.{0...3}.self_attn.qkv_proj.weight ",
        "[128, 192]",
        "P(None, 'model')",
        "base/decoder/layers/mlp/wi_0/kernel",
        "cast          float32 -> bfloat16: 35 leaves",
        "tied          vllm_model.lm_head.weight repeats vllm_model.model.embed_tokens.weight",
        "engine-owned  vllm_model.model.layers.{0...3}.self_attn.attn._k_scale",
        "planned peak  ",
    ):
        assert line in text
    assert "layers.2." not in text


def test_json_holds_all_of_it():
    plan = converter(TIED).plan(tree(TIED).shapes)
    read = json.loads(plan.to_json())
    assert read["bytes_out"] == plan.bytes_out == sum(entry["bytes"] for entry in read["entries"].values())
    assert read["entries"][QKV]["spec"] == [None, "model"]
    assert read["entries"]["vllm_model.lm_head.weight"]["tied_to"] == "vllm_model.model.embed_tokens.weight"


def test_nested_engine_states_are_read_too():
    nested = {}
    for name, leaf in engine_state(DENSE).items():
        node = nested
        *parents, last = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    assert converter(DENSE).plan(tree(DENSE).shapes, nested).entries


def test_every_difference_from_the_engine_is_listed():
    state = engine_state(DENSE)
    leaf = state[QKV]
    spec = NamedSharding(engine_mesh(2), PartitionSpec("model", None))
    o_proj = "vllm_model.model.layers.0.self_attn.o_proj.weight"
    down = "vllm_model.model.layers.2.mlp.down_proj.weight"
    state[QKV] = jax.ShapeDtypeStruct(leaf.shape[::-1], leaf.dtype)
    state[down] = jax.ShapeDtypeStruct(state[down].shape, jnp.float32)
    state["vllm_model.lm_head.weight"] = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16, sharding=spec)
    state["vllm_model.model.layers.4.input_layernorm.weight"] = leaf
    del state[o_proj]
    state["vllm_model.model.norm.weight"] = jax.ShapeDtypeStruct(
        (128,), jnp.bfloat16, sharding=NamedSharding(engine_mesh(2), PartitionSpec("model"))
    )
    with pytest.raises(portax.PlanError) as raised:
        converter(DENSE).plan(tree(DENSE).shapes, state)
    text = str(raised.value)
    assert text.startswith("5 problems")
    for line in (
        f"{QKV}: found bfloat16[192, 128] in the engine; expected bfloat16[128, 192] from the layout",
        f"{down}: found float32[96, 128] in the engine; expected bfloat16[96, 128] from the layout",
        "layers.4.input_layernorm.weight: found a leaf of the engine that nothing writes",
        f"{o_proj}: found no such leaf in the engine; expected bfloat16[128, 128]",
        "vllm_model.model.norm.weight: found P('model') on {'data': 4, 'model': 2} in the engine",
    ):
        assert line in text


def test_another_tensor_parallel_size_than_the_engines():
    with pytest.raises(
        portax.PlanError, match=r"qkv_proj.weight: found bfloat16\[128, 384\].*tp, moe_backend, attention_dp, version"
    ):
        converter(DENSE).plan(tree(DENSE).shapes, engine_state(DENSE, tp=8))
    same_shapes = engine_state(DENSE, tp=1)
    with pytest.raises(
        portax.PlanError, match=r"1\. the engine's mesh: found model=1 in .*; expected model=2 from the layout"
    ):
        converter(DENSE).plan(tree(DENSE).shapes, same_shapes)
