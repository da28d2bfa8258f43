"""Qwen2.5."""

from portax.converters.base import BaseConverter


class Qwen2Converter(BaseConverter):
    """Qwen2.5 1.5B to 72B, as MaxText 0.2.5 holds them: a plain decoder with biases on queries, keys and values."""

    decoder_blocks = ("qwen2",)

    @property
    def architecture(self) -> str | None:
        """As the hub's `config.json` says."""
        return "Qwen2ForCausalLM"
