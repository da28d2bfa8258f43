"""`ModelConfig` from everything that describes a model, and what it says of things that do not."""

import dataclasses
import enum
import json
import types

import pytest
import yaml
from conftest import GOLDEN, TREES, tree

import portax
from portax import ModelConfig, read_config
from portax.config.shipped import config_path, configs

BILLIONS = {  # parameters, as the models' own names or cards give them
    **{f"qwen3-{size}b": size for size in (0.6, 1.7, 4, 8, 14, 32)},
    **{"qwen3-30b-a3b": 30, "qwen3-235b-a22b": 235, "qwen3-480b-a35b": 480, "qwen3-next-80b-a3b": 80},
    **{"qwen3.5-35b-a3b": 35, "qwen3.5-397b-a17b": 397, "qwen2.5-1.5b": 1.5, "qwen2.5-7b": 7.6, "qwen2.5-14b": 14.7},
    **{
        "llama3.1-8b": 8,
        "llama3.1-70b": 70,
        "llama3.1-405b": 405,
        "llama3.3-70b": 70,
        "llama3-8b": 8,
        "llama3-70b": 70,
        "llama3-405b": 405,
        "llama2-7b": 6.7,
        "llama2-13b": 13,
        "llama2-70b": 69,
        "mistral-7b": 7.2,
        "mixtral-8x7b": 46.7,
        "mixtral-8x22b": 141,
        "gemma2-2b": 2.6,
        "gemma2-9b": 9.2,
        "gemma2-27b": 27.2,
        "olmo3-7b": 7.3,
        "olmo3-7b-pt": 7.3,
        "olmo3-32b": 32,
        "gemma3-4b": 3.9,
        "gemma3-12b": 12,
        "gemma3-27b": 27,
    },
    **{"gemma4-26b": 25.2, "gemma4-31b": 30.7, "gemma4-e2b": 5.1, "gemma4-e4b": 8},
    **{"gpt-oss-20b": 20.9, "gpt-oss-120b": 116.8},
    **{"deepseek2-16b": 15.7, "deepseek2-236b": 236, "deepseek3-671b": 671, "deepseek3.2-671b": 671},
    "kimi-k2-1t": 1026,
}
CONFIG = tree("qwen3-30b-a3b.scan").config


class MaxTextLike:
    """Attributes as MaxText's own object has them: an enum among them, ValueError for unknown names."""

    def __init__(self, keys):
        self._keys = dict(keys)

    def __getattr__(self, name):
        if name not in self._keys:
            raise ValueError(f"Requested key {name}, not in config")
        value = self._keys[name]
        return enum.Enum("DecoderBlockType", {"X": value}).X if name == "decoder_block" else value


@pytest.mark.parametrize("name", sorted(path.stem for path in configs()))
def test_every_shipped_configuration_is_complete_and_plans(name):
    converter = portax.converter_for(config_path(name), layout=portax.layouts.Canonical(dtype="bfloat16"))
    billions = converter.plan(converter.expected_tree()).bytes_out / 2e9
    assert billions == pytest.approx(BILLIONS[name], rel=0.12)


def test_all_sources_of_one_model_agree():
    based = {key: value for key, value in CONFIG.items() if f"base_{key}" not in CONFIG}
    forms = [CONFIG, based, types.SimpleNamespace(**CONFIG), MaxTextLike(CONFIG), ModelConfig.of(CONFIG)]
    assert {ModelConfig.of(form) for form in forms} == {ModelConfig.of(CONFIG)}


def test_files_are_told_apart_by_their_ending(tmp_path):
    (tmp_path / "model.yml").write_text(yaml.safe_dump(dict(CONFIG)))
    hub = GOLDEN / "qwen3-30b-a3b.scan/config.json"
    assert ModelConfig.of(tmp_path / "model.yml") == ModelConfig.of(CONFIG)
    assert read_config(hub) == read_config(str(hub)) == read_config(json.loads(hub.read_text()))


@pytest.mark.parametrize("name", TREES)
def test_hub_and_trainer_configs_imply_maxtexts_tree(name):
    scanned = name.endswith(".scan")
    shapes = {path.removeprefix("base/"): leaf for path, leaf in tree(name).shapes.items()}
    hub = read_config(GOLDEN / name / "config.json")
    if hub.rope_type == "llama3":  # the scaling is tiny, too
        hub = dataclasses.replace(hub, rope_type="llama3.1")
    for config in (hub, tree(name).config):
        if config is hub or tree(name).config["decoder_block"] != "gemma4_small":
            converter = portax.converter_for(config, layout=portax.layouts.Canonical())
            assert converter.expected_tree(scanned=scanned) == shapes


def test_gemma4_small_without_a_tree_goes_by_the_cycle_of_its_config():
    hub = portax.converter_for(GOLDEN / "gemma4-e2b.unscan/config.json", layout=portax.layouts.Canonical())
    shapes = {path.removeprefix("base/"): leaf for path, leaf in tree("gemma4-e2b.unscan").shapes.items()}
    assert hub.expected_tree() == hub.expected_tree(scanned=False) == shapes


def test_the_models_name_is_not_read():
    assert ModelConfig.of(dict(CONFIG, model_name="my-model")) == ModelConfig.of(CONFIG)


def test_everything_missing_is_named_at_once():
    with pytest.raises(portax.ConfigError) as raised:
        ModelConfig.of({"decoder_block": "qwen3", "head_dim": 128, "base_emb_dim": "wide"})
    for line in (
        "num_decoder_layers: missing (MaxText's key is base_num_decoder_layers)",
        "num_query_heads: missing",
        "num_kv_heads: missing",
        "vocab_size: missing (MaxText's key is vocab_size)",
        "emb_dim: 'wide' is not an integer of at least 1",
    ):
        assert line in str(raised.value)


def test_only_the_mlp_that_a_model_has_needs_a_width():
    dense = {key: value for key, value in tree("qwen3-8b.scan").config.items() if "mlp_dim" not in key}
    with pytest.raises(
        portax.ConfigError, match=r"mlp_dim: missing, with num_experts=1 \(MaxText's key is base_mlp_dim\)"
    ):
        ModelConfig.of(dense)
    experts = {key: value for key, value in CONFIG.items() if key not in ("mlp_dim", "base_mlp_dim")}
    assert ModelConfig.of(experts).moe_mlp_dim == 96


def test_missing_hub_keys_are_named_as_the_hub_names_them():
    with pytest.raises(portax.ConfigError, match=r"(?s)hidden_size: missing from the hub config.*vocab_size: missing"):
        read_config({"model_type": "qwen3", "num_hidden_layers": 4})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"base_emb_dim": 64}, "emb_dim: 128 contradicts base_emb_dim: 64"),
        ({"num_experts": 0}, "num_experts: 0 is not an integer of at least 1"),
        ({"head_dim": 16.0}, "head_dim: 16.0 is not an integer"),
        ({"head_dim": True}, "head_dim: True is not an integer"),
        ({"logits_via_embedding": "yes"}, "logits_via_embedding: 'yes' is not a bool"),
        ({"param_scan_axis": 2}, "param_scan_axis: 2 is neither 0 nor 1"),
        ({"moe_mlp_dim": -1, "base_moe_mlp_dim": -1}, "moe_mlp_dim: missing, with num_experts=8"),
        ({"decoder_block": 7}, "decoder_block: 7 is not a str"),
    ],
)
def test_wrong_values(changes, match):
    with pytest.raises(portax.ConfigError, match=match):
        ModelConfig.of(dict(CONFIG, **changes))


def test_a_scaled_model_needs_its_real_sizes():
    scaled = {key: value for key, value in CONFIG.items() if f"base_{key}" not in CONFIG}
    with pytest.raises(
        portax.ConfigError, match="emb_dim: global_parameter_scale is set, so base_emb_dim is not the size"
    ):
        ModelConfig.of(dict(scaled, global_parameter_scale=2))
    assert ModelConfig.of(dict(CONFIG, global_parameter_scale=2, base_emb_dim=64)).emb_dim == 128


def test_hub_models_that_mix_dense_and_moe_layers():
    hub = json.loads((GOLDEN / "qwen3-30b-a3b.scan/config.json").read_text())
    with pytest.raises(portax.ConfigError, match="MaxText has no model that mixes dense and MoE layers"):
        read_config(dict(hub, mlp_only_layers=[0]))


def test_hub_models_of_unknown_families():
    with pytest.raises(
        portax.ConfigError, match=r"model_type: 'bert' is not known; known: .*qwen3_5_moe_text, qwen3_moe"
    ):
        read_config({"model_type": "bert"})


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.yml", "- 1\n- 2\n", "holds a list, not a mapping"),
        ("a.yml", "a: [1", "a.yml: "),
        ("a.json", "{", "a.json: "),
        ("a.json", "\x80", "is not a text file"),
        ("a.toml", "a = 1", "a model configuration is a .yml, .yaml or .json file"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, name, text, match):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(portax.ConfigError, match=match):
        ModelConfig.of(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(portax.ConfigError, match=r"gone\.yml: cannot be read \(No such file"):
        ModelConfig.of(tmp_path / "gone.yml")


def test_a_model_that_is_not_shipped():
    with pytest.raises(portax.ConfigError, match=r"no configuration is shipped for 't5-large'; there are .*qwen3-0.6b"):
        config_path("t5-large")
