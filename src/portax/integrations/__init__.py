"""Where portax meets other programs: one module each, imported when it is first named, for each needs its packages."""

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
