"""Repairs of a reload on a CPU, where vLLM packs weights into copies that a reload does not make anew.

On GPUs a tied head reads the shared parameter, and experts are arranged in every update.
"""

from typing import Any

import torch

from portax.integrations.vllm.reload_state import is_waiting


class CpuRepairs:
    """The repairs of one update of a model: experts are packed again, and so is the head of tied embeddings."""

    def __init__(self, model: torch.nn.Module):
        """Takes the experts' kernels away, before the reload starts: vLLM packs experts only when it makes these."""
        self._model = model
        self._kernels: list[tuple[torch.nn.Module, Any]] = []
        for module in model.modules():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                self._kernels.append((module, method.moe_kernel))
                method.moe_kernel = None

    def finish(self) -> None:
        """Packs the heads again, after the reload: one that is tied got no tensor of its own."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self._model.modules():
            if isinstance(module, ParallelLMHead) and module.weight.numel():
                module.quant_method.process_weights_after_loading(module)

    def abort(self) -> None:
        """Gives kernels back to experts that were not loaded; call it before `reload_state.abort`."""
        for module, kernel in self._kernels:
            if is_waiting(module) or module.quant_method.moe_kernel is None:
                module.quant_method.moe_kernel = kernel


class NoRepairs:
    """Nothing to repair."""

    def __init__(self, model: torch.nn.Module):
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""

    def abort(self) -> None:
        """Does nothing."""


def repairs_for(device: torch.device) -> type[CpuRepairs] | type[NoRepairs]:
    """Returns the repairs that a device needs."""
    return CpuRepairs if device.type == "cpu" else NoRepairs
