"""Quantising as tpu-inference does it: the arithmetic of its `quantize_tensor`, spelled out rounding by rounding.

Each step is in float32 and followed by an explicit rounding to the dtype that the engine computes in, so that neither
fusing, nor jit, nor the number of devices changes a bit. NaN, signs and denormals are decided on bits.
"""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Shaped

DTYPES = {name: jnp.dtype(name) for name in ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int8", "int4")}
"""Dtypes that weights are quantised to, by the engine's names."""

Quantised: TypeAlias = tuple[Shaped[Array, "..."], Float32[Array, "..."]]
"""Weights, and their scales."""

_SIGN, _EXPONENT, _MAGNITUDE = np.uint32(0x80000000), np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)
_NORMAL = np.float32(2.0**-126)


@functools.partial(jax.jit, static_argnames=("dtype", "axis", "block", "wide", "mark"), inline=True)
def quantize(
    x: Float[Array, "..."],
    *,
    dtype: Any,
    axis: int,
    block: int | None = None,
    wide: bool = False,
    mark: bool = False,
) -> Quantised:
    """Quantises along one axis with a scale for each run of `block` elements.

    The scale is the largest magnitude times the float32 reciprocal of the dtype's maximum; values are multiplied with
    the scale's reciprocal and clipped; floats are then rounded to nearest even, integers towards zero. Channels of
    zeros have a scale of zero, and so have those whose scale would be denormal.

    Args:
        x: bfloat16 or float32; the dtype that every step is rounded to.
        dtype: One of `DTYPES`.
        axis: The axis that is summed over in the matrix product.
        block: Elements that share a scale; None for the whole axis.
        wide: True keeps float32's precision in the scales of bfloat16.
        mark: True makes a scale that would be denormal minus infinity, and not the zero that the engine has.

    Returns:
        The weights, and the scales with `axis` shortened to the number of blocks.

    Raises:
        ValueError: The block does not divide the axis.

    Source: tpu-inference 0.32, layers/common/quantization.
    """
    narrow = x.dtype == jnp.bfloat16
    values, blocks = in_blocks(as_float32(x), axis=axis, block=block)
    largest = magnitude(values, axis=axis + 1)
    lowest, highest = limits(dtype)
    scale = flushed(largest * (np.float32(1) / highest))
    if narrow and not wide:
        scale = to_bfloat16(scale)
    inverse = np.float32(1) / scale
    inverse = to_bfloat16(inverse) if narrow else inverse
    most = jnp.finfo(x.dtype).max.astype(np.float32)
    inverse = jnp.where(scale == 0, most, jnp.where(jnp.isnan(scale), 0, inverse))
    scaled = values * inverse
    scaled = to_bfloat16(scaled) if narrow else scaled
    weights = cast(clip(scaled, lowest, highest), dtype)
    if mark:
        scale = marked(scale, largest, scale)
    return weights.reshape(x.shape), scale.reshape(*x.shape[:axis], blocks, *x.shape[axis + 1 :])


def in_blocks(x: Shaped[Array, "..."], *, axis: int, block: int | None) -> tuple[Shaped[Array, "..."], int]:
    """Splits one axis into blocks and their elements; returns also the number of blocks."""
    size = x.shape[axis]
    block = size if block is None else block
    if size % block:
        raise ValueError(f"blocks of {block} do not divide {size}")
    return x.reshape(*x.shape[:axis], size // block, block, *x.shape[axis + 1 :]), size // block


def limits(dtype: Any) -> tuple[np.float32, np.float32]:
    """Returns the least and the largest number of a dtype."""
    info = ml_dtypes.iinfo(dtype) if is_integer(dtype) else ml_dtypes.finfo(dtype)
    return np.float32(float(info.min)), np.float32(float(info.max))


def is_integer(dtype: Any) -> bool:
    """Tells whether a quantised dtype is an integer type."""
    return jnp.dtype(dtype).name.startswith("int")


def as_float32(x: Float[Array, "..."]) -> Float32[Array, "..."]:
    """Returns the same values in float32, with denormals as zeros of their sign."""
    if x.dtype == jnp.bfloat16:
        raw = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    else:
        raw = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    raw = jnp.where(raw & _EXPONENT == 0, raw & _SIGN, raw)
    return lax.bitcast_convert_type(raw, jnp.float32)


def magnitude(x: Float32[Array, "..."], *, axis: int | tuple[int, ...]) -> Float32[Array, "..."]:
    """Returns the largest magnitude over some axes, which stay with size 1; NaN wins, whatever the compiler."""
    raw = lax.bitcast_convert_type(x, jnp.uint32) & _MAGNITUDE
    return lax.bitcast_convert_type(raw.max(axis, keepdims=True), jnp.float32)


def marked(
    scale: Float32[Array, "..."], largest: Float32[Array, "..."], usable: Float32[Array, "..."]
) -> Float32[Array, "..."]:
    """Scales, or minus infinity where a channel has values and `usable`, which it needs, is zero."""
    return jnp.where((largest > 0) & (usable == 0), -np.inf, scale)


def flushed(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Returns magnitudes, with denormals as zeros."""
    return jnp.where(x < _NORMAL, 0, x)


def to_bfloat16(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Rounds to the nearest bfloat16, as float32; no compiler drops this rounding."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def clip(x: Float32[Array, "..."], lowest: np.float32, highest: np.float32) -> Float32[Array, "..."]:
    """Limits values; NaN stays."""
    return jnp.where(x > highest, highest, jnp.where(x < lowest, lowest, x))


def cast(x: Float32[Array, "..."], dtype: Any) -> Shaped[Array, "..."]:
    """Rounds to nearest even, or towards zero for integers; NaN becomes zero in a dtype without NaN."""
    if is_integer(dtype):
        return jnp.where(jnp.isnan(x), 0, x).astype(jnp.int8).astype(dtype)
    has_nan = np.isnan(np.float32(np.nan).astype(dtype).astype(np.float32))
    return x.astype(dtype) if has_nan else jnp.where(jnp.isnan(x), 0, x).astype(dtype)
