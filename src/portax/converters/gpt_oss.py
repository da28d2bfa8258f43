"""gpt-oss: attention with sinks, mixtures of experts, and biases everywhere."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from portax.config.hub import DENSE, HubConfig
from portax.config.model_config import ModelConfig
from portax.config.to_hub import TrainerConfig
from portax.converters.decoder import PlainDecoder
from portax.errors import ConfigError
from portax.trainer.layer_params import LayerParams
from portax.trainer.scan import LayerSlice, LayerTypes, ScanPattern
from portax.weights import blocks
from portax.weights.blocks import Blocks

_SIZES = {name: key for name, key in DENSE.items() if name != "mlp_dim"}
_SIZES |= {"num_experts": "num_local_experts", "moe_mlp_dim": "intermediate_size"}
_ALWAYS = ("attention_bias", "attention_sink", "mlp_bias", "routed_bias")
_ATTENTION, _MLP = "GptOssAttention", "GptOssMlp"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig(ModelConfig):
    """A `ModelConfig`, with the switches that are on in every gpt-oss.

    Attributes:
        attention_sink: True if every query head has a sink, a number that takes part in the softmax.
        mlp_bias: True if experts have biases.
    """

    attention_sink: bool = False
    mlp_bias: bool = False


class GptOssConverter(PlainDecoder):
    """gpt-oss 20B and 120B, as MaxText 0.2.5 holds them: sliding attention and full attention take turns."""

    decoder_blocks = ("gpt_oss",)
    hub_types = ("gpt_oss",)
    config_class = GptOssConfig
    architecture = "GptOssForCausalLM"
    engine_names = (("self_attn.", "attn."), ("embed_tokens.", "embedding."))
    scan_pattern: ClassVar[ScanPattern | None] = ScanPattern("decoder/layers", "layers_")

    def check_config(self) -> None:
        """Refuses a model without one of the biases or without sinks, and other cycles than MaxText's."""
        if off := [name for name in _ALWAYS if not getattr(self.config, name)]:
            raise ConfigError(
                f"{', '.join(off)}: not set, and every gpt-oss has biases in all projections, sinks, and a bias of the "
                "router: pass the trainer's whole configuration, which says so"
            )
        if self.config.num_experts <= 1:
            raise ConfigError(f"num_experts={self.config.num_experts}: every layer of gpt-oss is a mixture of experts")
        if (cycle := self.config.inhomogeneous_layer_cycle_interval) % 2:
            raise ConfigError(
                f"inhomogeneous_layer_cycle_interval={cycle}: MaxText's layers of gpt-oss take turns, sliding "
                "attention and full, so that the cycle is 2 or a multiple of it; with another one, scanned layers "
                "have the wrong attention"
            )

    def layer_cycle(self, found: Sequence[LayerSlice]) -> tuple[LayerTypes, ...]:
        """A cycle of layers whose weights are alike."""
        return (frozenset(),) * self.config.inhomogeneous_layer_cycle_interval

    def attention(self, layer: LayerParams) -> Blocks:
        """Grouped-query attention with biases, and the sink of each query head."""
        read = self.read_attention(layer, _ATTENTION)
        projections, _ = self.attention_blocks(read)
        bias = layer.read(f"{_ATTENTION}/out/bias", "emb_dim")
        return (
            projections,
            blocks.Linear("self_attn.o_proj", read.output, "row", bias),
            blocks.Param("self_attn.sinks", layer.read(f"{_ATTENTION}/sinks", "num_query_heads")),
        )

    def moe(self, layer: LayerParams) -> Blocks:
        """A router and its experts, all with biases."""
        experts = self.experts(layer, _MLP, "mlp.experts", hub="alternating")
        bias = {
            name: layer.read(f"{_MLP}/{name}_bias", f"num_experts {width}")
            for name, width in (("wi_0", "moe_mlp_dim"), ("wi_1", "moe_mlp_dim"), ("wo", "emb_dim"))
        }
        return (
            blocks.BareLinear("mlp.router", layer.read(f"{_MLP}/gate/kernel", "emb_dim num_experts")),
            blocks.Param("mlp.router.bias", layer.read(f"{_MLP}/gate/bias", "num_experts")),
            dataclasses.replace(experts, bias=tuple(bias.values())),
        )

    @classmethod
    def from_hub(cls, hub: HubConfig) -> dict[str, Any]:
        """Returns the fields of a model with experts in every layer."""
        cycle = hub.attention_cycle()
        if cycle not in (None, 2):
            hub.problems.append(f"layer_types: full attention in the last of {cycle}; MaxText has it in the last of 2")
        sizes = hub.sizes(_SIZES)
        return {
            "decoder_block": cls.decoder_blocks[0],
            "logits_via_embedding": hub.get("tie_word_embeddings", False),
            "mlp_dim": sizes.get("moe_mlp_dim", 0),
            **sizes,
            **dict.fromkeys(_ALWAYS, True),
            "attention_bias": hub.get("attention_bias", True),
            "inhomogeneous_layer_cycle_interval": 2,
            "rope_type": hub.rope.get("rope_type", "default"),
        }

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Returns the hub `config.json`."""
        trainer.same(mlp_activations=[["sigmoid", "linear"]], mlp_activations_limit=(7,), rope_interleave=(False,))
        trainer.same(rope_attention_scaling=(True,), final_logits_soft_cap=(0,), attn_logits_soft_cap=(0,))
        trainer.same(partial_rotary_factor=(1,))
        if not (window := trainer.need("sliding_window_size")):
            trainer.problems.append(f"sliding_window_size: {window!r}; every second layer of gpt-oss has a window")
        yarn = {**trainer.yarn(), "truncate": bool(trainer.need("rope_truncate"))}
        return {
            **trainer.decoder("gpt_oss", cls.architecture, _SIZES, **yarn),
            "rope_scaling": yarn,
            "num_experts_per_tok": trainer.need("num_experts_per_tok"),
            "layer_types": trainer.layer_types("sliding_attention", 2),
            "sliding_window": window,
            "attention_bias": True,
            "swiglu_limit": 7.0,
        }
