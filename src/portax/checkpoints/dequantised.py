"""`dequantised`: a quantised checkpoint of the hub as the bfloat16 tensors that an engine would read off it."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from portax.errors import CheckpointError
from portax.trainer.lazy_array import Index, LazyArray
from portax.weights.recipes import TILE

_TILED, _CHANNEL = "_scale_inv", "_scale"
_ONE_BYTE = ("float8_e4m3fn", "float8_e5m2", "int8")


def dequantised(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces every quantised weight and its scales by their product, rounded to bfloat16; computed when it is read.

    Args:
        weights: Tensors by the hub's names: a dict, or a `Checkpoint`.

    Raises:
        CheckpointError: No weight is quantised, or one has no scales, or scales of another form than tiles of 128 x 128
            (`weight_scale_inv`) or one for each output (`weight_scale`).

    Example:
        >>> quantised = {"w": jnp.ones((4, 8), jnp.float8_e4m3fn), "w_scale": jnp.full((4, 1), 0.5)}
        >>> dequantised(quantised)["w"][0, :2].tolist()
        [0.5, 0.5]
    """
    found = {name: _companion(name, weights) for name, leaf in weights.items() if _is_quantised(leaf)}
    if not found:
        raise CheckpointError("dequantize: no tensor of this checkpoint is quantised; leave it out")
    scales = {*found.values()}
    return {
        name: _Product(name, leaf, found[name], weights[found[name]]) if name in found else leaf
        for name, leaf in weights.items()
        if name not in scales
    }


def is_quantised(weights: Mapping[str, Any]) -> bool:
    """Tells whether a checkpoint holds weights of eight bits."""
    return any(map(_is_quantised, weights.values()))


def _is_quantised(leaf: Any) -> bool:
    return np.dtype(leaf.dtype).name in _ONE_BYTE


def _companion(name: str, weights: Mapping[str, Any]) -> str:
    for end in (_TILED, _CHANNEL):
        if name + end in weights:
            return name + end
    raise CheckpointError(
        f"{name}: is {np.dtype(weights[name].dtype)} and has no {name}{_TILED} or {name}{_CHANNEL} beside it, so that "
        "its values are not known"
    )


class _Product(LazyArray):
    """A quantised weight times its scales."""

    def __init__(self, name: str, weight: Any, scale_name: str, scale: Any):
        self.shape, self.dtype = tuple(weight.shape), np.dtype(ml_dtypes.bfloat16)
        self._weight, self._scale, self._tiled = weight, scale, scale_name.endswith(_TILED)
        expected = self._expected()
        if tuple(scale.shape) not in expected:
            shapes = " or ".join(str(list(shape)) for shape in expected)
            raise CheckpointError(
                f"{scale_name}: has the shape {list(scale.shape)}, and {name} {list(self.shape)}: expected {shapes}, "
                f"{f'tiles of {TILE} x {TILE}' if self._tiled else 'a scale for each output'}"
            )

    def _expected(self) -> tuple[tuple[int, ...], ...]:
        rows, columns = self.shape if len(self.shape) == 2 else (0, 0)
        if self._tiled:
            return ((-(-rows // TILE), -(-columns // TILE)),)
        return (rows, 1), (rows,)

    def _scales(self) -> Shaped[np.ndarray, "rows columns"]:
        rows, columns = self.shape
        scales = np.asarray(self._scale[...]).astype(np.float32)
        if not self._tiled:
            return scales.reshape(rows, 1)
        return scales.repeat(TILE, 0)[:rows].repeat(TILE, 1)[:, :columns]

    def __getitem__(self, at: Index) -> Shaped[np.ndarray, "..."]:
        """Reads the weight, and computes a part of the product."""
        product = np.asarray(self._weight[...]).astype(np.float32) * self._scales()
        return product.astype(self.dtype)[at]
