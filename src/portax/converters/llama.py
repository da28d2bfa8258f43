"""Llama 3.1."""

import math

from portax.converters.base import BaseConverter
from portax.converters.decoder import Blocks
from portax.errors import ConfigError
from portax.trainer.layer_params import LayerParams
from portax.weights import blocks, kernels
from portax.weights.scale_shift import ScaleShift


class LlamaConverter(BaseConverter):
    """Llama 3.1 8B, 70B and 405B, as MaxText 0.2.5 holds them.

    MaxText's queries are the hub's divided by sqrt(head_dim), and the rotary pairs of a query or key head are
    interleaved, where the hub has them in halves.
    """

    decoder_blocks = ("llama2",)

    @property
    def architecture(self) -> str | None:
        """As the hub's `config.json` says."""
        return "LlamaForCausalLM"

    def attention(self, layer: LayerParams) -> Blocks:
        """Grouped-query attention, with the hub's scale of queries and its order of rotary pairs."""
        at, kv_axes = "self_attention", "emb_dim num_kv_heads head_dim"
        scale = ScaleShift(times=math.sqrt(self.config.head_dim))
        query = layer.read(f"{at}/query/kernel", "emb_dim num_query_heads head_dim", scale)
        key = layer.read(f"{at}/key/kernel", kv_axes)
        value = layer.read(f"{at}/value/kernel", kv_axes)
        output = layer.read(f"{at}/out/kernel", "num_query_heads head_dim emb_dim")
        return (
            blocks.QKV("self_attn", kernels.deinterleave(query), kernels.deinterleave(key), value),
            blocks.Linear("self_attn.o_proj", output, "row"),
        )

    def check_config(self) -> None:
        """Refuses a config that leaves the order of rotary pairs open."""
        if self.config.rope_type != "llama3.1":
            raise ConfigError(
                f"rope_type={self.config.rope_type!r} leaves open in which order decoder_block='llama2' keeps a head's "
                "rotary pairs: Llama 2 and 3.0 in halves, Llama 3.1 interleaved; MaxText tells them apart by the "
                "model's name, which portax never reads. If it is Llama 3.1, set rope_type: llama3.1 in the trainer's "
                "config, which changes nothing for MaxText's llama3.1-* models; the others have no converter"
            )
