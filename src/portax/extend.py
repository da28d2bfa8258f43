"""Names for authors of model families and of layouts: `from portax.extend import PlainDecoder, blocks`.

A family is one class in one file, a subclass of `PlainDecoder` or of `BaseConverter`; see docs/add-a-model.md. A layout
is a subclass of `Layout`; see docs/add-an-engine.md.
"""

from portax.config.hub import DENSE, EXPERTS, HubConfig
from portax.config.model_config import ModelConfig
from portax.config.to_hub import GELU, SILU, UNSCALED_ROPE, WHOLE_ROPE, TrainerConfig
from portax.converters.base import BaseConverter, Blocks
from portax.converters.decoder import Attention, AttentionAxes, PlainDecoder
from portax.errors import ConfigError, LayoutError
from portax.layouts import Layout, NativeModel, Tensor
from portax.trainer.layer_params import LayerParams
from portax.trainer.scan import LayerSlice, LayerTypes, ScanPattern
from portax.weights import blocks, kernels
from portax.weights.parts import part_name
from portax.weights.scale_shift import ScaleShift

__all__ = [
    "DENSE",
    "EXPERTS",
    "GELU",
    "SILU",
    "UNSCALED_ROPE",
    "WHOLE_ROPE",
    "Attention",
    "AttentionAxes",
    "BaseConverter",
    "Blocks",
    "ConfigError",
    "HubConfig",
    "LayerParams",
    "LayerSlice",
    "LayerTypes",
    "Layout",
    "LayoutError",
    "ModelConfig",
    "NativeModel",
    "PlainDecoder",
    "ScaleShift",
    "ScanPattern",
    "Tensor",
    "TrainerConfig",
    "blocks",
    "kernels",
    "part_name",
]
