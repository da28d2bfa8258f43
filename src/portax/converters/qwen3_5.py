"""Qwen3.5: gated delta nets, with a layer of full attention in every cycle, and mixtures of experts."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from jaxtyping import Array, Shaped

from portax.config.hub import DENSE, EXPERTS, HubConfig
from portax.config.to_hub import UNSCALED_ROPE, TrainerConfig
from portax.converters.decoder import AttentionAxes, PlainDecoder
from portax.trainer.layer_params import LayerParams
from portax.trainer.scan import LayerSlice, LayerTypes, ScanPattern
from portax.weights import blocks
from portax.weights.blocks import Blocks

_LINEAR: LayerTypes = frozenset({"linear_attention"})
_FULL: LayerTypes = frozenset({"full_attention"})
_SIZES = {name: key for name, key in DENSE.items() if name != "mlp_dim"}
_DELTA_NET = {
    "gdn_num_key_heads": "linear_num_key_heads",
    "gdn_num_value_heads": "linear_num_value_heads",
    "gdn_key_head_dim": "linear_key_head_dim",
    "gdn_value_head_dim": "linear_value_head_dim",
    "gdn_conv_kernel_dim": "linear_conv_kernel_dim",
}


class Qwen3_5Converter(PlainDecoder):  # noqa: N801
    """Qwen3.5 35B-A3B and 397B-A17B, as MaxText 0.2.5 holds them."""

    decoder_blocks = ("qwen3_5",)
    hub_types = ("qwen3_5_moe_text",)
    required = (
        "inhomogeneous_layer_cycle_interval",
        "gdn_num_key_heads",
        "gdn_num_value_heads",
        "gdn_key_head_dim",
        "gdn_value_head_dim",
        "gdn_conv_kernel_dim",
    )
    architecture = "Qwen3_5MoeForConditionalGeneration"
    default_module_prefix = "language_model."
    scan_pattern = ScanPattern("decoder/layers", "layer_")
    experts_on_hub: ClassVar[Literal["each", "stacked"]] = "stacked"

    def layer_cycle(self, found: Sequence[LayerSlice]) -> tuple[LayerTypes, ...]:
        """Linear attention, and full attention in the last layer of a cycle."""
        return (*(_LINEAR,) * (self.config.inhomogeneous_layer_cycle_interval - 1), _FULL)

    def attention(self, layer: LayerParams) -> Blocks:
        """A gated delta net, or attention whose output a part of the query gates."""
        return self.delta_net(layer) if "linear_attention" in layer.types else self.gated_attention(layer)

    def gated_attention(self, layer: LayerParams) -> Blocks:
        """Grouped-query attention; each query head carries its gate behind it."""
        axes = AttentionAxes(query_dim="2*head_dim", out="num_query_heads*head_dim emb_dim")
        return self.grouped_query_attention(layer, "attention/attention", axes, norms=True)

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

    @classmethod
    def from_hub(cls, hub: HubConfig) -> dict[str, Any]:
        """Returns the fields of a model whose layers all have experts."""
        cycle = hub.attention_cycle()
        if cycle is None:
            hub.problems.append("full_attention_interval, layer_types: missing from the hub config")
        return {
            "decoder_block": cls.decoder_blocks[0],
            "logits_via_embedding": hub.get("tie_word_embeddings", False),
            "inhomogeneous_layer_cycle_interval": cycle or 1,
            "shared_experts": int(bool(hub.get("shared_expert_intermediate_size"))),
            "mlp_dim": hub.get("intermediate_size", 0),
            **hub.sizes(_SIZES | _DELTA_NET),
            **hub.expert_sizes(),
        }

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Returns the hub `config.json`: of the class without a vision tower.

        That class always divides the chosen experts' weights by their sum.
        """
        trainer.need("norm_topk_prob")
        trainer.same(norm_topk_prob=(True,))
        text = delta_net_config(trainer, "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM")
        text |= {"num_experts_per_tok": trainer.need("num_experts_per_tok"), "mlp_only_layers": []}
        return {
            "architectures": text.pop("architectures"),
            "model_type": "qwen3_5_moe",
            "text_config": text,
            "tie_word_embeddings": trainer.config.logits_via_embedding,
        }


def delta_net_config(trainer: TrainerConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """Returns the hub's fields of delta nets with full attention in the last layer of a cycle, and a shared expert."""
    trainer.same(**UNSCALED_ROPE, attention_bias=(False,), use_qk_norm_in_gdn=(True,), shared_experts=(1,))
    rotary, cycle = trainer.need("partial_rotary_factor"), trainer.config.inhomogeneous_layer_cycle_interval
    names = _SIZES | _DELTA_NET | EXPERTS
    return trainer.plain(model_type, architecture, names, partial_rotary_factor=rotary) | {
        "full_attention_interval": cycle,
        "layer_types": trainer.layer_types("linear_attention", cycle),
        "shared_expert_intermediate_size": trainer.config.moe_mlp_dim,
    }
