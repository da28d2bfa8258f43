"""bfloat16 as unsigned integers with the same bits, so that no compiler changes a NaN or a denormal."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Shaped


def to_bits(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Returns bfloat16 as `uint16` with the same bits; anything else unchanged.

    XLA and LLVM may copy bfloat16 by way of float32 wherever they see fit, which quiets NaNs and, on some machines,
    flushes denormals. So between trainer and engine bfloat16 travels as uint16.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Returns `uint16` as the bfloat16 with the same bits; anything else unchanged. The inverse of `to_bits`."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def widened(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Returns raw bfloat16 as float32 with the same values, NaNs and denormals included; anything else unchanged."""
    if x.dtype != jnp.uint16:
        return x
    return lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)


def pin_bits(x: Shaped[Array, "..."], zero: Bool[Array, ""]) -> Shaped[Array, "..."]:
    """Returns raw bfloat16 unchanged, and keeps the compiler from moving a cast to floats across this point.

    The compiler moves nothing across an exclusive-or with a number that is known only at run time; this costs one
    vector instruction. Arrays of other dtypes need no protection.

    Args:
        x: The array to protect.
        zero: False, computed from an argument of the program.
    """
    return x ^ zero.astype(x.dtype) if x.dtype == jnp.uint16 else x
