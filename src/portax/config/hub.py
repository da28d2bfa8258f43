"""Reads the `config.json` of a model on the Hugging Face hub into MaxText's names."""

from collections.abc import Callable, Mapping
from typing import Any

from portax.errors import ConfigError

_DENSE = {
    "num_decoder_layers": "num_hidden_layers",
    "emb_dim": "hidden_size",
    "num_query_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "vocab_size": "vocab_size",
}
_EXPERTS = {"num_experts": "num_experts", "moe_mlp_dim": "moe_intermediate_size"}
_DELTA_NET = {
    "gdn_num_key_heads": "linear_num_key_heads",
    "gdn_num_value_heads": "linear_num_value_heads",
    "gdn_key_head_dim": "linear_key_head_dim",
    "gdn_value_head_dim": "linear_value_head_dim",
    "gdn_conv_kernel_dim": "linear_conv_kernel_dim",
    "inhomogeneous_layer_cycle_interval": "full_attention_interval",
}
_HYBRID = {name: key for name, key in _DENSE.items() if name != "mlp_dim"} | _EXPERTS | _DELTA_NET
_GEMMA4 = {
    "global_head_dim": "global_head_dim",
    "global_num_kv_heads": "num_global_key_value_heads",
    "share_kv_projections": "attention_k_eq_v",
    "num_kv_shared_layers": "num_kv_shared_layers",
    "use_double_wide_mlp": "use_double_wide_mlp",
    "hidden_size_per_layer_input": "hidden_size_per_layer_input",
    "vocab_size_per_layer_input": "vocab_size_per_layer_input",
}
_PER_LAYER = {"global_head_dim": "head_dim", "num_global_key_value_heads": "num_key_value_heads"}
_Fixed = Callable[[Mapping[str, Any]], dict[str, Any]]


def _gemma4(hub: Mapping[str, Any]) -> dict[str, Any]:
    kinds = hub.get("layer_types") or []
    cycle = kinds.index("full_attention") + 1 if "full_attention" in kinds else 1
    found = {name: hub[key] for name, key in _GEMMA4.items() if hub.get(key) is not None}
    if hub.get("enable_moe_block"):
        found |= {name: hub.get(key) for name, key in _EXPERTS.items()} | {"shared_experts": 1}
    small = bool(hub.get("hidden_size_per_layer_input"))
    return found | {
        "decoder_block": "gemma4_small" if small else "gemma4",
        "inhomogeneous_layer_cycle_interval": cycle,
        "logits_via_embedding": hub.get("tie_word_embeddings", True),
    }


def _hybrid(decoder_block: str) -> _Fixed:
    return lambda hub: {
        "decoder_block": decoder_block,
        "shared_experts": int(bool(hub.get("shared_expert_intermediate_size"))),
        "mlp_dim": hub.get("intermediate_size") or 0,
    }


_FAMILIES: dict[str, tuple[dict[str, str], _Fixed]] = {
    "qwen2": (_DENSE, lambda hub: {"decoder_block": "qwen2", "attention_bias": True}),
    "qwen3": (_DENSE, lambda hub: {"decoder_block": "qwen3"}),
    "qwen3_moe": (_DENSE | _EXPERTS, lambda hub: {"decoder_block": "qwen3_moe"}),
    "qwen3_next": (_HYBRID, _hybrid("qwen3_next")),
    "qwen3_5_moe_text": (_HYBRID, _hybrid("qwen3_5")),
    "llama": (_DENSE, lambda hub: {"decoder_block": "llama2"}),
    "gemma3_text": (
        _DENSE,
        lambda hub: {"decoder_block": "gemma3", "logits_via_embedding": hub.get("tie_word_embeddings", True)},
    ),
    "gemma4_text": (_DENSE, _gemma4),
}


def hub_keys(model_type: str) -> Mapping[str, str]:
    """What the hub calls the sizes of a `ModelConfig`."""
    return _FAMILIES[model_type][0]


def fields(source: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of a `ModelConfig`, and what is wrong with the hub's.

    Args:
        source: A `config.json`; of a multimodal model, its `text_config` counts.

    Raises:
        ConfigError: The model is of an unknown type.
    """
    hub = source
    if isinstance(source.get("text_config"), Mapping):
        ties = {"tie_word_embeddings": source["tie_word_embeddings"]} if "tie_word_embeddings" in source else {}
        hub = {**ties, **source["text_config"]}
    if hub.get("model_type") not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise ConfigError(
            f"not a usable model configuration:\n  model_type: {hub.get('model_type')!r} is not known; known: {known}"
        )
    keys, fixed = _FAMILIES[hub["model_type"]]
    hub = _respelled(hub)
    if hub.get("head_dim") is None and {"hidden_size", "num_attention_heads"} <= {*hub}:
        hub = {**hub, "head_dim": hub["hidden_size"] // hub["num_attention_heads"]}
    problems = [f"{key}: missing from the hub config" for key in keys.values() if hub.get(key) is None]
    if hub.get("mlp_only_layers") or hub.get("decoder_sparse_step", 1) != 1:
        problems.append("mlp_only_layers, decoder_sparse_step: MaxText has no model that mixes dense and MoE layers so")
    shared = hub.get("shared_expert_intermediate_size")
    if shared and shared != hub.get("moe_intermediate_size"):
        problems.append("shared_expert_intermediate_size: MaxText has no model where it is not moe_intermediate_size")
    values = {name: hub[key] for name, key in keys.items() if key in hub}
    return {"logits_via_embedding": hub.get("tie_word_embeddings", False)} | values | fixed(hub), problems


def _respelled(hub: Mapping[str, Any]) -> dict[str, Any]:
    """The same config without the spellings that transformers has had since 5.20."""
    found = dict(hub)
    if found.get("num_experts") is None and "num_local_experts" in found:
        found["num_experts"] = found["num_local_experts"]
    kinds = found.get("layer_types") or []
    special = (found.get("per_layer_config") or {}).items()
    for layer in [layer for number, layer in special if kinds[int(number)] == "full_attention"][:1]:
        found |= {name: layer[key] for name, key in _PER_LAYER.items() if key in layer and found.get(name) is None}
    return found
