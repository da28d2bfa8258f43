"""A hub config.json from the trainer's configuration: MaxText's own, or none at all."""

import json

import pytest
from conftest import CHECKPOINTS, GOLDEN, tree

import portax
from portax.config.shipped import configs

UNDERIVED = "gemma3"  # MaxText scales its queries by the model's name
EXPORTED = sorted(path.parent.name for path in GOLDEN.glob("*.scan/hf.json"))
TREES = [name for name in EXPORTED if not name.startswith(UNDERIVED)]
YARN = {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 32}
UNSAID = {  # what the goldens do not record of MaxText's config, or it does not say
    "gemma4-e2b.unscan": {"global_rope_proportion": 0.25, "inhomogeneous_layer_cycle_interval": 5},
    "gemma4-e4b.unscan": {"global_rope_proportion": 0.25, "inhomogeneous_layer_cycle_interval": 6},
    **{name: {"global_rope_proportion": 0.25} for name in TREES if name.startswith("gemma4")},
    "deepseek2-16b.scan": YARN | {"rope_factor": 40, "rope_truncate": True, "mscale": 0.707},
    "deepseek3-671b-mla.scan": YARN | {"rope_factor": 40, "rope_truncate": True, "mscale": 1},
    "olmo3-7b.scan": YARN | {"rope_factor": 8, "rope_truncate": True, "rope_attention_scaling": True},
    "gpt-oss-20b.scan": YARN | {"rope_factor": 32, "rope_truncate": False, "rope_attention_scaling": True},
}
TEXT_ONLY = {"Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeForCausalLM"}
SPELLINGS = {"rope_theta", "rope_scaling", "rope_parameters", "layer_types"}  # not every age has had all of them
VISION = {"vision_config", "text_config.tie_word_embeddings"}
SHRUNK = {"max_position_embeddings", "rope_parameters.original_max_position_embeddings"}  # in the goldens alone

UNTRAINED = {  # what the hub's own model has, and MaxText's configuration of it has not
    "deepseek3-671b-mla.scan": {"n_group", "topk_group", "num_nextn_predict_layers"},
}


def config_of(name):
    return {**tree(name).config, **UNSAID.get(name, {})}


def different(derived, hub, at=""):
    for key, value in derived.items():
        if isinstance(value, dict) and isinstance(hub.get(key), dict):
            yield from different(value, hub[key], f"{at}{key}.")
        elif hub.get(key) is None and key in SPELLINGS:
            continue
        elif key not in hub or hub[key] != value:
            yield at + key


@pytest.mark.parametrize("name", sorted({*TREES, *UNSAID}))
def test_it_is_the_one_that_maxtexts_exporter_goes_by(name):
    derived = portax.derive_hub_config(config_of(name))
    hub = json.loads((GOLDEN / name / "config.json").read_text())
    hub["architectures"] = [TEXT_ONLY.get(name, name) for name in hub["architectures"]]
    assert {*different(derived, hub)} <= SHRUNK | VISION | UNTRAINED.get(name, set())


@pytest.mark.parametrize("path", configs(), ids=lambda path: path.stem)
def test_shipped_configurations_say_enough(path):
    config = portax.read_config(path)
    if config.decoder_block == UNDERIVED:
        with pytest.raises(portax.ConfigError, match=r"no config\.json is derived for .*gemma3"):
            portax.derive_hub_config(path)
        return
    again = vars(portax.read_config(portax.derive_hub_config(path)))
    changed = {name for name, value in vars(config).items() if again[name] != value}
    unsaid = {"mlp_dim"} if config.num_experts > 1 else set()  # where no layer has a dense MLP
    assert changed <= {"inhomogeneous_layer_cycle_interval", "rope_type"} | unsaid  # said in another way


def test_what_the_configuration_does_not_say_is_named():
    config = json.loads((CHECKPOINTS / "qwen3-30b-a3b.scan" / "maxtext_config.json").read_text())
    with pytest.raises(portax.ConfigError) as caught:
        portax.derive_hub_config(config)
    for name in ("rope_max_timescale", "normalization_layer_epsilon", "norm_topk_prob"):
        assert f"{name}: missing" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3-8b.scan", {"rope_linear_scaling_factor": 8.0}, "rope_linear_scaling_factor: 8.0 has no place"),
        ("qwen3-8b.scan", {"rope_max_timescale": "long"}, "rope_max_timescale: 'long' is no number"),
        ("qwen3-8b.scan", {"rope_type": "yarn"}, "rope_type: 'yarn' has no place"),
        ("qwen3-8b.scan", {"mlp_activations": ["gelu", "linear"]}, "mlp_activations: .*'gelu'.* has no place"),
        ("llama3.1-8b.scan", {"rope_use_scale": False}, "rope_use_scale: False has no place"),
        ("gemma4-31b.scan", {"v_norm_with_scale": True}, "v_norm_with_scale: True has no place"),
        ("gemma4-31b.scan", {"local_rope_max_timescale": -1}, "local_rope_max_timescale: -1, which is not set"),
        ("gemma4-31b.scan", {"sliding_window_size": None}, "sliding_window_size: missing"),
        ("gemma4-e2b.unscan", {"inhomogeneous_layer_cycle_interval": 1}, "interval: 1; .* by the model's name"),
        ("qwen3.5-35b-a3b.scan", {"norm_topk_prob": False}, "norm_topk_prob: False has no place"),
        ("qwen3-next-80b-a3b.scan", {"shared_experts": 2}, "shared_experts: 2 has no place"),
    ],
)
def test_what_the_hubs_class_has_not_is_refused(name, change, message):
    with pytest.raises(portax.ConfigError, match=message):
        portax.derive_hub_config(config_of(name) | change)


class Trainer:
    """As MaxText's object: attributes, and a ValueError for what it has not."""

    def __init__(self, keys):
        self._keys = keys

    def __getattr__(self, name):
        if name not in self._keys:
            raise ValueError(name)
        return self._keys[name]


def test_any_form_of_configuration(tmp_path):
    config = config_of("qwen3-8b.scan")
    (tmp_path / "model.yml").write_text(json.dumps(config))  # where 1e-06 is a string
    derived = portax.derive_hub_config(config)
    assert portax.derive_hub_config(Trainer(config)) == portax.derive_hub_config(tmp_path / "model.yml") == derived
