"""A hub `config.json` from the trainer's configuration, where that says all that a model's results depend on."""

from collections.abc import Callable, Mapping
from typing import Any

from portax.config.hub import hub_keys
from portax.config.model_config import ModelConfig, reader
from portax.errors import ConfigError

_SILU, _GELU = ["silu", "linear"], ["gelu", "linear"]
_UNSCALED = {"rope_type": ("default", ""), "rope_linear_scaling_factor": (1,)}
_WHOLE = {**_UNSCALED, "partial_rotary_factor": (1,)}
_UNWINDOWED = {"use_sliding_window": False}


class _Trainer:
    """What the trainer's configuration says; what it does not is noted."""

    def __init__(self, source: Any):
        self.config = ModelConfig.of(source)
        self.problems: list[str] = []
        self._get = reader(source)

    def need(self, name: str) -> Any:
        """A number on which the results depend: it has no default here."""
        value = _number(self._get(name))
        if value is None:
            self.problems.append(f"{name}: missing")
        elif isinstance(value, str):
            self.problems.append(f"{name}: {value!r} is no number")
        elif value < 0:
            self.problems.append(f"{name}: {value!r}, which is not set")
        return value

    def same(self, **fields: Any) -> None:
        """Notes fields that are none of the values which the family's class on the hub stands for."""
        for name, values in fields.items():
            value = _number(self._get(name))
            if value is not None and value not in values:
                self.problems.append(f"{name}: {value!r} has no place in a hub config of this family")

    def sizes(self, model_type: str) -> dict[str, Any]:
        """The fields that the hub has under other names."""
        return {key: getattr(self.config, name) for name, key in hub_keys(model_type).items()}

    def layer_types(self, kind: str, period: int) -> list[str]:
        """Layers of this kind of attention, the last of every period of full attention."""
        depth = self.config.num_decoder_layers
        return ([kind] * (period - 1) + ["full_attention"]) * (depth // period) + [kind] * (depth % period)

    def plain(self, model_type: str, architecture: str, **rope: Any) -> dict[str, Any]:
        """A decoder with one kind of attention."""
        self.same(mlp_activations=[_SILU], sliding_window_size=(0,))
        self.same(final_logits_soft_cap=(0,), attn_logits_soft_cap=(0,))
        theta = self.need("rope_max_timescale")
        return {
            "architectures": [architecture],
            "model_type": model_type,
            **self.sizes(model_type),
            "hidden_act": "silu",
            "rms_norm_eps": self.need("normalization_layer_epsilon"),
            "rope_theta": theta,
            "rope_parameters": {"rope_theta": theta, "rope_type": "default", **rope},
            "tie_word_embeddings": self.config.logits_via_embedding,
        }


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-6` as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _qwen2(trainer: _Trainer) -> dict[str, Any]:
    trainer.same(**_WHOLE, attention_bias=(True,))
    return trainer.plain("qwen2", "Qwen2ForCausalLM") | _UNWINDOWED


def _qwen3(trainer: _Trainer) -> dict[str, Any]:
    trainer.same(**_WHOLE, attention_bias=(False,))
    return trainer.plain("qwen3", "Qwen3ForCausalLM") | _UNWINDOWED


def _qwen3_moe(trainer: _Trainer) -> dict[str, Any]:
    trainer.same(**_WHOLE, attention_bias=(False,))
    return trainer.plain("qwen3_moe", "Qwen3MoeForCausalLM") | _UNWINDOWED | _experts_everywhere(trainer)


def _experts_everywhere(trainer: _Trainer) -> dict[str, Any]:
    return {
        "intermediate_size": trainer.config.mlp_dim or trainer.config.moe_mlp_dim,  # of layers that it has none of
        "num_experts_per_tok": trainer.need("num_experts_per_tok"),
        "norm_topk_prob": trainer.need("norm_topk_prob"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _hybrid(trainer: _Trainer, model_type: str, architecture: str) -> dict[str, Any]:
    """Gated delta nets with full attention in the last layer of a cycle, and a shared expert beside the others."""
    trainer.same(**_UNSCALED, attention_bias=(False,), use_qk_norm_in_gdn=(True,), shared_experts=(1,))
    rotary = trainer.need("partial_rotary_factor")
    return trainer.plain(model_type, architecture, partial_rotary_factor=rotary) | {
        "layer_types": trainer.layer_types("linear_attention", trainer.config.inhomogeneous_layer_cycle_interval),
        "shared_expert_intermediate_size": trainer.config.moe_mlp_dim,
    }


def _qwen3_next(trainer: _Trainer) -> dict[str, Any]:
    return _hybrid(trainer, "qwen3_next", "Qwen3NextForCausalLM") | _experts_everywhere(trainer)


def _qwen3_5(trainer: _Trainer) -> dict[str, Any]:
    """The class without a vision tower; it always divides the chosen experts' weights by their sum."""
    trainer.need("norm_topk_prob")
    trainer.same(norm_topk_prob=(True,))
    text = _hybrid(trainer, "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM")
    text |= {"num_experts_per_tok": trainer.need("num_experts_per_tok"), "mlp_only_layers": []}
    return {
        "architectures": text.pop("architectures"),
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "tie_word_embeddings": trainer.config.logits_via_embedding,
    }


def _llama(trainer: _Trainer) -> dict[str, Any]:
    """Its scaled frequencies are constants of MaxText 0.2.5, layers/embeddings.py."""
    trainer.same(attention_bias=(False,), rope_use_scale=(True,), partial_rotary_factor=(1,), rope_type=("llama3.1",))
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    found = trainer.plain("llama", "LlamaForCausalLM", **scaling)
    return found | {"rope_scaling": scaling, "max_position_embeddings": 131072, "attention_bias": False}


def _gemma4_rope(trainer: _Trainer) -> dict[str, Any]:
    full = {
        "rope_type": "proportional",
        "rope_theta": trainer.need("global_rope_max_timescale"),
        "partial_rotary_factor": trainer.need("global_rope_proportion"),
    }
    sliding = {"rope_type": "default", "rope_theta": trainer.need("local_rope_max_timescale")}
    return {"full_attention": full, "sliding_attention": sliding}


def _gemma4_experts(trainer: _Trainer) -> dict[str, Any]:
    if trainer.config.num_experts <= 1:
        return {"enable_moe_block": False}
    return {
        "enable_moe_block": True,
        "num_experts": trainer.config.num_experts,
        "moe_intermediate_size": trainer.config.moe_mlp_dim,
        "top_k_experts": trainer.need("num_experts_per_tok"),
    }


def _gemma4_per_layer_input(trainer: _Trainer) -> dict[str, Any]:
    if not trainer.config.hidden_size_per_layer_input:
        return {"hidden_size_per_layer_input": 0}
    names = ("hidden_size_per_layer_input", "vocab_size_per_layer_input")
    return {name: getattr(trainer.config, name) for name in names}


def _gemma4_layer_types(trainer: _Trainer) -> list[str]:
    period = trainer.config.inhomogeneous_layer_cycle_interval
    if period == 1 and trainer.config.hidden_size_per_layer_input:
        trainer.problems.append(
            "inhomogeneous_layer_cycle_interval: 1; MaxText goes by the model's name, so give it: 5 for E2B, 6 for E4B"
        )
    return trainer.layer_types("sliding_attention", 6 if period == 1 else period)


def _gemma4(trainer: _Trainer) -> dict[str, Any]:
    config = trainer.config
    trainer.same(
        mlp_activations=[_GELU], local_rope_proportion=(1,), v_norm_with_scale=(False,), rope_type=("default",)
    )
    text = {
        "model_type": "gemma4_text",
        **trainer.sizes("gemma4_text"),
        "global_head_dim": config.global_head_dim or config.head_dim,
        "num_global_key_value_heads": config.global_num_kv_heads or None,
        "attention_k_eq_v": config.share_kv_projections,
        "layer_types": _gemma4_layer_types(trainer),
        "sliding_window": trainer.need("sliding_window_size"),
        "rope_parameters": _gemma4_rope(trainer),
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": trainer.need("normalization_layer_epsilon"),
        "final_logit_softcapping": trainer.need("final_logits_soft_cap") or None,
        "num_kv_shared_layers": config.num_kv_shared_layers,
        "use_double_wide_mlp": config.use_double_wide_mlp,
        **_gemma4_experts(trainer),
        **_gemma4_per_layer_input(trainer),
        "tie_word_embeddings": config.logits_via_embedding,
    }
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": text,
        "vision_config": None,
        "audio_config": None,
        "tie_word_embeddings": config.logits_via_embedding,
    }


_FAMILIES: Mapping[str, Callable[[_Trainer], dict[str, Any]]] = {
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_5,
    "llama2": _llama,
    "gemma4": _gemma4,
    "gemma4_small": _gemma4,
}


def derive_hub_config(source: Any) -> dict[str, Any]:
    """The hub's `config.json` of a model, from its trainer's configuration.

    Nothing that results depend on is guessed or takes a default: the configuration says it, or the family has no choice
    there. What is no property of the weights (token ids, the longest context) is left to the defaults of whoever loads.

    Args:
        source: MaxText's config object, a mapping, or the path of a YAML or JSON, in MaxText's keys.

    Returns:
        The content of a `config.json`, such as `export` takes as `hub_config`.

    Raises:
        ConfigError: The configuration does not say enough, or has what the family's class on the hub has not; or it is
            of a family for which none is derived.

    Example:
        >>> portax.derive_hub_config("qwen3-8b.yml")["rope_theta"]
        1000000
    """
    trainer = _Trainer(source)
    block = trainer.config.decoder_block
    if block not in _FAMILIES:
        raise ConfigError(f"no config.json is derived for decoder_block={block!r}; only for {', '.join(_FAMILIES)}")
    found = _FAMILIES[block](trainer)
    if trainer.problems:
        lines = "\n".join(f"  {problem}" for problem in trainer.problems)
        raise ConfigError(f"no config.json can be derived from this configuration:\n{lines}")
    return found
