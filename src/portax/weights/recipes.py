"""Recipes by which checkpoints are quantised: each is a definition of its own, and they differ in bits.

All take `[in, out]` matrices, of bfloat16 or, stacked on leading axes, several, and answer with weights and scales of
the same orientation. What is divided is hidden from the compiler, which would multiply with reciprocals and
merge quotients. A scale that would be denormal is minus infinity: see `quantize.marked`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Shaped

from portax.weights import kernels
from portax.weights.quantize import (
    Quantised,
    as_float32,
    cast,
    clip,
    flushed,
    is_integer,
    limits,
    magnitude,
    marked,
    to_bfloat16,
)

TILE = 128
_FP8 = jnp.dtype(jnp.float8_e4m3fn)
_LEAST_MAXIMUM = np.float32(1e-4)


@functools.partial(jax.jit, inline=True)
def fp8_block(x: Float[Array, "*batch in out"]) -> Quantised:
    """Tiles of 128 x 128: the scale is the largest magnitude, at least 1e-4, over 448.

    Source: DeepGEMM's `per_block_cast_to_fp8`, in vLLM 0.32, utils/deep_gemm.py.
    """
    tiles = _tiles(as_float32(x))
    largest = magnitude(tiles, axis=(-3, -1))
    scale = jnp.where(largest < _LEAST_MAXIMUM, _LEAST_MAXIMUM, largest) / _hidden(448.0, largest)
    weights = cast(tiles * (np.float32(1) / _sealed(scale)), _FP8)
    return _matrix(weights, x.shape), scale[..., 0, :, 0]


@functools.partial(jax.jit, inline=True)
def fp8_block_hf(x: Float[Array, "*batch in out"]) -> Quantised:
    """Tiles of 128 x 128: values times 448 over the largest magnitude, and the scale is that factor's reciprocal.

    Source: transformers 5.19, `Fp8Quantize`.
    """
    tiles = _tiles(as_float32(x))
    largest = magnitude(tiles, axis=(-3, -1))
    reciprocal = _sealed(np.float32(1) / jnp.where(largest == 0, 1, largest))
    factor = jnp.where(largest == 0, 1, reciprocal * np.float32(448))
    weights = cast(clip(tiles * factor, *limits(_FP8)), _FP8)
    scale = np.float32(1) / _sealed(factor)
    return _matrix(weights, x.shape), marked(scale, largest, flushed(scale))[..., 0, :, 0]


@functools.partial(jax.jit, static_argnames=("dtype",), inline=True)
def channel(x: Float[Array, "*batch in out"], *, dtype: Any) -> Quantised:
    """One scale for each output, all in bfloat16; integers are rounded to nearest even.

    Source: compressed-tensors 0.17, symmetric, strategy `channel`.
    """
    values = as_float32(x)
    largest = magnitude(values, axis=-2)
    lowest, highest = limits(dtype)
    divisor = 127.5 if is_integer(dtype) else float(highest)
    quotient = largest / _hidden(divisor, largest)
    scale = to_bfloat16(quotient)
    scale = jnp.where(scale == 0, jnp.finfo(jnp.bfloat16).eps.astype(np.float32), scale)
    scaled = to_bfloat16(values / scale)
    scaled = jnp.round(scaled) if is_integer(dtype) else scaled
    return cast(clip(scaled, lowest, highest), dtype), marked(scale, largest, flushed(quotient))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A way in which checkpoints of the hub are quantised.

    Attributes:
        make: Makes weights and scales.
        scale: The checkpoint's name for the scale of a `weight`.
        tiled: True if a scale covers a tile of 128 x 128; False if it covers an output.
        description: A description in words.
        dtype: Of the weights.
    """

    make: Callable[[Float[Array, "*batch in out"]], Quantised]
    scale: str
    tiled: bool
    description: str
    dtype: str = "float8_e4m3fn"


RECIPES = {
    "fp8-block": Recipe(fp8_block, "weight_scale_inv", True, "DeepGEMM's, as in vLLM: 128 x 128 tiles, amax / 448"),
    "fp8-block-hf": Recipe(fp8_block_hf, "weight_scale_inv", True, "transformers' Fp8Quantize: 128 x 128 tiles"),
    "ct-fp8": Recipe(
        functools.partial(channel, dtype="float8_e4m3fn"), "weight_scale", False, "compressed-tensors, per channel"
    ),
    "ct-int8": Recipe(
        functools.partial(channel, dtype="int8"), "weight_scale", False, "compressed-tensors, per channel", "int8"
    ),
}
"""By the name that `Quantization.checkpoint` and `HuggingFace` know them by."""


@functools.partial(jax.jit, static_argnames=("tiled",), inline=True)
def dequantize(
    weights: Shaped[Array, "*batch in out"], scale: Float32[Array, "..."], *, tiled: bool
) -> Float32[Array, "*batch in out"]:
    """The float32 product of weights and scales.

    Args:
        weights: As a recipe makes them.
        scale: Likewise.
        tiled: As `Recipe.tiled`.
    """
    if tiled:
        rows, columns = weights.shape[-2:]
        scale = jnp.repeat(jnp.repeat(scale, TILE, -2), TILE, -1)[..., :rows, :columns]
    return weights.astype(jnp.float32) * scale


_Tiles: TypeAlias = Float32[Array, "*batch rows 128 columns 128"]


def _tiles(x: Float32[Array, "*batch in out"]) -> _Tiles:
    padded = kernels.pad_axis(kernels.pad_axis(x, axis=x.ndim - 2, multiple=TILE), axis=x.ndim - 1, multiple=TILE)
    rows, columns = padded.shape[-2:]
    return padded.reshape(*x.shape[:-2], rows // TILE, TILE, columns // TILE, TILE)


def _matrix(tiles: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "*batch in out"]:
    *batch, rows, one, columns, other = tiles.shape
    return tiles.reshape(*batch, rows * one, columns * other)[..., : shape[-2], : shape[-1]]


def _sealed(x: Float32[Array, "..."], beside: Float32[Array, "..."] | None = None) -> Float32[Array, "..."]:
    """Numbers whose origin no compiler sees through; `beside`, or they themselves, are not negative, nor -0."""
    sign = lax.bitcast_convert_type(x if beside is None else beside, jnp.uint32) >> 31
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) ^ sign, jnp.float32)


def _hidden(constant: float, beside: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """A number that no compiler knows to be constant; see `_sealed`."""
    return _sealed(jnp.broadcast_to(np.float32(constant), beside.shape), beside)
