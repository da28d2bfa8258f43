"""DeepSeek V2, V3 and R1, V3.2, and Kimi-K2: latent attention, dense layers first, then mixtures of experts."""

from collections.abc import Iterable, Sequence
from typing import Any

from portax.config.hub import HubConfig
from portax.config.model_config import ModelConfig
from portax.config.to_hub import TrainerConfig
from portax.converters.deepseek_config import DeepSeekConfig, from_hub, to_hub
from portax.converters.latent_attention import LatentAttentionDecoder
from portax.trainer.layer_params import LayerParams
from portax.trainer.scan import LayerSlice, LayerTypes, dense_then_moe
from portax.weights import blocks
from portax.weights.blocks import Blocks

_MOE = "DeepSeekMoeBlock_0"
_ROUTED = f"{_MOE}/MoeBlock_0"


class DeepSeekConverter(LatentAttentionDecoder):
    """DeepSeek V2 to V3.2 and Kimi-K2, as MaxText 0.2.5 holds them."""

    decoder_blocks = ("deepseek",)
    hub_types = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2")
    config_class = DeepSeekConfig
    config: DeepSeekConfig
    required = ("first_num_dense_layers", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

    @property
    def architecture(self) -> str:
        """As the hub's `config.json` says."""
        return self.config.architecture

    def check_config(self) -> None:
        """Refuses models that contradict themselves, and what MaxText's exporter leaves out."""
        self.config.check()

    def layer_cycle(self, found: Sequence[LayerSlice]) -> tuple[LayerTypes, ...]:
        """Dense layers, then mixtures of experts; it never repeats."""
        dense = self.config.first_num_dense_layers
        return (frozenset({"dense"}),) * dense + (frozenset({"moe"}),) * (self.config.num_decoder_layers - dense)

    def stacks(self, *, scanned: bool) -> Iterable[tuple[str, tuple[int, ...], int]]:
        """The layers of each kind by themselves, counted from 0."""
        return dense_then_moe(self.config.num_decoder_layers, self.config.first_num_dense_layers, scanned=scanned)

    @classmethod
    def layer_counts(cls, config: ModelConfig, layers: Sequence[LayerSlice]) -> dict[str, int]:
        """The dense layers."""
        return {"first_num_dense_layers": sum("/dense_layers" in layer.container for layer in layers)}

    def scan_axis(self, path: str) -> int:
        """The first axis for the router bias, a `MoEBiasVar`, which `nnx.scan` stacks apart from parameters."""
        return 0 if path == f"{_ROUTED}/gate/bias" else super().scan_axis(path)

    def moe(self, layer: LayerParams) -> Blocks:
        """An MLP in dense layers; in others a router, with a bias since V3, shared experts, and routed ones."""
        if "dense" in layer.types:
            return self.mlp(layer)
        shared = f"{_MOE}/shared_experts", "mlp.shared_experts"
        return (
            blocks.BareLinear("mlp.gate", layer.read(f"{_ROUTED}/gate/kernel", "emb_dim num_experts")),
            *(self.router_bias(layer) if self.config.routed_bias else ()),
            *self.gated_mlp(layer, *shared, width="shared_experts*moe_mlp_dim"),
            self.experts(layer, _ROUTED, "mlp.experts", hub="each"),
        )

    def router_bias(self, layer: LayerParams) -> Blocks:
        """The bias that balances the load of experts; in an engine the experts hold it, too."""
        name = "e_score_correction_bias"
        value = layer.read(f"{_ROUTED}/gate/bias", "num_experts")
        again = (f"mlp.experts.routed_experts.{name}",)
        return (blocks.Param(f"mlp.gate.{name}", value, float32=True, again=again),)

    @classmethod
    def from_hub(cls, hub: HubConfig) -> dict[str, Any]:
        """Returns the fields of a model with latent attention."""
        return from_hub(hub)

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Returns the hub `config.json`."""
        return to_hub(trainer)
