"""Mistral and Mixtral: what their goldens do not show, and hub configs that MaxText has no model for."""

import json
import math

import numpy as np
import pytest
from conftest import GOLDEN, filled, tree

import portax
from portax.layouts import HuggingFace

NAME = "mixtral-8x7b.scan"


@pytest.fixture(scope="module")
def wide():
    """A Mixtral whose heads are together twice as wide as the model; MaxText's own exporter takes them for as wide."""
    config = {**tree(NAME).config, "head_dim": 16}
    converter = portax.converter_for(config, layout=HuggingFace())
    random = np.random.default_rng(0)
    shapes = converter.expected_tree(scanned=True)
    params = {path: random.standard_normal(leaf.shape, np.float32) for path, leaf in shapes.items()}
    return params, {name: np.asarray(leaf) for name, leaf in converter.convert(params).items()}


def test_heads_that_are_together_wider_than_the_model(wide):
    params, weights = wide
    at = "decoder/layers/self_attention"
    query = params[f"{at}/query/kernel"][:, 1] * np.float32(math.sqrt(16))
    found = weights["model.layers.1.self_attn.q_proj.weight"]
    assert found.shape == (256, 128)
    np.testing.assert_array_equal(found, query.reshape(128, 256).T)
    output = params[f"{at}/out/kernel"][:, 1]
    np.testing.assert_array_equal(weights["model.layers.1.self_attn.o_proj.weight"], output.reshape(256, 128).T)


def test_experts_are_numbered(wide):
    params, weights = wide
    for hub, name in {"w1": "wi_0", "w3": "wi_1", "w2": "wo"}.items():
        found = weights[f"model.layers.2.block_sparse_moe.experts.5.{hub}.weight"]
        np.testing.assert_array_equal(found, params[f"decoder/layers/MoeBlock_0/{name}"][5, 2].T)


@pytest.mark.parametrize("name", ["mistral-7b.scan", NAME])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sliding_window": 4096}, "sliding_window: 4096: MaxText's mi.*tral has none"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type: 'yarn': MaxText's mi.*tral has unscaled frequencies"),
    ],
)
def test_hub_configs_that_maxtext_has_no_model_for(name, change, match):
    source = json.loads((GOLDEN / name / "config.json").read_text())
    with pytest.raises(portax.ConfigError, match=match):
        portax.read_config({**source, **change})


def test_a_router_that_is_missing():
    path = "base/decoder/layers/MoeBlock_0/gate/kernel"
    lost = {name: leaf for name, leaf in filled(NAME).items() if name != path}
    with pytest.raises(portax.PlanError, match="found nothing; expected a leaf of shape") as caught:
        portax.converter_for(tree(NAME).config, layout=HuggingFace()).plan(lost)
    assert [problem.leaf for problem in caught.value.problems] == [path]
