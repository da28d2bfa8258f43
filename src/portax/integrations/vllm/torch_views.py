"""JAX arrays as torch tensors, without a copy."""

from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import Array, Shaped

from portax.execution.sharding import replicated

if TYPE_CHECKING:
    import torch


def torch_view(array: Shaped[Array, "..."]) -> "torch.Tensor":
    """Returns a torch tensor over the memory of an array, gathered first if it is cut.

    The tensor keeps the memory alive. It is writable, as dlpack knows no other kind: whoever gets it must only read.

    Args:
        array: A finished array; one that is cut over processes is gathered by all of them, in step.
    """
    import torch

    if array.is_fully_replicated:
        whole = array
    elif array.is_fully_addressable:
        whole = jax.device_put(array, replicated(array.sharding))
    else:
        whole = jax.jit(lambda value: value, out_shardings=replicated(array.sharding))(array)
    return torch.from_dlpack(jax.block_until_ready(whole.addressable_shards[0].data))


def torch_dtype(dtype: Any) -> "torch.dtype":
    """Returns torch's dtype of the same name."""
    import torch

    return getattr(torch, jax.numpy.dtype(dtype).name)
