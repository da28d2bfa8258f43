"""Gemma4: 26B (mixture of experts) and 31B (dense)."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from portax.config.hub import DENSE, EXPERTS, HubConfig
from portax.config.to_hub import GELU, TrainerConfig
from portax.converters.decoder import AttentionAxes
from portax.converters.gemma3 import Gemma3Converter
from portax.layouts import NativeModel
from portax.trainer.layer_params import LayerParams
from portax.trainer.scan import LayerSlice, LayerTypes, ScanPattern
from portax.weights import blocks
from portax.weights.blocks import Blocks
from portax.weights.scale_shift import ScaleShift

_SLIDING: LayerTypes = frozenset({"sliding_attention"})
_FULL: LayerTypes = frozenset({"full_attention"})
_SWITCHES = {
    "global_head_dim": "global_head_dim",
    "global_num_kv_heads": "num_global_key_value_heads",
    "share_kv_projections": "attention_k_eq_v",
    "num_kv_shared_layers": "num_kv_shared_layers",
    "use_double_wide_mlp": "use_double_wide_mlp",
    "hidden_size_per_layer_input": "hidden_size_per_layer_input",
    "vocab_size_per_layer_input": "vocab_size_per_layer_input",
}


class Gemma4Converter(Gemma3Converter):
    """Gemma4 26B and 31B, as MaxText 0.2.5 holds them: five layers of sliding attention and one of full, over and over.

    A layer of full attention has heads of its own width and number, and may use its keys as values.
    """

    decoder_blocks = ("gemma4",)
    hub_types = ("gemma4_text",)
    scan_pattern: ClassVar[ScanPattern | None] = ScanPattern("decoder/scanned_blocks", "nested")

    @property
    def architecture(self) -> str | None:
        """Of a checkpoint with all modalities, or of one with text alone."""
        return "Gemma4ForConditionalGeneration" if self.module_prefix else "Gemma4ForCausalLM"

    @property
    def native_model(self) -> NativeModel | None:
        """The engine runs the one of all modalities as a native JAX model."""
        if not self.module_prefix:
            return None
        return NativeModel(
            "Gemma4ForConditionalGeneration",
            head=None,
            merges_gate_up=True,
            cuts_wide_kv=True,
            quantises_experts=True,
        )

    @property
    def embedding_scale_shift(self) -> ScaleShift | None:
        """The divisor is in float32 (MaxText 0.2.5, checkpoint_conversion/utils/param_mapping.py)."""
        return ScaleShift(over=math.sqrt(self.config.emb_dim))

    @property
    def norm_scale_shift(self) -> ScaleShift | None:
        """As the hub's, unlike Gemma3's."""
        return None

    def layer_cycle(self, found: Sequence[LayerSlice]) -> tuple[LayerTypes, ...]:
        """Sliding attention, then full: 6 layers (MaxText 0.2.5, models/gemma4.py) unless the config tells."""
        period = self.config.inhomogeneous_layer_cycle_interval
        return (*(_SLIDING,) * (5 if period == 1 else period - 1), _FULL)

    def attention(self, layer: LayerParams) -> Blocks:
        """Grouped-query attention with per-head norms; the values have a norm without weights."""
        shares_kv = "full_attention" in layer.types and self.config.share_kv_projections
        axes = self.attention_axes(layer)
        return self.grouped_query_attention(layer, "self_attention", axes, shares_kv=shares_kv, norms=True)

    def attention_axes(self, layer: LayerParams) -> AttentionAxes:
        """Returns what the config calls the sizes of this layer's heads."""
        if "full_attention" not in layer.types:
            return AttentionAxes()
        return AttentionAxes(
            kv_heads="global_num_kv_heads" if self.config.global_num_kv_heads else "num_kv_heads",
            head_dim="global_head_dim" if self.config.global_head_dim else "head_dim",
        )

    def norms(self, layer: LayerParams) -> Blocks:
        """Gemma3's, and the scalar that the layer's output is multiplied with."""
        return *super().norms(layer), blocks.Param("layer_scalar", layer.read("layer_scalar", "1"))

    def moe(self, layer: LayerParams) -> Blocks:
        """A shared expert, a router with two scales, routed experts, and the norms between them."""
        routed = "mlp/moe_block/MoeBlock_0"
        scale = layer.read(f"{routed}/per_expert_scale", "num_experts")
        return (
            *self.gated_mlp(layer, "mlp/moe_block/shared_experts", "mlp", width="shared_experts*mlp_dim"),
            blocks.BareLinear("router.proj", layer.read(f"{routed}/gate/kernel", "emb_dim num_experts")),
            blocks.Param("router.scale", layer.read("mlp/pre_forward_scale_2", "emb_dim")),
            blocks.Param("router.per_expert_scale", scale),
            self.experts(layer, routed, "experts", hub="stacked"),
            self.norm(layer, "mlp/pre_feedforward_layernorm_2", "pre_feedforward_layernorm_2"),
            self.norm(layer, "mlp/post_feedforward_layernorm_1", "post_feedforward_layernorm_1"),
            self.norm(layer, "mlp/post_feedforward_layernorm_2", "post_feedforward_layernorm_2"),
        )

    @classmethod
    def reads_hub(cls, hub: HubConfig) -> bool:
        """Not of E2B and E4B, which have embeddings of each layer."""
        return super().reads_hub(hub) and not hub.get("hidden_size_per_layer_input")

    @classmethod
    def from_hub(cls, hub: HubConfig) -> dict[str, Any]:
        """Returns the fields of any Gemma4."""
        found = super().from_hub(hub)
        found |= {name: hub.get(key) for name, key in _SWITCHES.items() if hub.get(key) is not None}
        if hub.get("enable_moe_block"):
            found |= {**hub.sizes(EXPERTS), "shared_experts": 1}
        return found | {"inhomogeneous_layer_cycle_interval": hub.attention_cycle() or 1}

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Returns the hub `config.json`: that of all modalities, with the language model's part alone."""
        trainer.same(mlp_activations=[GELU], local_rope_proportion=(1,), v_norm_with_scale=(False,))
        trainer.same(rope_type=("default",))
        ties = trainer.config.logits_via_embedding
        return {
            "architectures": ["Gemma4ForConditionalGeneration"],
            "model_type": "gemma4",
            "text_config": _text_config(trainer),
            "vision_config": None,
            "audio_config": None,
            "tie_word_embeddings": ties,
        }


def _text_config(trainer: TrainerConfig) -> dict[str, Any]:
    config = trainer.config
    return {
        "model_type": "gemma4_text",
        **trainer.sizes(DENSE),
        "global_head_dim": config.global_head_dim or config.head_dim,
        "num_global_key_value_heads": config.global_num_kv_heads or None,
        "attention_k_eq_v": config.share_kv_projections,
        "layer_types": _layer_types(trainer),
        "sliding_window": trainer.need("sliding_window_size"),
        "rope_parameters": _rope(trainer),
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": trainer.need("normalization_layer_epsilon"),
        "final_logit_softcapping": trainer.need("final_logits_soft_cap") or None,
        "num_kv_shared_layers": config.num_kv_shared_layers,
        "use_double_wide_mlp": config.use_double_wide_mlp,
        **_experts(trainer),
        **_per_layer_input(trainer),
        "tie_word_embeddings": config.logits_via_embedding,
    }


def _rope(trainer: TrainerConfig) -> dict[str, Any]:
    full = {
        "rope_type": "proportional",
        "rope_theta": trainer.need("global_rope_max_timescale"),
        "partial_rotary_factor": trainer.need("global_rope_proportion"),
    }
    sliding = {"rope_type": "default", "rope_theta": trainer.need("local_rope_max_timescale")}
    return {"full_attention": full, "sliding_attention": sliding}


def _experts(trainer: TrainerConfig) -> dict[str, Any]:
    if trainer.config.num_experts <= 1:
        return {"enable_moe_block": False}
    return {
        "enable_moe_block": True,
        **trainer.sizes(EXPERTS),
        "top_k_experts": trainer.need("num_experts_per_tok"),
    }


def _per_layer_input(trainer: TrainerConfig) -> dict[str, Any]:
    if not trainer.config.hidden_size_per_layer_input:
        return {"hidden_size_per_layer_input": 0}
    names = ("hidden_size_per_layer_input", "vocab_size_per_layer_input")
    return {name: getattr(trainer.config, name) for name in names}


def _layer_types(trainer: TrainerConfig) -> list[str]:
    period = trainer.config.inhomogeneous_layer_cycle_interval
    if period == 1 and trainer.config.hidden_size_per_layer_input:
        trainer.problems.append(
            "inhomogeneous_layer_cycle_interval: 1; MaxText goes by the model's name, so give it: 5 for E2B, 6 for E4B"
        )
    return trainer.layer_types("sliding_attention", 6 if period == 1 else period)
