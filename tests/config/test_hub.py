"""Hub configs as transformers 5.24 saves them (`save_pretrained`), read as those that the hub has."""

import contextlib
import json
import pathlib

import pytest
from conftest import GOLDEN

import portax
from portax.checkpoints import config_json
from portax.converters import families

SAVED = pathlib.Path(__file__).parent / "hub"
GOLDENS = sorted(path.stem for path in SAVED.glob("*scan.json"))
CLASSES = sorted(path.stem for path in (SAVED / "classes").glob("*.json"))
"""What transformers writes of each class's own defaults, by `model_type`."""

WITHOUT = {"mistral": {"sliding_window": None}}
"""What the class has by default, and MaxText has not."""

ELSEWHERE = {"kimi_k2"}  # its class comes with the model, and is V3's

TP2 = portax.layouts.TpuInference(version="0.32", tp=2)


@pytest.mark.parametrize("name", GOLDENS)
def test_what_transformers_saves_is_read_as_what_the_hub_has(name):
    assert portax.read_config(SAVED / f"{name}.json") == portax.read_config(GOLDEN / name / "config.json")


def test_every_familys_class_is_among_them():
    known = {name for family in families().values() for name in family.hub_types}
    assert known - ELSEWHERE <= {*CLASSES}


def test_kimi_k2_is_read_as_a_deepseek_v3():
    source = json.loads((SAVED / "deepseek3-671b-mla.scan.json").read_text())
    assert portax.read_config(source | {"model_type": "kimi_k2"}) == portax.read_config(source)


def text_of(source):
    return source.get("text_config") or source


def with_text(source, **changes):
    text = {**text_of(source), **changes}
    return {**source, "text_config": text} if "text_config" in source else text


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_class_as_it_comes_is_read_and_planned(model_type):
    source = json.loads((SAVED / "classes" / f"{model_type}.json").read_text()) | WITHOUT.get(model_type, {})
    text = text_of(source)
    config = portax.read_config(source)
    depth = text["num_hidden_layers"] // (2 if model_type == "gemma2" else 1)  # MaxText counts pairs
    assert (config.emb_dim, config.num_decoder_layers) == (text["hidden_size"], depth)
    if model_type == "deepseek_v2":  # of 0 dense layers, which no model has
        with pytest.raises(portax.ConfigError, match="decoder_block='deepseek' needs first_num_dense_layers"):
            portax.converter_for(config, layout=TP2)
        return
    if text.get("n_routed_experts"):
        source = with_text(source, n_routed_experts=2)
    if text.get("num_experts"):
        source = with_text(source, num_experts=2)  # for the test's sake: hundreds of them take a minute to plan
    converter = portax.converter_for(source, layout=portax.layouts.HuggingFace())
    plan = converter.plan(converter.expected_tree())
    config_json.check(source, converter, plan)
    assert config_json.with_dtype(source, plan)["dtype"] == "float32"


def test_the_newest_spellings_are_in_use():
    """Else these files would prove nothing."""
    next_ = json.loads((SAVED / "qwen3-next-80b-a3b.scan.json").read_text())
    assert "layer_types" in next_
    assert "full_attention_interval" not in next_
    for path in SAVED.rglob("*.json"):
        text = text_of(json.loads(path.read_text()))
        assert "rope_parameters" in text
        assert not {"rope_scaling", "torch_dtype"} & text.keys()


def llama(version, **changes):
    return json.loads((SAVED / f"llama{version}.json").read_text()) | changes


def test_a_llama_31_is_told_by_its_scaled_frequencies():
    config = portax.read_config(llama("3.1"))
    assert config.rope_type == "llama3.1"
    portax.converter_for(config, layout=TP2)


def as_before_transformers_5(source):
    scaling = dict(source.pop("rope_parameters"))
    return source | {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "torch_dtype": "bfloat16"}


@pytest.mark.parametrize("scaling", [{}, {"rope_scaling": None}])
def test_a_llama_30_is_told_by_frequencies_that_are_not_scaled(scaling):
    source = as_before_transformers_5(llama("3.0")) | scaling if scaling else llama("3.0")
    assert portax.read_config(source).rope_type == "default"
    portax.converter_for(source, layout=TP2)


def test_and_by_those_of_the_hub():
    assert portax.read_config(as_before_transformers_5(llama("3.1"))) == portax.read_config(llama("3.1"))


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (llama("3.2"), r"rope_type='llama3': rotary frequencies that are not scaled as Llama 3.1's"),
        (llama("3.1", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}), "rope_type='llama3': rotary freq"),
        (llama("3.1", rope_parameters={"rope_type": "yarn", "rope_theta": 5e5}), "rope_type='yarn' leaves open"),
    ],
)
def test_no_other_llama_becomes_one(source, match):
    with pytest.raises(portax.ConfigError, match=match):
        portax.converter_for(source, layout=TP2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layer_types": None}, "full_attention_interval, layer_types: missing from the hub config"),
        (
            {"layer_types": ["full_attention"] + ["linear_attention"] * 7},
            r"layer_types: full attention in layers \[1\]",
        ),
        ({"full_attention_interval": 2}, r"in layers \[4, 8\] .*: MaxText has it in the last of 2"),
        ({"layer_types": 4}, "layer_types: 4 is no list"),
        (
            {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
            "layer_types: of 4 layers, and num_hidden_lay",
        ),
        ({"rope_parameters": "default"}, "rope_parameters: 'default' is no mapping"),
        ({"mlp_only_layers": [1]}, "MaxText has no model that mixes"),
        ({"rope_scaling": [8]}, r"rope_scaling: \[8\] is no mapping"),
        ({"per_layer_config": [1]}, r"per_layer_config: \[1\] is no mapping"),
        ({"hidden_size": "wide", "head_dim": None}, "emb_dim: 'wide' is not an integer"),
    ],
)
def test_a_layer_pattern_or_a_field_that_cannot_be(changes, match):
    source = json.loads((SAVED / "qwen3-next-80b-a3b.scan.json").read_text()) | changes
    with pytest.raises(portax.ConfigError, match=match):
        portax.converter_for(source, layout=TP2)


@pytest.mark.parametrize("name", ["qwen3-next-80b-a3b.scan", "gemma4-26b.scan", "llama3.1"])
def test_whatever_stands_in_a_field_no_message_is_pythons(name):
    source = json.loads((SAVED / f"{name}.json").read_text())
    for field in text_of(source):
        for value in ("x", -1, [1], {"a": 1}):
            with contextlib.suppress(portax.ConfigError):
                portax.read_config(with_text(source, **{field: value, "head_dim": None}))
