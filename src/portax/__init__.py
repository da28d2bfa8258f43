"""portax: moves weights from a JAX trainer into a rollout engine, bit for bit."""

from portax import blocks, kernels, layouts
from portax.arithmetic import Affine
from portax.base import BaseConverter
from portax.checkpoint import Checkpoint, open_checkpoint
from portax.config import ModelConfig
from portax.derived_config import derive_hub_config
from portax.diff_report import Diff
from portax.diffing import diff
from portax.errors import (
    CheckpointError,
    ConfigError,
    GoldenError,
    LayoutError,
    MissingPackageError,
    PlanError,
    PortaxError,
    Problem,
    ReportError,
    SyncError,
    ValidationError,
)
from portax.exporting import Export, export
from portax.importing import Import, import_checkpoint
from portax.layers import Layer, ScanForm
from portax.leaves import Leaves
from portax.models import (
    Gemma3Converter,
    Gemma4Converter,
    Gemma4SmallConverter,
    LlamaConverter,
    Qwen2Converter,
    Qwen3_5Converter,
    Qwen3Converter,
    Qwen3NextConverter,
    converter_for,
)
from portax.plan import Plan
from portax.staging import Staging
from portax.sync import WeightSync
from portax.sync_report import SyncReport

__version__ = "0.1.0"

__all__ = [
    "Affine",
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
    "Layer",
    "LayoutError",
    "Leaves",
    "LlamaConverter",
    "MissingPackageError",
    "ModelConfig",
    "Plan",
    "PlanError",
    "PortaxError",
    "Problem",
    "Qwen2Converter",
    "Qwen3Converter",
    "Qwen3NextConverter",
    "Qwen3_5Converter",
    "ReportError",
    "ScanForm",
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
]
