"""The shipped proof of portax: goldens, known values, the doctor and the demo."""

import importlib
from typing import Any

_MODULES = ("comparison", "demo", "doctor", "golden", "golden_folder", "probe", "spread")


def __getattr__(name: str) -> Any:
    """Imports a module of this folder when it is first named."""
    if name in _MODULES:
        return importlib.import_module(f"portax.testing.{name}")
    raise AttributeError(f"module 'portax.testing' has no attribute {name!r}")
