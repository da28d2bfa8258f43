"""Qwen3-Next: Qwen3.5's predecessor."""

from jaxtyping import Array, Shaped

from portax.converters.decoder import Blocks
from portax.converters.qwen3_5 import Qwen3_5Converter
from portax.trainer.scan import ScanPattern
from portax.weights import blocks


class Qwen3NextConverter(Qwen3_5Converter):
    """Qwen3-Next 80B-A3B, as MaxText 0.2.5 holds it, and as earlier versions did."""

    decoder_blocks = ("qwen3_next",)
    default_module_prefix = ""
    scan_pattern = ScanPattern("decoder/layers", "nested")
    experts_on_hub = "each"

    @property
    def architecture(self) -> str | None:
        """As the hub's `config.json` says."""
        return "Qwen3NextForCausalLM"

    def delta_net_inputs(self, qkvz: Shaped[Array, "in _"], ba: Shaped[Array, "in _"]) -> Blocks:
        """Held as the trainer has them, grouped by key head (which no tensor parallelism changes)."""
        return (
            blocks.Linear("linear_attn.in_proj_qkvz", qkvz, "column"),
            blocks.Linear("linear_attn.in_proj_ba", ba, "column"),
        )
