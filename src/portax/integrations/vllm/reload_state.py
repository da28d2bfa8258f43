"""The state of vLLM's layerwise reload, module by module, and the way back from a half-finished one."""

from typing import TypeAlias

import torch
from vllm.model_executor.model_loader.reload import layerwise, meta

EarlyTensors: TypeAlias = list[tuple[torch.nn.Module, torch.nn.Parameter, torch.Tensor]]
"""A module, its live parameter, and a copy of that one."""


def is_waiting(module: torch.nn.Module) -> bool:
    """Tells whether a module still waits for tensors, with its parameters taken away."""
    return layerwise.get_layerwise_info(module).can_load()


def place_back(module: torch.nn.Module) -> None:
    """Gives a module the parameters that it had before a reload, and forgets what came for it."""
    info = layerwise.get_layerwise_info(module)
    if info.kernel_tensors is not None:
        layerwise._place_kernel_tensors(module, info)
    info.reset()


def written_early(model: torch.nn.Module) -> EarlyTensors:
    """Copies what vLLM writes before its module is complete, such as biases; call it before a reload."""
    return [
        (module, leaf, leaf.detach().clone())
        for module in model.modules()
        for name, leaf in module._parameters.items()
        if leaf is not None and name in meta.SKIP_TENSORS
    ]


@torch.no_grad()
def abort(model: torch.nn.Module, early: EarlyTensors) -> None:
    """Ends a reload: what is complete has the new values, all else its old ones.

    Args:
        model: The model that is reloaded.
        early: The copies that `written_early` made.
    """
    for module, leaf, old in early:
        if is_waiting(module):
            leaf.copy_(old)
    for module in model.modules():
        if is_waiting(module):
            place_back(module)
    layerwise.LOADING_LAYERS.clear()
