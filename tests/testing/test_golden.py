"""Every leaf of every golden: what the real engine held, and what MaxText's own exporter wrote."""

import jax.numpy as jnp
import pytest
from conftest import GOLDEN, TREES, engine_mesh, filled, mesh, sharded, tree
from jax.sharding import NamedSharding

import portax
from portax.testing.golden import Golden, compare

MLA = [f"{name}.{form}" for name in ("deepseek2-16b", "deepseek3-671b-mla") for form in ("scan", "unscan")]
ENGINES = [
    (name, path.name) for name in [*TREES, *MLA] for path in sorted((GOLDEN / name).glob("tpu-inference-0*.json"))
]


def differences(weights, golden):
    return [f"{row.name}: {row.difference}" for row in compare(weights, golden) if row.difference]


SPREAD = [  # what test_sync.py, which syncs every family from and to eight devices, has not
    ("gemma4-26b.scan", "tpu-inference-0.32.0.tp8.json"),
    *(("qwen3-30b-a3b.scan", f"tpu-inference-0.32.0.{tp}.json") for tp in ("tp8", "tp4.ep", "tp4.fused")),
    ("qwen3-30b-a3b.scan", "tpu-inference-0.20.0.tp8.json"),
    ("qwen3-8b.unscan", "tpu-inference-0.32.0.tp8.json"),
    ("qwen2.5-7b.scan", "tpu-inference-0.32.0.tp8.json"),
    ("deepseek2-16b.scan", "tpu-inference-0.32.0.tp8.adp8.json"),
    ("deepseek3-671b-mla.scan", "tpu-inference-0.32.0.tp4.adp4.ep.json"),
]


@pytest.mark.parametrize(("name", "file"), ENGINES, ids=["/".join(pair) for pair in ENGINES])
def test_reproduces_the_engines_state(name, file):
    golden = Golden.load(GOLDEN / name / file)
    converter = portax.converter_for(tree(name).config, layout=golden.layout)
    specs = {entry.name: entry.spec for entry in converter.plan(filled(name)).entries}
    assert specs == {leaf: row.spec for leaf, row in golden.leaves.items()}
    assert differences(converter.convert(filled(name)), golden) == []


@pytest.mark.parametrize(("name", "file"), SPREAD, ids=["/".join(pair) for pair in SPREAD])
def test_reproduces_it_from_a_trainer_that_is_spread_over_the_devices(name, file):
    golden = Golden.load(GOLDEN / name / file)
    on = engine_mesh(golden.layout.tp, golden.layout.attention_dp)
    converter = portax.converter_for(tree(name).config, layout=golden.layout, mesh=on)
    weights = converter.convert(sharded(filled(name), mesh(fsdp=4, tensor=2)))
    assert differences(weights, golden) == []
    assert {leaf.sharding for leaf in weights.values()} == {
        NamedSharding(on, row.spec) for row in golden.leaves.values()
    }


@pytest.mark.parametrize("name", [*TREES, *MLA])
def test_reproduces_maxtexts_own_export(name):
    golden = Golden.load(GOLDEN / name / "hf.json")
    converter = portax.converter_for(tree(name).config, layout=portax.layouts.HuggingFace())
    assert differences(converter.convert(filled(name)), golden) == []


def test_hub_tensors_in_bfloat16_are_rounded_to_nearest_even():
    name = "qwen3-8b.scan"
    rows = portax.testing.golden._load(GOLDEN / name / "hf.json")["tensors"]
    layout = portax.layouts.HuggingFace(dtype=jnp.bfloat16)
    weights = portax.converter_for(tree(name).config, layout=layout).convert(filled(name))
    assert {k: portax.testing.golden.digest(v) for k, v in weights.items()} == {
        k: v["sha256_bf16"] for k, v in rows.items()
    }


def test_a_single_changed_element_is_seen():
    golden = Golden.load(GOLDEN / "qwen3-8b.scan/tpu-inference-0.32.0.tp2.json")
    params = dict(filled("qwen3-8b.scan"))
    path = "base/decoder/layers/mlp/wo/kernel"
    params[path] = params[path].copy()
    params[path][5, 2, 7] += 1
    converter = portax.converter_for(tree("qwen3-8b.scan").config, layout=golden.layout)
    [difference] = differences(converter.convert(params), golden)
    assert difference.startswith("vllm_model.model.layers.2.mlp.down_proj.weight: sha256 ")
