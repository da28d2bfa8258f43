"""Integrations with other programs, one module each; each needs its packages, so it is imported when first named."""

import importlib
from typing import Any

_MODULES = ("maxtext", "tpu_inference", "transformers", "tunix", "vllm")


def __getattr__(name: str) -> Any:
    """Imports an integration.

    Raises:
        MissingPackageError: The packages that it needs are not installed.
    """
    if name in _MODULES:
        return importlib.import_module(f"portax.integrations.{name}")
    raise AttributeError(f"module 'portax.integrations' has no attribute {name!r}")
