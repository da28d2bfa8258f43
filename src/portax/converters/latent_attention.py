"""`LatentAttentionDecoder`: a decoder whose keys and values are made of one small vector for each token (MLA)."""

from typing import Any

from portax.converters.decoder import PlainDecoder
from portax.trainer.layer_params import LayerParams
from portax.weights import blocks
from portax.weights.blocks import Blocks


class LatentAttentionDecoder(PlainDecoder):
    """A `PlainDecoder` with latent attention, whose config has the sizes of `DeepSeekConfig`."""

    config: Any

    def attention(self, layer: LayerParams) -> Blocks:
        """Latent attention (MLA): queries in one step or two, and keys and values of one small latent vector."""
        at, name, heads = "self_attention", "self_attn", "num_query_heads qk_nope_head_dim+qk_rope_head_dim"
        latent = layer.read(f"{at}/wkv_a/kernel", "emb_dim kv_lora_rank+qk_rope_head_dim")
        to_latent = f"{name}.kv_a_proj_with_mqa"
        if self.config.q_lora_rank:
            parts = (layer.read(f"{at}/wq_a/kernel", "emb_dim q_lora_rank"),), (latent,)
            queries: Blocks = (
                blocks.MergedLinear(f"{name}.fused_qkv_a_proj", (f"{name}.q_a_proj", to_latent), parts),
                self.norm(layer, f"{at}/q_norm", f"{name}.q_a_layernorm", "q_lora_rank"),
                blocks.Linear(f"{name}.q_b_proj", layer.read(f"{at}/wq_b/kernel", f"q_lora_rank {heads}"), "column"),
            )
        else:
            queries = (
                blocks.Linear(f"{name}.q_proj", layer.read(f"{at}/query/kernel", f"emb_dim {heads}"), "column"),
                blocks.Linear(to_latent, latent, "replicated"),
            )
        size, sparse = self.config.qk_nope_head_dim, self.config.use_indexer
        kernel = layer.read(f"{at}/wkv_b/kernel", "kv_lora_rank num_query_heads qk_nope_head_dim+v_head_dim")
        output = layer.read(f"{at}/out/kernel", "num_query_heads v_head_dim emb_dim")
        return (
            *queries,
            self.norm(layer, f"{at}/kv_norm", f"{name}.kv_a_layernorm", "kv_lora_rank"),
            blocks.LatentKV(f"{name}.kv_b_proj", kernel, size, sparse),
            blocks.Linear(f"{name}.o_proj", output, "row"),
            *(self.indexer(layer, f"{at}/indexer", f"{name}.indexer") if sparse else ()),
        )

    def indexer(self, layer: LayerParams, at: str, name: str) -> Blocks:
        """V3.2's selection of the tokens that are attended to."""
        projections = {
            "wq_b": "q_lora_rank indexer_n_heads indexer_head_dim",
            "wk": "emb_dim indexer_head_dim",
            "weights_proj": "emb_dim indexer_n_heads",
        }
        return (
            *(
                blocks.Linear(f"{name}.{projection}", layer.read(f"{at}/{projection}/kernel", axes), "replicated")
                for projection, axes in projections.items()
            ),
            self.norm(layer, f"{at}/k_norm", f"{name}.k_norm", "indexer_head_dim"),
            blocks.Param(f"{name}.k_norm.bias", layer.read(f"{at}/k_norm/bias", "indexer_head_dim")),
        )
