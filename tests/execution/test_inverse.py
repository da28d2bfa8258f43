"""The way back: a trainer's tree from the hub's tensors, or from any layout that holds everything once."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CHECKPOINTS, TREES, filled, tree

import portax
from portax.layouts import Canonical, HuggingFace, TpuInference

MOE, DENSE = "qwen3-30b-a3b.scan", "qwen3-8b.scan"


def bare(params):
    return {path.removeprefix("base/"): np.asarray(leaf) for path, leaf in params.items()}


CHANGED = {
    "gemma": "token_embedder",
    "llama": "query",
    "mistral": "query",
    "mixtral": "query",
    "gemma2": "query",
}  # what a conversion scales
CYCLES = {"gemma4-e2b.unscan": 5, "gemma4-e4b.unscan": 6}


def config(name):
    return dict(tree(name).config) | ({"inhomogeneous_layer_cycle_interval": CYCLES[name]} if name in CYCLES else {})


def weights_of(name, params=None, layout=None):
    converter = portax.converter_for(config(name), layout=layout or HuggingFace())
    params = bare(filled(name)) if params is None else params
    return converter, {path: np.asarray(leaf) for path, leaf in converter.convert(params).items()}


TWINS = {"qwen3-8b.scan", "qwen3-14b.scan", "qwen2.5-1.5b.scan", "llama3.1-70b.scan", "gemma4-31b.scan"}
SOME = [
    *(name for name in TREES if name.endswith(".scan") and name not in TWINS),
    *("gemma4-e2b.unscan", "gemma4-e4b.unscan", "gemma4-26b.unscan"),
]


@pytest.mark.parametrize("name", SOME)
def test_every_tree_comes_back_from_the_hubs_tensors(name):
    params = bare(filled(name))
    converter, weights = weights_of(name)
    back = converter.restore(weights, scanned=name.endswith(".scan"))
    assert back.keys() == params.keys()
    for path, leaf in params.items():
        scaled = any(family in name and part in path for family, part in CHANGED.items())
        np.testing.assert_array_max_ulp(back[path], leaf, maxulp=1 if scaled else 0)
        assert scaled or back[path].tobytes() == leaf.tobytes()
    again = converter.convert(back)
    assert [path for path, leaf in weights.items() if np.asarray(again[path]).tobytes() != leaf.tobytes()] == []


@pytest.mark.parametrize("name", [MOE, DENSE, "qwen3.5-35b-a3b.scan", "qwen2.5-7b.unscan"])
def test_every_bit_pattern_comes_back(name):
    random = np.random.default_rng(0)
    params = {
        path: random.integers(0, 2**16, leaf.shape, np.uint16).view(jnp.bfloat16)
        for path, leaf in bare(filled(name)).items()
    }
    converter, weights = weights_of(name, params)
    back = converter.restore(weights, scanned=name.endswith(".scan"))
    exact = [path for path in params if not path.endswith("A_log")]  # a NaN's payload, through float32
    assert [path for path in exact if back[path].tobytes() != params[path].tobytes()] == []


@pytest.mark.parametrize("layout", [Canonical(), TpuInference(version="0.32", tp=2, dtype=jnp.float32)], ids=str)
def test_any_layout_that_holds_everything_once_leads_back(layout):
    converter, weights = weights_of(MOE, layout=layout)
    back = converter.restore(weights)
    assert [path for path, leaf in bare(filled(MOE)).items() if back[path].tobytes() != leaf.tobytes()] == []


def test_a_layout_that_repeats_heads_does_not():
    converter, weights = weights_of(MOE, layout=TpuInference(version="0.32", tp=8))
    with pytest.raises(portax.LayoutError, match=r"layers/self_attention/key/kernel.*several times"):
        converter.restore(weights)


def test_scanned_or_not_and_in_the_dtype_that_is_asked_for():
    converter, weights = weights_of(DENSE)
    back = converter.restore(weights, scanned=False, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in back.values()} == {jnp.dtype(jnp.bfloat16)}
    stack = bare(filled(DENSE))["decoder/layers/mlp/wo/kernel"]
    np.testing.assert_array_equal(back["decoder/layers_1/mlp/wo/kernel"], stack[:, 1].astype(jnp.bfloat16))


def test_tensors_beside_the_language_model_and_a_head_that_repeats_the_embedding():
    converter, weights = weights_of("qwen3-0.6b.scan")
    table = weights["model.embed_tokens.weight"]
    more = {"lm_head.weight": table.copy(), "model.visual.blocks.0.weight": table, "mtp.fc.weight": table}
    assert converter.restore(weights | more).keys() == converter.restore(weights).keys()
    with pytest.raises(portax.PlanError, match=r"lm_head.weight: found a tensor that no leaf needs"):
        converter.restore(weights | {"lm_head.weight": table + 1})


def test_layers_of_several_dtypes_make_a_stack_that_holds_them_all():
    converter, weights = weights_of(DENSE)
    first = "model.layers.0.mlp.down_proj.weight"
    weights[first] = weights[first].astype(jnp.bfloat16)
    back, stack = converter.restore(weights)["decoder/layers/mlp/wo/kernel"], bare(filled(DENSE))
    stack = stack["decoder/layers/mlp/wo/kernel"]
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back[:, 1:], stack[:, 1:])
    np.testing.assert_array_equal(back[:, 0], stack[:, 0].astype(jnp.bfloat16).astype(np.float32))


def test_everything_that_is_wrong_is_said_at_once():
    converter, weights = weights_of(DENSE)
    norm, wide, packed = "model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    weights[wide], weights[packed] = weights[wide][:-1], weights[packed].astype(np.int8)
    weights["adapter"] = weights.pop(norm)
    with pytest.raises(portax.PlanError) as caught:
        converter.restore(weights)
    for part in (
        f"{norm}: found nothing",
        f"{wide}: found shape",
        f"{packed}: found dtype int8",
        "adapter: found a te",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("folder", sorted(path for path in CHECKPOINTS.glob("*.scan")), ids=lambda p: p.name)
def test_a_real_checkpoint_comes_back_from_its_export(folder, tmp_path):
    config = json.loads((folder / "maxtext_config.json").read_text())
    converter = portax.converter_for(config, layout=HuggingFace())
    checkpoint = portax.open_checkpoint(folder / "orbax")
    portax.export(converter, checkpoint, tmp_path / "hub")
    back = converter.restore(portax.open_checkpoint(tmp_path / "hub"))
    params = {path.removeprefix("base/"): leaf[...] for path, leaf in checkpoint.items()}
    assert back.keys() == params.keys()
    scaled = [path for path in params if "gemma" in folder.name and "token_embedder" in path]
    assert [path for path in params if back[path].tobytes() != params[path].tobytes()] in ([], scaled)
