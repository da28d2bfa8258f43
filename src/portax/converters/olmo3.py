"""OLMo3."""

from collections.abc import Sequence
from typing import Any, ClassVar

from portax.config.hub import HubConfig
from portax.config.to_hub import SILU, UNSCALED_ROPE, TrainerConfig
from portax.converters.decoder import PlainDecoder
from portax.errors import ConfigError
from portax.trainer.layer_params import LayerParams
from portax.trainer.scan import LayerSlice, LayerTypes, ScanPattern
from portax.weights.blocks import Blocks

_CYCLE = 4


class Olmo3Converter(PlainDecoder):
    """OLMo3 7B and 32B, as MaxText 0.2.5 holds them: norms behind attention and MLP, and over all heads together."""

    decoder_blocks = ("olmo3",)
    hub_types = ("olmo3",)
    architecture = "Olmo3ForCausalLM"
    scan_pattern: ClassVar[ScanPattern | None] = ScanPattern("decoder/layers", "layers_")

    def check_config(self) -> None:
        """Refuses biases, and another cycle of sliding and full attention than MaxText's own models have."""
        if self.config.attention_bias:
            raise ConfigError("attention_bias=True: no OLMo3 has biases on queries, keys and values")
        if (cycle := self.config.inhomogeneous_layer_cycle_interval) % _CYCLE:
            raise ConfigError(
                f"inhomogeneous_layer_cycle_interval={cycle}: every fourth layer of OLMo3 has full attention, all "
                "others sliding windows, so that the cycle is 4 or a multiple of it; with another one, scanned layers "
                "have the wrong attention"
            )

    def layer_cycle(self, found: Sequence[LayerSlice]) -> tuple[LayerTypes, ...]:
        """A cycle of layers whose weights are alike."""
        return (frozenset(),) * self.config.inhomogeneous_layer_cycle_interval

    def attention(self, layer: LayerParams) -> Blocks:
        """Grouped-query attention, with one norm over all query heads and one over all key heads."""
        return (
            *self.grouped_query_attention(layer, "attention"),
            self.norm(layer, "attention/query_norm", "self_attn.q_norm", "num_query_heads*head_dim"),
            self.norm(layer, "attention/key_norm", "self_attn.k_norm", "num_kv_heads*head_dim"),
        )

    def norms(self, layer: LayerParams) -> Blocks:
        """Norms behind attention and MLP; none before them."""
        return (
            self.norm(layer, "post_self_attention_layer_norm", "post_attention_layernorm"),
            self.norm(layer, "post_mlp_layer_norm", "post_feedforward_layernorm"),
        )

    @classmethod
    def from_hub(cls, hub: HubConfig) -> dict[str, Any]:
        """Returns a dense model's fields, and the cycle of its kinds of attention."""
        if (cycle := hub.attention_cycle()) not in (None, _CYCLE):
            hub.problems.append(f"layer_types: full attention in every layer of {cycle}: MaxText's OLMo3 has it in 4")
        return {**super().from_hub(hub), "inhomogeneous_layer_cycle_interval": _CYCLE}

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Returns the hub `config.json`; MaxText scales the frequencies of layers with a window, too."""
        trainer.same(rope_interleave=(False,), rope_attention_scaling=(True,), use_qk_norm=(True,))
        trainer.same(partial_rotary_factor=(1,), attention_bias=(False,), mlp_activations=[SILU])
        trainer.same(final_logits_soft_cap=(0,), attn_logits_soft_cap=(0,), local_rope_max_timescale=(-1,))
        if not (window := trainer.need("sliding_window_size")):
            trainer.problems.append(f"sliding_window_size: {window!r}; three of four layers of OLMo3 have a window")
        if trainer.config.rope_type == "yarn":
            rope = {**trainer.yarn(), "truncate": bool(trainer.need("rope_truncate"))}
        else:
            rope = {"rope_type": "default"}
            trainer.same(**UNSCALED_ROPE)
        found = trainer.decoder("olmo3", cls.architecture)
        rope["rope_theta"] = found["rope_theta"]
        return found | {
            "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
            "layer_types": trainer.layer_types("sliding_attention", _CYCLE),
            "sliding_window": window,
            "attention_bias": False,
        }
