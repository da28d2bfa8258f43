"""Mistral."""

import math
from typing import Any

from portax.config.hub import HubConfig
from portax.config.to_hub import WHOLE_ROPE, TrainerConfig
from portax.converters.decoder import PlainDecoder
from portax.errors import ConfigError
from portax.weights.scale_shift import ScaleShift


class MistralConverter(PlainDecoder):
    """Mistral 7B, as MaxText 0.2.5 holds it: a plain decoder whose queries are the hub's divided by sqrt(head_dim)."""

    decoder_blocks = ("mistral",)
    hub_types = ("mistral",)
    architecture = "MistralForCausalLM"

    @property
    def query_scale_shift(self) -> ScaleShift:
        """MaxText folds the scale of the scores into its queries."""
        return ScaleShift(times=math.sqrt(self.config.head_dim))

    def check_config(self) -> None:
        """Refuses biases, and frequencies with which MaxText keeps rotary pairs in another order than the hub."""
        block = self.config.decoder_block
        if self.config.attention_bias:
            raise ConfigError(f"attention_bias=True: no {block} has biases on queries, keys and values")
        if self.config.rope_type not in ("", "default"):
            raise ConfigError(
                f"rope_type={self.config.rope_type!r}: the hub's {block} has unscaled rotary frequencies and a head's "
                "rotary pairs in halves; set rope_type: default, with which MaxText's own model is trained"
            )

    @classmethod
    def from_hub(cls, hub: HubConfig) -> dict[str, Any]:
        """Returns a dense model's fields; MaxText's model attends to everything."""
        if (window := hub.get("sliding_window")) is not None:
            hub.problems.append(f"sliding_window: {window}: MaxText's {cls.decoder_blocks[0]} has none")
        if (kind := hub.rope.get("rope_type", "default")) != "default":
            hub.problems.append(f"rope_type: {kind!r}: MaxText's {cls.decoder_blocks[0]} has unscaled frequencies")
        return super().from_hub(hub)

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Returns the hub `config.json`; what says nothing of a window would have one."""
        trainer.same(**WHOLE_ROPE, attention_bias=(False,))
        return {**trainer.plain("mistral", "MistralForCausalLM"), "sliding_window": None}
