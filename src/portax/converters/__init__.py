"""Converters, one file for each model family, and the functions that choose among them."""

from portax.converters.deepseek import DeepSeekConverter
from portax.converters.gemma2 import Gemma2Converter
from portax.converters.gemma3 import Gemma3Converter
from portax.converters.gemma4 import Gemma4Converter
from portax.converters.gemma4_small import Gemma4SmallConverter
from portax.converters.gpt_oss import GptOssConverter
from portax.converters.llama import LlamaConverter
from portax.converters.maxtext import MaxTextConverter
from portax.converters.mistral import MistralConverter
from portax.converters.mixtral import MixtralConverter
from portax.converters.olmo3 import Olmo3Converter
from portax.converters.qwen2 import Qwen2Converter
from portax.converters.qwen3 import Qwen3Converter
from portax.converters.qwen3_5 import Qwen3_5Converter
from portax.converters.qwen3_next import Qwen3NextConverter
from portax.converters.registry import converter_for, derive_hub_config, families, read_config

__all__ = [
    "DeepSeekConverter",
    "Gemma2Converter",
    "Gemma3Converter",
    "Gemma4Converter",
    "Gemma4SmallConverter",
    "GptOssConverter",
    "LlamaConverter",
    "MaxTextConverter",
    "MistralConverter",
    "MixtralConverter",
    "Olmo3Converter",
    "Qwen2Converter",
    "Qwen3Converter",
    "Qwen3NextConverter",
    "Qwen3_5Converter",
    "converter_for",
    "derive_hub_config",
    "families",
    "read_config",
]
