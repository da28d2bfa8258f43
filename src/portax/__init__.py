"""Moves weights from a JAX trainer into a rollout engine, bit for bit.

`converter_for` finds the converter of a model, `WeightSync` writes into a live engine, and `open_checkpoint`, `export`
and `import_checkpoint` work on disk. `portax.extend` has what authors of model families and of layouts import.
"""

import importlib
from typing import Any

from portax import layouts
from portax.analysis.diff import diff
from portax.analysis.diff_report import Diff
from portax.checkpoints.hf_export import export
from portax.checkpoints.maxtext_import import import_checkpoint
from portax.checkpoints.reading import Checkpoint, open_checkpoint
from portax.config.model_config import ModelConfig
from portax.converters import (  # noqa: F401 - a family is found by its name: portax.Qwen3Converter
    DeepSeekConverter,
    Gemma2Converter,
    Gemma3Converter,
    Gemma4Converter,
    Gemma4SmallConverter,
    GptOssConverter,
    LlamaConverter,
    MaxTextConverter,
    MistralConverter,
    MixtralConverter,
    Olmo3Converter,
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
    LayoutError,
    MissingPackageError,
    PlanError,
    PortaxError,
    Problem,
    SyncError,
)
from portax.planning.plan import Plan
from portax.sync.report import SyncReport
from portax.sync.staging import Staging
from portax.sync.weight_sync import WeightSync

__version__ = "0.1.0"

__all__ = [
    "BaseConverter",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "Diff",
    "LayoutError",
    "MissingPackageError",
    "ModelConfig",
    "Plan",
    "PlanError",
    "PortaxError",
    "Problem",
    "Staging",
    "SyncError",
    "SyncReport",
    "WeightSync",
    "converter_for",
    "derive_hub_config",
    "diff",
    "export",
    "import_checkpoint",
    "layouts",
    "open_checkpoint",
    "read_config",
]

_WINGS = ("cli", "extend", "integrations", "testing", "validation")  # what `import portax` does not need


def __getattr__(name: str) -> Any:
    """Imports a wing when it is first named: `portax.integrations`, `portax.validation`."""
    if name in _WINGS:
        return importlib.import_module(f"portax.{name}")
    raise AttributeError(f"module 'portax' has no attribute {name!r}")
