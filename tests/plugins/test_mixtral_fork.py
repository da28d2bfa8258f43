"""A model family of another package, installed as its users install it, is as good as portax's own."""

import ast
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import command, engine_mesh
from engines import grid, noise, wrong
from jax.sharding import NamedSharding

import portax
from portax.analysis.identify import identify
from portax.converters import families
from portax.testing.golden import SOURCE_DTYPES, Golden, Tree
from portax.testing.golden_folder import SOURCE, cases, verify

PACKAGE = pathlib.Path(__file__).parent / "mixtral_fork"
GOLDEN = PACKAGE / "golden"
CASES = cases(GOLDEN, SOURCE_DTYPES)
TREES = sorted({case.path.parent.name for case in CASES})
SCANNED = "mixtral-8x7b.scan"
EXPERTS = "block_sparse_moe.experts"


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory):
    """The package, installed with pip in a folder that is on the path while these tests run."""
    folder = tmp_path_factory.mktemp("site")
    how = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--target", folder)
    done = subprocess.run([sys.executable, "-m", "pip", "install", *how, PACKAGE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    sys.modules.pop("portax_mixtral_fork", None)


@pytest.fixture
def tree():
    return Tree.load(GOLDEN / SCANNED / SOURCE)


@pytest.fixture
def hub(tree):
    return portax.converter_for(tree.config, layout=portax.layouts.HuggingFace())


def without_root(leaves):
    return {path.removeprefix("base/"): leaf for path, leaf in leaves.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.path.relative_to(GOLDEN)}-{case.source_dtype}")
def test_it_makes_every_leaf_of_every_golden(case):
    [found] = verify([case])
    assert found.exact, found.verdict


def test_its_author_imports_nothing_of_portax_but_extend():
    nodes = ast.walk(ast.parse((PACKAGE / "portax_mixtral_fork.py").read_text()))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.startswith("portax")} == {"portax.extend"}


def test_it_is_listed_where_it_is_installed(installed):
    listing = (sys.executable, "-m", "portax", "models", "--json")
    done = subprocess.run(listing, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True)
    rows = {row["decoder_block"]: row for row in json.loads(done.stdout)}
    assert rows["mixtral_fork"]["converter"] == "portax_mixtral_fork.MixtralForkConverter"
    assert rows["mixtral_fork"]["what"] == "Mixtral 8x7B and 8x22B of a fork of MaxText."


def test_its_goldens_are_verified_together(capsys):
    assert command("verify", "--goldens", GOLDEN / "mixtral-8x7b.unscan") == 0
    assert "3 goldens: 3 exact" in capsys.readouterr().out


def test_a_hub_config_is_read_and_derived(tree):
    path = GOLDEN / SCANNED / "config.json"
    content, read = json.loads(path.read_text()), portax.read_config(path)
    sizes = ("emb_dim", "head_dim", "moe_mlp_dim", "num_experts", "num_kv_heads", "num_query_heads", "vocab_size")
    trainer = portax.read_config(tree.config)
    assert [getattr(read, name) for name in sizes] == [getattr(trainer, name) for name in sizes]
    derived = portax.derive_hub_config(tree.config)
    assert {name for name, value in derived.items() if content.get(name) != value} == {"rope_parameters"}  # newer
    assert portax.read_config(derived) == read


def test_what_a_hub_config_does_not_say_is_named():
    content = json.loads((GOLDEN / SCANNED / "config.json").read_text())
    with pytest.raises(portax.ConfigError, match=r"intermediate_size: missing from the hub config"):
        portax.read_config({name: value for name, value in content.items() if name != "intermediate_size"})


@pytest.mark.parametrize("name", TREES)
def test_its_tree_is_told_from_the_leaves(name):
    tree = Tree.load(GOLDEN / name / SOURCE)
    match = {found.decoder_block: found for found in identify(tree.shapes, families(), [])}["mixtral_fork"]
    assert (match.odd, match.untold, match.usual) == ((), (), True)
    assert match.sizes["num_experts"] == 8
    layout = portax.layouts.HuggingFace()
    planned = portax.converter_for(match.config, layout=layout).plan(tree.shapes)
    assert planned.entries == portax.converter_for(tree.config, layout=layout).plan(tree.shapes).entries


@pytest.mark.parametrize("name", TREES)
def test_its_tree_is_known_without_one(name):
    tree = Tree.load(GOLDEN / name / SOURCE)
    converter = portax.converter_for(tree.config, layout=portax.layouts.Canonical())
    assert converter.expected_tree(scanned=name == SCANNED) == without_root(tree.shapes)


def test_an_export_comes_back_from_the_hub(hub, tree, tmp_path):
    params = tree.fill()
    derived = portax.derive_hub_config(tree.config)
    portax.export(hub, params, tmp_path / "hub", hub_config=derived)
    written = portax.open_checkpoint(tmp_path / "hub")
    assert {*written} == {*Golden.load(GOLDEN / SCANNED / "hf.json").leaves}
    assert f"model.layers.2.{EXPERTS}.7.w3.weight" in written
    assert command("import", tmp_path / "hub", "--out", tmp_path / "maxtext") == 0
    back = portax.open_checkpoint(tmp_path / "maxtext")
    differs = {leaf.name for leaf in portax.diff(params, back).leaves if leaf.differences}
    assert differs == {"base/decoder/layers/self_attention/query/kernel"}  # scaled, so rounded once more
    again = hub.convert({path: leaf[...] for path, leaf in back.items()})
    assert [name for name, leaf in hub.convert(params).items() if not (leaf == again[name]).all()] == []


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "unscanned"])
def test_bfloat16_weights_of_the_hub_are_restored(hub, tree, scanned):
    weights = hub.convert(tree.fill(dtype="bfloat16"))
    restored = hub.restore(weights, scanned=scanned)
    assert restored.keys() == hub.expected_tree(scanned=scanned).keys()
    again = hub.convert(restored)
    assert [name for name in weights if np.asarray(weights[name]).tobytes() != np.asarray(again[name]).tobytes()] == []


def test_a_live_engine_is_kept_equal(tree):
    golden = Golden.load(GOLDEN / SCANNED / "tpu-inference-0.32.0.tp4.ep.json")
    on = grid(4, 4, data=1, model=4)
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(on, leaf.spec))
        for name, leaf in golden.leaves.items()
    }
    engine = noise(like, 0)
    sync = portax.WeightSync(portax.converter_for(tree.config, layout=golden.layout, mesh=on), engine)
    params = jax.device_put(tree.fill(dtype="bfloat16"))
    assert sync(params).leaves == len(golden.leaves) == 24
    assert wrong(engine, golden) == []
    assert sync.verify(params).leaves == 24


def test_every_layout_that_shipped_families_have_takes_it(tree):
    def planned(layout):
        entries = portax.converter_for(tree.config, layout=layout).plan(tree.shapes).entries
        return {entry.name: entry.shape for entry in entries}

    canonical = planned(portax.layouts.Canonical())
    assert canonical[f"model.layers.1.{EXPERTS}.routed_experts.w13_weight"] == (8, 192, 128)
    assert canonical["model.layers.1.block_sparse_moe.gate.weight"] == (8, 128)
    own_model = portax.layouts.MaxTextVllm(version="0.2.5", tp=2)
    maxtext = planned(own_model)
    assert maxtext["model.decoder.layers_1.MoeBlock_0.gate.kernel"] == (128, 8)
    assert maxtext["model.decoder.layers_1.MoeBlock_0.wo"] == (8, own_model.padded_width(96), 128)
    parts = planned(portax.layouts.TpuInference(version="0.32", tp=8, attention_dp=2))
    assert parts["vllm_model.model.layers.1.self_attn.qkv_proj.weight"] == (128, 192)
    assert planned(portax.layouts.TpuInference(version="0.22", tp=2)).keys() >= {"vllm_model.lm_head.weight"}
    with pytest.raises(portax.LayoutError, match=r"MixtralForCausalLM is not among the native JAX models"):
        planned(portax.layouts.FlaxNnx(version="0.32", tp=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_mlp_dim": 0, "base_moe_mlp_dim": 0}, r"moe_mlp_dim: missing, with num_experts=8"),
        ({"num_experts": 1}, r"num_experts=1 or attention_bias=True: no Mixtral is like that"),
        ({"head_dim": 16}, r"16 query heads of 16 are not as wide as emb_dim=128"),
    ],
)
def test_what_it_does_not_convert_it_refuses(tree, change, message):
    with pytest.raises(portax.ConfigError, match=message):
        portax.converter_for({**tree.config, **change}, layout=portax.layouts.Canonical())


def test_a_missing_leaf_and_one_left_over_are_named(hub, tree):
    shapes = dict(tree.shapes)
    shapes["base/decoder/layers/MoeBlock_0/wi_2"] = shapes.pop("base/decoder/layers/MoeBlock_0/wi_1")
    with pytest.raises(portax.PlanError) as caught:
        hub.plan(shapes)
    named = {problem.leaf: problem.found for problem in caught.value.problems}
    assert named["base/decoder/layers/MoeBlock_0/wi_1"] == "nothing"
    assert "base/decoder/layers/MoeBlock_0/wi_2" in named


@pytest.fixture
def with_caches(hub):
    """The family, of an engine that holds rotary caches of its own."""

    class WithCaches(type(hub)):
        engine_owned = ("*.rotary_emb.long_inv_freq",)

    return WithCaches


def test_tensors_that_its_engine_fills_itself_are_no_weights_of_a_checkpoint(with_caches, hub, tree):
    family = with_caches(tree.config, layout=portax.layouts.HuggingFace())
    params = tree.fill()
    cache = "model.layers.0.self_attn.rotary_emb.long_inv_freq"
    weights = family.convert(params) | {cache: np.ones(4, np.float32)}
    assert family.restore(weights).keys() == family.expected_tree().keys()
    assert portax.diff(params, weights, converter=family).beside[cache] == "no weight of the language model"
    with pytest.raises(portax.PlanError, match=r"long_inv_freq.*a tensor that no leaf needs"):
        hub.restore(weights)


def test_leaves_that_its_engine_fills_itself_are_left_alone(with_caches, tree):
    def planned(family, name):
        converter = family(tree.config, layout=portax.layouts.TpuInference(version="0.32", tp=1))
        engine = {entry.name: entry for entry in converter.plan(tree.shapes).entries}
        like = {name: jax.ShapeDtypeStruct(entry.shape, entry.dtype) for name, entry in engine.items()}
        return converter.plan(tree.shapes, like | {name: jax.ShapeDtypeStruct((4,), np.float32)})

    cache = "vllm_model.model.layers.0.self_attn.rotary_emb.long_inv_freq"
    assert planned(with_caches, cache).engine_owned == (cache,)
    with pytest.raises(portax.PlanError, match=r"long_inv_freq.*a leaf of the engine that nothing writes"):
        planned(with_caches.__base__, cache)
    with pytest.raises(portax.PlanError, match=r"short_inv_freq"):
        planned(with_caches, cache.replace("long", "short"))


def test_the_engines_mesh_places_its_leaves(tree):
    golden = Golden.load(GOLDEN / SCANNED / "tpu-inference-0.32.0.tp4.json")
    on = engine_mesh(4)
    converter = portax.converter_for(tree.config, layout=golden.layout, mesh=on)
    assert {entry.name: entry.spec for entry in converter.plan(tree.shapes).entries} == {
        name: leaf.spec for name, leaf in golden.leaves.items()
    }
