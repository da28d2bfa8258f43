"""Qwen3, dense and mixture-of-experts."""

from portax.converters.base import BaseConverter
from portax.converters.decoder import Blocks
from portax.trainer.layer_params import LayerParams
from portax.weights import blocks


class Qwen3Converter(BaseConverter):
    """Qwen3 0.6B to 32B and Qwen3-MoE 30B-A3B to 480B-A35B, as MaxText 0.2.5 holds them."""

    decoder_blocks = ("qwen3", "qwen3_moe")

    @property
    def architecture(self) -> str | None:
        """As the hub's `config.json` says."""
        return "Qwen3MoeForCausalLM" if self.config.num_experts > 1 else "Qwen3ForCausalLM"

    def attention(self, layer: LayerParams) -> Blocks:
        """Grouped-query attention with per-head norms on queries and keys."""
        return self.grouped_query_attention(layer, "self_attention", norms=True)

    def moe(self, layer: LayerParams) -> Blocks:
        """A router and its experts; no shared expert."""
        return (
            blocks.Linear("mlp.gate", layer.read("moe_block/gate/kernel", "emb_dim num_experts"), "replicated"),
            self.experts(layer, "moe_block", "mlp.experts", hub="each"),
        )
