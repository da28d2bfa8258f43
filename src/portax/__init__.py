"""portax: moves weights from a JAX trainer into a rollout engine, bit for bit."""

from portax import blocks, kernels, layouts
from portax.base import BaseConverter
from portax.config import ModelConfig
from portax.errors import ConfigError, GoldenError, LayoutError, PlanError, PortaxError, Problem
from portax.leaves import Leaves
from portax.models import Qwen3Converter, converter_for
from portax.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "BaseConverter",
    "ConfigError",
    "GoldenError",
    "LayoutError",
    "Leaves",
    "ModelConfig",
    "Plan",
    "PlanError",
    "PortaxError",
    "Problem",
    "Qwen3Converter",
    "blocks",
    "converter_for",
    "kernels",
    "layouts",
]
