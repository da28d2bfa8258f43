"""Mixtral."""

from typing import Any

from portax.config.hub import DENSE, HubConfig
from portax.config.to_hub import WHOLE_ROPE, TrainerConfig
from portax.converters.mistral import MistralConverter
from portax.errors import ConfigError
from portax.trainer.layer_params import LayerParams
from portax.weights import blocks
from portax.weights.blocks import Blocks

_EXPERTS = {"num_experts": "num_local_experts"}


class MixtralConverter(MistralConverter):
    """Mixtral 8x7B and 8x22B, as MaxText 0.2.5 holds them: Mistral with a mixture of experts in every layer.

    Heads need not be as wide together as the model, where MaxText's own exporter is wrong.
    """

    decoder_blocks = ("mixtral",)
    hub_types = ("mixtral",)
    architecture = "MixtralForCausalLM"
    required = ("moe_mlp_dim",)

    def check_config(self) -> None:
        """Refuses what Mistral refuses, and a dense model."""
        super().check_config()
        if self.config.num_experts == 1:
            raise ConfigError("num_experts=1: every layer of Mixtral is a mixture of experts")

    def moe(self, layer: LayerParams) -> Blocks:
        """A router and its experts, which the hub numbers w1 (gate), w3 (up) and w2 (down)."""
        router = layer.read("MoeBlock_0/gate/kernel", "emb_dim num_experts")
        names = blocks.ExpertNames(gate="w1", up="w3", down="w2")
        return (
            blocks.BareLinear("block_sparse_moe.gate", router),
            self.experts(layer, "MoeBlock_0", "block_sparse_moe.experts", hub="each", hub_names=names),
        )

    @classmethod
    def from_hub(cls, hub: HubConfig) -> dict[str, Any]:
        """Returns a dense model's fields; its MLP is that of an expert."""
        return {**super().from_hub(hub), **hub.sizes({**_EXPERTS, "moe_mlp_dim": "intermediate_size"})}

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Returns the hub `config.json`."""
        trainer.same(**WHOLE_ROPE, attention_bias=(False,), shared_experts=(0,), routed_bias=(False,))
        found = trainer.plain(
            "mixtral", "MixtralForCausalLM", {**DENSE, **_EXPERTS, "moe_mlp_dim": "intermediate_size"}
        )
        return {**found, "num_experts_per_tok": trainer.need("num_experts_per_tok"), "sliding_window": None}
