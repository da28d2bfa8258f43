"""`HubConfig`: the `config.json` of a model on the Hugging Face hub, as a model family reads it."""

from collections.abc import Mapping
from typing import Any, TypeGuard

DENSE = {
    "num_decoder_layers": "num_hidden_layers",
    "emb_dim": "hidden_size",
    "num_query_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "vocab_size": "vocab_size",
}
"""The names that most of the hub's decoders have for the sizes of a `ModelConfig`."""

EXPERTS = {"num_experts": "num_experts", "moe_mlp_dim": "moe_intermediate_size"}
"""The names that most of the hub's mixtures of experts have for theirs."""


def is_hub_config(source: object) -> TypeGuard[Mapping[str, Any]]:
    """Tells a hub's `config.json` from a trainer's configuration, by its content: True if it has a `model_type`.

    Example:
        >>> is_hub_config({"model_type": "qwen3"}), is_hub_config({"decoder_block": "qwen3"})
        (True, False)
    """
    return isinstance(source, Mapping) and "model_type" in source


class HubConfig:
    """The language model's part of a `config.json`, in one spelling for all versions of transformers.

    Attributes:
        model_type: The hub's name of the family.
        problems: Fields found missing or unusable so far, with the reason.

    Example:
        >>> found = HubConfig({"model_type": "qwen3", "hidden_size": 64})
        >>> found.sizes({"emb_dim": "hidden_size", "head_dim": "head_dim"}), found.problems
        ({'emb_dim': 64}, ['head_dim: missing from the hub config'])
    """

    def __init__(self, source: Mapping[str, Any]):
        """Reads the content of a `config.json`; of a multimodal model, its `text_config`."""
        text = _text(source)
        usable = {name: value for name, value in text.items() if value is None or isinstance(value, _kind(name))}
        self.problems = [f"{name}: {text[name]!r} is no {_WORDS[_kind(name)]}" for name in text if name not in usable]
        self._fields = _one_spelling(usable)
        self.model_type = self._fields.get("model_type")

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field; the default where it is absent or null."""
        value = self._fields.get(name)
        return default if value is None else value

    def sizes(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Returns fields under MaxText's names, and notes those that are missing.

        Args:
            names: The hub's name of each; see `DENSE`.
        """
        found = {name: self.get(key) for name, key in names.items()}
        missing = [names[name] for name, value in found.items() if value is None]
        self.problems += [f"{key}: missing from the hub config" for key in missing]
        return {name: value for name, value in found.items() if value is not None}

    def expert_sizes(self) -> dict[str, Any]:
        """Returns the number and width of the experts, and notes layers without experts as a problem."""
        if self.get("mlp_only_layers") or self.get("decoder_sparse_step", 1) != 1:
            self.problems.append(
                "mlp_only_layers, decoder_sparse_step: MaxText has no model that mixes dense and MoE layers so"
            )
        shared = self.get("shared_expert_intermediate_size")
        if shared and shared != self.get("moe_intermediate_size"):
            self.problems.append(
                "shared_expert_intermediate_size: MaxText has no model where it is not moe_intermediate_size"
            )
        return self.sizes(EXPERTS)

    def attention_cycle(self) -> int | None:
        """Returns the number of layers after which full attention repeats; None if the hub does not say.

        Layers that do not repeat in this way are noted as a problem.
        """
        types, depth = self.get("layer_types"), self.get("num_hidden_layers")
        if types is None:
            return self.get("full_attention_interval")
        if depth != len(types):
            self.problems.append(f"layer_types: of {len(types)} layers, and num_hidden_layers is {depth}")
        period = types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1
        full = [number for number, kind in enumerate(types, 1) if kind == "full_attention"]
        told = self.get("full_attention_interval", period)
        if full != [number for number in range(1, len(types) + 1) if number % period == 0] or told != period:
            self.problems.append(
                f"layer_types: full attention in layers {full} (counted from 1): MaxText has it in the last of {told}"
            )
        return period

    @property
    def rope(self) -> Mapping[str, Any]:
        """The scaling of rotary frequencies, with `rope_type`; empty if they are not scaled."""
        found = dict(self.get("rope_parameters") or self.get("rope_scaling") or {})
        if "type" in found:
            found.setdefault("rope_type", found["type"])
        return found


def _text(source: Mapping[str, Any]) -> dict[str, Any]:
    inner = source.get("text_config")
    if not isinstance(inner, Mapping):
        return dict(source)
    ties = {"tie_word_embeddings": source["tie_word_embeddings"]} if "tie_word_embeddings" in source else {}
    return {**ties, **inner}


def _one_spelling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields in the spelling before transformers 5.20, with what newer versions leave out filled in."""
    found = dict(fields)
    if found.get("num_experts") is None and "num_local_experts" in found:
        found["num_experts"] = found["num_local_experts"]
    layer = _full_attention(found)
    found |= {name: layer[key] for name, key in _PER_LAYER.items() if key in layer and found.get(name) is None}
    width, heads = found.get("hidden_size"), found.get("num_attention_heads")
    if found.get("head_dim") is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        found["head_dim"] = width // heads
    return found


def _full_attention(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the entry of `per_layer_config` for a layer of full attention; empty if there is none."""
    full = [str(number) for number, kind in enumerate(fields.get("layer_types") or []) if kind == "full_attention"]
    special = fields.get("per_layer_config") or {}
    found: Any = next((special[number] for number in full if number in special), {})
    return found if isinstance(found, Mapping) else {}


def _kind(name: str) -> Any:
    """Returns the type that a field must have, if its parts are read here; `ModelConfig` checks all others."""
    return _KINDS.get(name, object)


_KINDS: Mapping[str, Any] = {
    "layer_types": list,
    "mlp_only_layers": list,
    "mlp_layer_types": list,
    "rope_parameters": Mapping,
    "rope_scaling": Mapping,
    "per_layer_config": Mapping,
}
_WORDS: Mapping[Any, str] = {list: "list", Mapping: "mapping"}

_PER_LAYER = {"global_head_dim": "head_dim", "num_global_key_value_heads": "num_key_value_heads"}
