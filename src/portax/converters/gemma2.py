"""Gemma2."""

import math
from typing import Any

from portax.config.hub import HubConfig
from portax.config.to_hub import GELU, WHOLE_ROPE, TrainerConfig
from portax.converters.decoder import PlainDecoder
from portax.errors import ConfigError
from portax.trainer.layer_params import LayerParams
from portax.weights.blocks import Blocks
from portax.weights.parts import part_name
from portax.weights.scale_shift import ScaleShift

_NORMS = {
    "pre_self_attention_norm": "input_layernorm",
    "post_self_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_KINDS = ("local", "global")


class Gemma2Converter(PlainDecoder):
    """Gemma2 2B, 9B and 27B, as MaxText 0.2.5 holds them: one of its layers is a local and a global one of the hub.

    MaxText's norm weights are the hub's plus one, its embedding is the hub's times sqrt(emb_dim), and its queries are
    the hub's divided by sqrt(head_dim).
    """

    decoder_blocks = ("gemma2",)
    hub_types = ("gemma2",)
    architecture = "Gemma2ForCausalLM"
    starts_with_bos = True

    @property
    def embedding_scale_shift(self) -> ScaleShift | None:
        """The divisor is in float32."""
        return ScaleShift(over=math.sqrt(self.config.emb_dim))

    @property
    def norm_scale_shift(self) -> ScaleShift | None:
        """MaxText keeps what a norm multiplies with, the hub what it adds to one."""
        return ScaleShift(minus=1.0)

    @property
    def query_scale_shift(self) -> ScaleShift:
        """MaxText folds the scale of the scores into its queries."""
        return ScaleShift(times=math.sqrt(self.config.head_dim))

    def global_weights(self, model: LayerParams) -> Blocks:
        """The embedding and the final norm: vLLM's class has no output projection."""
        return super().global_weights(model)[:2]

    def check_config(self) -> None:
        """Refuses biases, and an output projection of its own."""
        if self.config.attention_bias or not self.config.logits_via_embedding:
            raise ConfigError("attention_bias=True or logits_via_embedding=False: no Gemma2 is like that")

    def attention(self, layer: LayerParams) -> Blocks:
        """Grouped-query attention of both kinds."""
        return tuple(
            block
            for part, kind in enumerate(_KINDS)
            for block in self.attention_blocks(
                self.read_attention(layer, f"self_attention_{kind}"), part_name(part, 2, "self_attn")
            )
        )

    def norms(self, layer: LayerParams) -> Blocks:
        """Norms before and after attention and MLP of both kinds."""
        return tuple(
            self.norm(layer, f"{path}_{kind}", part_name(part, 2, name))
            for part, kind in enumerate(_KINDS)
            for path, name in _NORMS.items()
        )

    def mlp(self, layer: LayerParams) -> Blocks:
        """The gated MLP of both kinds."""
        return tuple(
            block
            for part, kind in enumerate(_KINDS)
            for block in self.gated_mlp(layer, f"mlp_{kind}", part_name(part, 2, "mlp"), width="mlp_dim")
        )

    @classmethod
    def from_hub(cls, hub: HubConfig) -> dict[str, Any]:
        """Returns a dense model's fields; MaxText counts pairs of layers, and scales queries by the width of a head."""
        found = super().from_hub(hub)
        if (depth := found.get("num_decoder_layers", 0)) % 2 or hub.attention_cycle() not in (None, 2):
            hub.problems.append(f"num_hidden_layers: {depth}, layer_types: MaxText has pairs, local and global")
        if (scalar := hub.get("query_pre_attn_scalar")) not in (None, found.get("head_dim")):
            hub.problems.append(f"query_pre_attn_scalar: {scalar}: MaxText scales by head_dim: {found.get('head_dim')}")
        tied = hub.get("tie_word_embeddings", True)
        return {**found, "num_decoder_layers": depth // 2, "logits_via_embedding": tied}

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Returns the hub `config.json`."""
        trainer.same(**WHOLE_ROPE, mlp_activations=[GELU], use_post_attn_norm=(True,), use_post_ffw_norm=(True,))
        trainer.same(local_rope_max_timescale=(-1,))
        depth = 2 * trainer.config.num_decoder_layers
        found = trainer.decoder("gemma2", cls.architecture)
        del found["hidden_act"]  # here it has another name
        return found | {
            "num_hidden_layers": depth,
            "layer_types": ["sliding_attention", "full_attention"] * trainer.config.num_decoder_layers,
            "sliding_window": trainer.need("sliding_window_size"),
            "attn_logit_softcapping": trainer.need("attn_logits_soft_cap") or None,
            "final_logit_softcapping": trainer.need("final_logits_soft_cap") or None,
            "query_pre_attn_scalar": trainer.config.head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
        }
