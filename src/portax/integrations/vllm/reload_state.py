"""The state of vLLM's layerwise reload, module by module, and the way back from a half-finished one."""

import torch

from portax.integrations.vllm.api import api


def is_waiting(module: torch.nn.Module) -> bool:
    """Tells whether a module still waits for tensors, with its parameters taken away."""
    return api().layerwise.get_layerwise_info(module).can_load()


def place_back(module: torch.nn.Module) -> None:
    """Gives a module the parameters that it had before a reload, and forgets what came for it."""
    layerwise = api().layerwise
    info = layerwise.get_layerwise_info(module)
    if info.kernel_tensors is not None:
        layerwise._place_kernel_tensors(module, info)
    info.reset()


def abort(model: torch.nn.Module) -> None:
    """Ends a reload: what is complete has the new values, all else its old ones."""
    for module in model.modules():
        if is_waiting(module):
            place_back(module)
    api().layerwise.LOADING_LAYERS.clear()
