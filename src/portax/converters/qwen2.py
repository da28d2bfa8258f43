"""Qwen2.5."""

from typing import Any

from portax.config.hub import HubConfig
from portax.config.to_hub import WHOLE_ROPE, TrainerConfig
from portax.converters.decoder import PlainDecoder
from portax.layouts import NativeModel


class Qwen2Converter(PlainDecoder):
    """Qwen2.5 1.5B to 72B, as MaxText 0.2.5 holds them: a plain decoder with biases on queries, keys and values."""

    decoder_blocks = ("qwen2",)
    hub_types = ("qwen2",)
    architecture = "Qwen2ForCausalLM"
    native_model = NativeModel("Qwen2ForCausalLM", head=None)

    @classmethod
    def from_hub(cls, hub: HubConfig) -> dict[str, Any]:
        """Returns a dense model's fields; the hub's class always has the biases."""
        return {**super().from_hub(hub), "attention_bias": True}

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Returns the hub `config.json`."""
        trainer.same(**WHOLE_ROPE, attention_bias=(True,))
        return {**trainer.plain("qwen2", "Qwen2ForCausalLM"), "use_sliding_window": False}
