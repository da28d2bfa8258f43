"""Qwen3-Next: Qwen3.5's predecessor."""

from typing import Any

from jaxtyping import Array, Shaped

from portax.config.to_hub import TrainerConfig
from portax.converters.qwen3 import experts_everywhere
from portax.converters.qwen3_5 import Qwen3_5Converter, delta_net_config
from portax.trainer.scan import ScanPattern
from portax.weights import blocks
from portax.weights.blocks import Blocks


class Qwen3NextConverter(Qwen3_5Converter):
    """Qwen3-Next 80B-A3B, as MaxText 0.2.5 holds it, and as earlier versions did."""

    decoder_blocks = ("qwen3_next",)
    hub_types = ("qwen3_next",)
    architecture = "Qwen3NextForCausalLM"
    default_module_prefix = ""
    scan_pattern = ScanPattern("decoder/layers", "nested")
    experts_on_hub = "each"

    def delta_net_inputs(self, qkvz: Shaped[Array, "in _"], ba: Shaped[Array, "in _"]) -> Blocks:
        """Held as the trainer has them, grouped by key head (which no tensor parallelism changes)."""
        return (
            blocks.Linear("linear_attn.in_proj_qkvz", qkvz, "column"),
            blocks.Linear("linear_attn.in_proj_ba", ba, "column"),
        )

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Returns the hub `config.json`."""
        return delta_net_config(trainer, "qwen3_next", "Qwen3NextForCausalLM") | experts_everywhere(trainer)
