"""Llama 3.1."""

import dataclasses
import math
from typing import Any

from portax.config.hub import DENSE, HubConfig
from portax.config.to_hub import TrainerConfig
from portax.converters.decoder import PlainDecoder
from portax.errors import ConfigError
from portax.layouts import NativeModel
from portax.trainer.layer_params import LayerParams
from portax.weights import kernels
from portax.weights.blocks import Blocks
from portax.weights.scale_shift import ScaleShift

_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Llama 3.1's scaled frequencies: constants of MaxText 0.2.5 (layers/embeddings.py), fields on the hub."""


class LlamaConverter(PlainDecoder):
    """Llama 3.1 8B, 70B and 405B, as MaxText 0.2.5 holds them.

    MaxText's queries are the hub's divided by sqrt(head_dim), and the rotary pairs of a query or key head are
    interleaved, where the hub has them in halves.
    """

    decoder_blocks = ("llama2",)
    hub_types = ("llama",)
    architecture = "LlamaForCausalLM"
    native_model = NativeModel(
        "LlamaForCausalLM",
        kernel="kernel",
        norm="scale",
        embedding="embed.embedding",
        head="model.lm_head",
        tied=False,
        pads_heads=True,
    )

    @property
    def query_scale_shift(self) -> ScaleShift:
        """MaxText folds the scale of the scores into its queries."""
        return ScaleShift(times=math.sqrt(self.config.head_dim))

    def attention(self, layer: LayerParams) -> Blocks:
        """Grouped-query attention, with the hub's order of rotary pairs."""
        read = self.read_attention(layer, "self_attention")
        query, key = kernels.deinterleave(read.query), kernels.deinterleave(read.key)
        return self.attention_blocks(dataclasses.replace(read, query=query, key=key))

    def check_config(self) -> None:
        """Refuses a config that leaves the order of rotary pairs open, and biases."""
        if self.config.rope_type == "llama3":
            raise ConfigError(
                "rope_type='llama3': rotary frequencies that are not scaled as Llama 3.1's, the only Llama that has a "
                f"converter: the hub's have {_SCALING}, and MaxText's config says rope_type: llama3.1"
            )
        if self.config.rope_type != "llama3.1":
            raise ConfigError(
                f"rope_type={self.config.rope_type!r} leaves open in which order decoder_block='llama2' keeps a head's "
                "rotary pairs: Llama 2 and 3.0 in halves, Llama 3.1 interleaved; MaxText tells them apart by the "
                "model's name, which portax never reads. If it is Llama 3.1, set rope_type: llama3.1 in the trainer's "
                "config, which changes nothing for MaxText's llama3.1-* models; the others have no converter"
            )
        if self.config.attention_bias:
            raise ConfigError("attention_bias=True: no Llama 3.1 has biases on queries, keys and values")

    @classmethod
    def from_hub(cls, hub: HubConfig) -> dict[str, Any]:
        """Returns a dense model's fields; only Llama 3.1's scaled frequencies say that it is Llama 3.1."""
        scaling = {name: hub.rope.get(name) for name in _SCALING}
        rope_type = "llama3.1" if scaling == _SCALING else scaling["rope_type"] or "default"
        return super().from_hub(hub) | {"rope_type": rope_type, "attention_bias": hub.get("attention_bias", False)}

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Returns the hub `config.json`."""
        trainer.same(attention_bias=(False,), rope_use_scale=(True,), partial_rotary_factor=(1,))
        trainer.same(rope_type=("llama3.1",))
        found = trainer.plain("llama", "LlamaForCausalLM", DENSE, **_SCALING)
        return found | {"rope_scaling": _SCALING, "max_position_embeddings": 131072, "attention_bias": False}
