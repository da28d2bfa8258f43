"""Llama 2, 3.0 and 3.1."""

import dataclasses
import math
from typing import Any

from portax.config.hub import DENSE, HubConfig
from portax.config.to_hub import UNSCALED_ROPE, TrainerConfig
from portax.converters.decoder import Attention, PlainDecoder
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
    """Llama 2, 3.0 and 3.1, and 3.3 where the config says that it is as 3.1, as MaxText 0.2.5 holds them.

    MaxText's queries are the hub's divided by sqrt(head_dim). The rotary pairs of a query or key head are in halves, as
    on the hub, or interleaved (Llama 3.1): `rope_type` says which.
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
        return self.attention_blocks(_in_halves(read) if self.config.rope_type == "llama3.1" else read)

    def check_config(self) -> None:
        """Refuses a config that leaves the order of rotary pairs open, and biases."""
        if self.config.rope_type == "llama3":
            raise ConfigError(
                "rope_type='llama3': rotary frequencies that are not scaled as Llama 3.1's, the only scaled ones of a "
                f"Llama in MaxText: the hub's have {_SCALING}, and MaxText's config says rope_type: llama3.1"
            )
        if self.config.rope_type not in ("default", "llama3.1"):
            raise ConfigError(
                f"rope_type={self.config.rope_type or 'default'!r} leaves open in which order decoder_block='llama2' "
                "keeps a head's rotary pairs: Llama 2 and 3.0 in halves, Llama 3.1 interleaved. Where the config does "
                "not say it, or is of a llama3.1-* or llama3.3-* that has no more than the default, MaxText tells them "
                "apart by the model's name, which portax never goes by. If it is Llama 3.1, or 3.3 trained as that, "
                "set rope_type: llama3.1 in the trainer's config, which changes nothing for MaxText's llama3.1-* "
                "models; if it is Llama 2 or 3.0, say rope_type: default"
            )
        if self.config.attention_bias:
            raise ConfigError("attention_bias=True: no Llama has biases on queries, keys and values")

    @classmethod
    def from_hub(cls, hub: HubConfig) -> dict[str, Any]:
        """Returns a dense model's fields; how frequencies are scaled tells the kind of Llama."""
        scaling = {name: hub.rope.get(name) for name in _SCALING}
        rope_type = "llama3.1" if scaling == _SCALING else scaling["rope_type"] or "default"
        return super().from_hub(hub) | {"rope_type": rope_type, "attention_bias": hub.get("attention_bias", False)}

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Returns the hub `config.json`."""
        trainer.same(attention_bias=(False,), partial_rotary_factor=(1,))
        if trainer.config.rope_type != "llama3.1":
            trainer.same(**UNSCALED_ROPE)
            return trainer.plain("llama", "LlamaForCausalLM") | {"attention_bias": False}
        trainer.same(rope_type=("llama3.1",), rope_use_scale=(True,))
        found = trainer.plain("llama", "LlamaForCausalLM", DENSE, **_SCALING)
        return found | {"rope_scaling": _SCALING, "max_position_embeddings": 131072, "attention_bias": False}


def _in_halves(read: Attention) -> Attention:
    query, key = kernels.deinterleave(read.query), kernels.deinterleave(read.key)
    return dataclasses.replace(read, query=query, key=key)
