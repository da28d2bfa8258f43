"""Mixtral, as a fork of MaxText has it: a model family of another package than portax."""

import math
from typing import Any

from portax.extend import (
    DENSE,
    WHOLE_ROPE,
    Blocks,
    ConfigError,
    HubConfig,
    LayerParams,
    PlainDecoder,
    ScaleShift,
    TrainerConfig,
    blocks,
)

SIZES = {name: key for name, key in DENSE.items() if name != "mlp_dim"} | {
    "num_experts": "num_local_experts",
    "moe_mlp_dim": "intermediate_size",
}
"""The hub's names for the sizes: it says the width of an expert where other families say that of a dense MLP."""


class MixtralForkConverter(PlainDecoder):
    """Mixtral 8x7B and 8x22B of a fork of MaxText."""

    decoder_blocks = ("mixtral_fork",)
    hub_types = ("mixtral_fork",)
    architecture = "MixtralForCausalLM"
    required = ("moe_mlp_dim",)

    @property
    def query_scale_shift(self) -> ScaleShift:
        """The trainer folds the scale of the scores into its queries."""
        return ScaleShift(times=math.sqrt(self.config.head_dim))

    def moe(self, layer: LayerParams) -> Blocks:
        """A router and its experts, whose matrices the hub numbers."""
        router = layer.read("MoeBlock_0/gate/kernel", "emb_dim num_experts")
        names = blocks.ExpertNames(gate="w1", up="w3", down="w2")
        return (
            blocks.BareLinear("block_sparse_moe.gate", router),
            self.experts(layer, "MoeBlock_0", "block_sparse_moe.experts", hub="each", hub_names=names),
        )

    def check_config(self) -> None:
        """Refuses a dense model, biases, and heads that are together wider or narrower than the residual stream."""
        config = self.config
        if config.num_experts == 1 or config.attention_bias:
            raise ConfigError("num_experts=1 or attention_bias=True: no Mixtral is like that")
        if config.num_query_heads * config.head_dim != config.emb_dim:
            raise ConfigError(
                f"{config.num_query_heads} query heads of {config.head_dim} are not as wide as emb_dim="
                f"{config.emb_dim}: the trainer's own exporter is wrong there, so nothing says what is right"
            )

    @classmethod
    def from_hub(cls, hub: HubConfig) -> dict[str, Any]:
        """Returns the fields that a hub `config.json` tells."""
        tied = hub.get("tie_word_embeddings", False)
        return {"decoder_block": "mixtral_fork", "logits_via_embedding": tied, **hub.sizes(SIZES)}

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Returns the hub `config.json`."""
        trainer.same(**WHOLE_ROPE, attention_bias=(False,), shared_experts=(0,), routed_bias=(False,))
        found = trainer.plain("mixtral_fork", "MixtralForCausalLM", SIZES)
        return {**found, "num_experts_per_tok": trainer.need("num_experts_per_tok"), "sliding_window": None}
