"""Qwen3, dense and mixture-of-experts."""

from portax import blocks
from portax.base import BaseConverter, Blocks
from portax.leaves import Leaves


class Qwen3Converter(BaseConverter):
    """Qwen3 0.6B to 32B and Qwen3-MoE 30B-A3B to 480B-A35B, as MaxText 0.2.5 holds them."""

    decoder_blocks = ("qwen3", "qwen3_moe")

    def attention(self, layer: Leaves) -> Blocks:
        """Grouped-query attention with per-head norms on queries and keys."""
        at = "self_attention"
        out = layer.read(f"{at}/out/kernel", "num_query_heads head_dim emb_dim")
        return (
            blocks.QKV(
                "self_attn",
                layer.read(f"{at}/query/kernel", "emb_dim num_query_heads head_dim"),
                layer.read(f"{at}/key/kernel", "emb_dim num_kv_heads head_dim"),
                layer.read(f"{at}/value/kernel", "emb_dim num_kv_heads head_dim"),
            ),
            blocks.Linear("self_attn.o_proj", out, "row"),
            blocks.Param("self_attn.q_norm.weight", layer.read(f"{at}/query_norm/scale", "head_dim")),
            blocks.Param("self_attn.k_norm.weight", layer.read(f"{at}/key_norm/scale", "head_dim")),
        )

    def norms(self, layer: Leaves) -> Blocks:
        """One norm before attention, one before the MLP."""
        before, after = "pre_self_attention_layer_norm", "post_self_attention_layer_norm"
        return (
            blocks.Param("input_layernorm.weight", layer.read(f"{before}/scale", "emb_dim")),
            blocks.Param("post_attention_layernorm.weight", layer.read(f"{after}/scale", "emb_dim")),
        )

    def moe(self, layer: Leaves) -> Blocks:
        """A router and its experts; no shared expert."""
        return (
            blocks.Linear("mlp.gate", layer.read("moe_block/gate/kernel", "emb_dim num_experts"), "replicated"),
            self.experts(layer, "moe_block", "mlp.experts", hub="each"),
        )
