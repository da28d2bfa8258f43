"""portax: moves weights from a JAX trainer into a rollout engine, bit for bit."""

import importlib
from typing import Any

from portax import layouts
from portax.analysis.diff import diff
from portax.analysis.diff_report import Diff
from portax.checkpoints.hf_export import Export, export
from portax.checkpoints.maxtext_import import Import, import_checkpoint
from portax.checkpoints.reading import Checkpoint, open_checkpoint
from portax.config.model_config import ModelConfig
from portax.converters import (
    Gemma3Converter,
    Gemma4Converter,
    Gemma4SmallConverter,
    LlamaConverter,
    MaxTextConverter,
    Qwen2Converter,
    Qwen3_5Converter,
    Qwen3Converter,
    Qwen3NextConverter,
    converter_for,
    derive_hub_config,
    read_config,
)
from portax.converters.base import BaseConverter
from portax.errors import (
    CheckpointError,
    ConfigError,
    GoldenError,
    LayoutError,
    MissingPackageError,
    PlanError,
    PortaxError,
    Problem,
    QuantizationError,
    ReportError,
    SyncError,
    ValidationError,
)
from portax.planning.plan import Plan
from portax.sync.report import SyncReport
from portax.sync.staging import Staging
from portax.sync.weight_sync import WeightSync
from portax.trainer.layer_params import LayerParams
from portax.trainer.scan import LayerSlice, ScanPattern
from portax.weights import blocks, kernels
from portax.weights.scale_shift import ScaleShift

__version__ = "0.1.0"

__all__ = [
    "BaseConverter",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "Diff",
    "Export",
    "Gemma3Converter",
    "Gemma4Converter",
    "Gemma4SmallConverter",
    "GoldenError",
    "Import",
    "LayerParams",
    "LayerSlice",
    "LayoutError",
    "LlamaConverter",
    "MaxTextConverter",
    "MissingPackageError",
    "ModelConfig",
    "Plan",
    "PlanError",
    "PortaxError",
    "Problem",
    "QuantizationError",
    "Qwen2Converter",
    "Qwen3Converter",
    "Qwen3NextConverter",
    "Qwen3_5Converter",
    "ReportError",
    "ScaleShift",
    "ScanPattern",
    "Staging",
    "SyncError",
    "SyncReport",
    "ValidationError",
    "WeightSync",
    "blocks",
    "converter_for",
    "derive_hub_config",
    "diff",
    "export",
    "import_checkpoint",
    "kernels",
    "layouts",
    "open_checkpoint",
    "read_config",
]

_WINGS = ("cli", "integrations", "testing", "validation")  # what `import portax` does not need


def __getattr__(name: str) -> Any:
    """Imports a wing that few need when it is first named: `portax.validation`, `portax.integrations`."""
    if name in _WINGS:
        return importlib.import_module(f"portax.{name}")
    raise AttributeError(f"module 'portax' has no attribute {name!r}")
