"""Converters, one file per model family, and the choice between them."""

from portax.models.gemma3 import Gemma3Converter
from portax.models.gemma4 import Gemma4Converter
from portax.models.gemma4_small import Gemma4SmallConverter
from portax.models.llama import LlamaConverter
from portax.models.qwen2 import Qwen2Converter
from portax.models.qwen3 import Qwen3Converter
from portax.models.qwen3_5 import Qwen3_5Converter
from portax.models.qwen3_next import Qwen3NextConverter
from portax.models.registry import converter_for, families

__all__ = [
    "Gemma3Converter",
    "Gemma4Converter",
    "Gemma4SmallConverter",
    "LlamaConverter",
    "Qwen2Converter",
    "Qwen3Converter",
    "Qwen3NextConverter",
    "Qwen3_5Converter",
    "converter_for",
    "families",
]
