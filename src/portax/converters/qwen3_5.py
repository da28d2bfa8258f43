"""Qwen3.5: gated delta nets, with a layer of full attention in every cycle, and mixtures of experts."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from jaxtyping import Array, Shaped

from portax.converters.base import BaseConverter
from portax.converters.decoder import Blocks
from portax.trainer.layer_params import LayerParams
from portax.trainer.scan import LayerSlice, LayerTypes, ScanPattern
from portax.weights import blocks

_LINEAR: LayerTypes = frozenset({"linear_attention"})
_FULL: LayerTypes = frozenset()


class Qwen3_5Converter(BaseConverter):  # noqa: N801
    """Qwen3.5 35B-A3B and 397B-A17B, as MaxText 0.2.5 holds them."""

    decoder_blocks = ("qwen3_5",)
    required = (
        "inhomogeneous_layer_cycle_interval",
        "gdn_num_key_heads",
        "gdn_num_value_heads",
        "gdn_key_head_dim",
        "gdn_value_head_dim",
        "gdn_conv_kernel_dim",
    )
    default_module_prefix = "language_model."
    scan_pattern = ScanPattern("decoder/layers", "layer_")
    experts_on_hub: ClassVar[Literal["each", "stacked"]] = "stacked"

    @property
    def architecture(self) -> str | None:
        """As the hub's `config.json` says."""
        return "Qwen3_5MoeForConditionalGeneration"

    def layer_cycle(self, found: Sequence[LayerSlice]) -> tuple[LayerTypes, ...]:
        """Linear attention, and full attention in the last layer of a cycle."""
        return (*(_LINEAR,) * (self.config.inhomogeneous_layer_cycle_interval - 1), _FULL)

    def attention(self, layer: LayerParams) -> Blocks:
        """A gated delta net, or attention whose output a part of the query gates."""
        return self.delta_net(layer) if "linear_attention" in layer.types else self.gated_attention(layer)

    def gated_attention(self, layer: LayerParams) -> Blocks:
        """Grouped-query attention; each query head carries its gate behind it."""
        out = "num_query_heads*head_dim emb_dim"
        return self.grouped_query_attention(layer, "attention/attention", query_dim="2*head_dim", out=out, norms=True)

    def delta_net(self, layer: LayerParams) -> Blocks:
        """Projections of a gated delta net, its convolution, decay and norm."""
        at, name = "attention", "linear_attn"
        conv = layer.read(f"{at}/conv1d/kernel", "gdn_conv_kernel_dim 1 2*gdn_key_dim+gdn_value_dim")
        decay = layer.read(f"{at}/A_log", "gdn_num_value_heads")
        out = layer.read(f"{at}/out_proj/kernel", "gdn_value_dim emb_dim")
        return (
            *self.delta_net_inputs(
                layer.read(f"{at}/in_proj_qkvz/kernel", "emb_dim 2*gdn_key_dim+2*gdn_value_dim"),
                layer.read(f"{at}/in_proj_ba/kernel", "emb_dim 2*gdn_num_value_heads"),
            ),
            blocks.DepthwiseConv(f"{name}.conv1d", conv),
            blocks.Param(f"{name}.A_log", decay, float32=True),
            blocks.Param(f"{name}.dt_bias", layer.read(f"{at}/dt_bias", "gdn_num_value_heads")),
            self.norm(layer, f"{at}/norm/rms_norm", f"{name}.norm", "gdn_value_head_dim"),
            blocks.Linear(f"{name}.out_proj", out, "row"),
        )

    def delta_net_inputs(self, qkvz: Shaped[Array, "in _"], ba: Shaped[Array, "in _"]) -> Blocks:
        """Queries, keys, values and output gates; betas and decays. MaxText has them side by side for each key head."""
        groups = self.config.gdn_num_key_heads
        per_key_head = self.config.gdn_num_value_heads // groups
        key, value = self.config.gdn_key_head_dim, per_key_head * self.config.gdn_value_head_dim
        name = "linear_attn"
        return (
            blocks.GroupedLinear(
                f"{name}.in_proj_qkvz",
                qkvz,
                groups,
                widths=(key, key, value, value),
                hub=((f"{name}.in_proj_qkv", 3), (f"{name}.in_proj_z", 1)),
            ),
            blocks.GroupedLinear(
                f"{name}.in_proj_ba",
                ba,
                groups,
                widths=(per_key_head, per_key_head),
                hub=((f"{name}.in_proj_b", 1), (f"{name}.in_proj_a", 1)),
            ),
        )

    def norms(self, layer: LayerParams) -> Blocks:
        """One norm before attention, one before the experts."""
        return (
            self.norm(layer, "input_layernorm", "input_layernorm"),
            self.norm(layer, "post_attention_layernorm", "post_attention_layernorm"),
        )

    def moe(self, layer: LayerParams) -> Blocks:
        """A router, routed experts, and a shared expert behind a gate; MaxText sizes both kinds alike."""
        routed = blocks.BareLinear("mlp.gate", layer.read("mlp/routed_experts/gate/kernel", "emb_dim num_experts"))
        experts = self.experts(layer, "mlp/routed_experts", "mlp.experts", hub=self.experts_on_hub)
        if not self.config.shared_experts:
            return routed, experts
        gate = layer.read("mlp/shared_expert_gate/kernel", "emb_dim 1")
        return (
            routed,
            experts,
            *self.gated_mlp(layer, "mlp/shared_expert", "mlp.shared_expert", width="moe_mlp_dim"),
            blocks.BareLinear("mlp.shared_expert_gate", gate),
        )
