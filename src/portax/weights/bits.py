"""bfloat16 as the unsigned integers that its bits spell, so that no compiler changes a NaN or a denormal."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Shaped


def to_bits(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """bfloat16 as the unsigned integers that its bits spell; anything else as it is.

    XLA and LLVM may copy bfloat16 by way of float32 wherever they see fit, which quiets NaNs and, on some machines,
    flushes denormals. So between trainer and engine bfloat16 travels as uint16.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The inverse of `to_bits`."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def pin_bits(x: Shaped[Array, "..."], zero: Bool[Array, ""]) -> Shaped[Array, "..."]:
    """Raw bfloat16, unchanged, in a way that keeps the compiler from moving a cast to floats across this point.

    Nothing moves across an exclusive-or with a number that is only known when the program runs; it costs one vector
    instruction. What is not bits needs no protection.

    Args:
        x: What to protect.
        zero: False, computed from an argument of the program.
    """
    return x ^ zero.astype(x.dtype) if x.dtype == jnp.uint16 else x
