"""Gemma4: 26B (mixture of experts) and 31B (dense)."""

import math
from collections.abc import Sequence
from typing import ClassVar

from portax.converters.decoder import Blocks
from portax.converters.gemma3 import Gemma3Converter
from portax.trainer.layer_params import LayerParams
from portax.trainer.scan import LayerSlice, LayerTypes, ScanPattern
from portax.weights import blocks
from portax.weights.scale_shift import ScaleShift

_LOCAL: LayerTypes = frozenset()
_GLOBAL: LayerTypes = frozenset({"global"})


class Gemma4Converter(Gemma3Converter):
    """Gemma4 26B and 31B, as MaxText 0.2.5 holds them: five local layers and a global one, over and over.

    A global layer has heads of its own width and number, and may use its keys as values.
    """

    decoder_blocks = ("gemma4",)
    scan_pattern: ClassVar[ScanPattern | None] = ScanPattern("decoder/scanned_blocks", "nested")

    @property
    def architecture(self) -> str | None:
        """Of a checkpoint with all modalities, or of one with text alone."""
        return "Gemma4ForConditionalGeneration" if self.module_prefix else "Gemma4ForCausalLM"

    @property
    def embedding_scale_shift(self) -> ScaleShift | None:
        """The divisor is in float32 (MaxText 0.2.5, checkpoint_conversion/utils/param_mapping.py)."""
        return ScaleShift(over=math.sqrt(self.config.emb_dim))

    @property
    def norm_scale_shift(self) -> ScaleShift | None:
        """As the hub's, unlike Gemma3's."""
        return None

    def layer_cycle(self, found: Sequence[LayerSlice]) -> tuple[LayerTypes, ...]:
        """Local layers, then a global one: 6 together (MaxText 0.2.5, models/gemma4.py) unless the config tells."""
        period = self.config.inhomogeneous_layer_cycle_interval
        return (*(_LOCAL,) * (5 if period == 1 else period - 1), _GLOBAL)

    def attention(self, layer: LayerParams) -> Blocks:
        """Grouped-query attention with per-head norms; the values have a norm without weights."""
        kv_heads, dim = self._heads(layer)
        shares_kv = "global" in layer.types and self.config.share_kv_projections
        return self.grouped_query_attention(
            layer, "self_attention", kv_heads=kv_heads, dim=dim, shares_kv=shares_kv, norms=True
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

    def _heads(self, layer: LayerParams) -> tuple[str, str]:
        """What the config calls the number of this layer's KV heads, and their width."""
        if "global" not in layer.types:
            return "num_kv_heads", "head_dim"
        return (
            "global_num_kv_heads" if self.config.global_num_kv_heads else "num_kv_heads",
            "global_head_dim" if self.config.global_head_dim else "head_dim",
        )
