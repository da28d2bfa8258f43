"""Qwen3, dense and mixture-of-experts."""

from typing import Any

from portax.config.hub import DENSE, EXPERTS, HubConfig
from portax.config.to_hub import WHOLE_ROPE, TrainerConfig
from portax.converters.decoder import PlainDecoder
from portax.layouts import NativeModel
from portax.trainer.layer_params import LayerParams
from portax.weights import blocks
from portax.weights.blocks import Blocks


class Qwen3Converter(PlainDecoder):
    """Qwen3 0.6B to 32B and Qwen3-MoE 30B-A3B to 480B-A35B, as MaxText 0.2.5 holds them."""

    decoder_blocks = ("qwen3", "qwen3_moe")
    hub_types = ("qwen3", "qwen3_moe")

    @property
    def architecture(self) -> str:
        """As the hub's `config.json` says."""
        return "Qwen3MoeForCausalLM" if self.config.num_experts > 1 else "Qwen3ForCausalLM"

    @property
    def native_model(self) -> NativeModel | None:
        """The engine runs the dense one as a native JAX model."""
        return (
            None
            if self.config.num_experts > 1
            else NativeModel("Qwen3ForCausalLM", pads_vocab=True, block_checkpoints=True)
        )

    def attention(self, layer: LayerParams) -> Blocks:
        """Grouped-query attention with per-head norms on queries and keys."""
        return self.grouped_query_attention(layer, "self_attention", norms=True)

    def moe(self, layer: LayerParams) -> Blocks:
        """A router and its experts; no shared expert."""
        return (
            blocks.Linear("mlp.gate", layer.read("moe_block/gate/kernel", "emb_dim num_experts"), "replicated"),
            self.experts(layer, "moe_block", "mlp.experts", hub="each"),
        )

    @classmethod
    def from_hub(cls, hub: HubConfig) -> dict[str, Any]:
        """Returns a dense model's fields, and those of the experts, if it has them."""
        experts = hub.expert_sizes() if hub.model_type == "qwen3_moe" else {}
        return {**super().from_hub(hub), **experts, "decoder_block": hub.model_type}

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Returns the hub `config.json`."""
        trainer.same(**WHOLE_ROPE, attention_bias=(False,))
        if trainer.config.num_experts == 1:
            return {**trainer.plain("qwen3", "Qwen3ForCausalLM"), "use_sliding_window": False}
        found = trainer.plain("qwen3_moe", "Qwen3MoeForCausalLM", DENSE | EXPERTS)
        return {**found, "use_sliding_window": False, **experts_everywhere(trainer)}


def experts_everywhere(trainer: TrainerConfig) -> dict[str, Any]:
    """Returns the hub's fields of a Qwen mixture of experts in every layer."""
    return {
        "intermediate_size": trainer.config.mlp_dim or trainer.config.moe_mlp_dim,  # of layers that it has none of
        "num_experts_per_tok": trainer.need("num_experts_per_tok"),
        "norm_topk_prob": trainer.need("norm_topk_prob"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
