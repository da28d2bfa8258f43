"""Fingerprints: a few bytes that tell whether two arrays have the same bits, computed on the arrays' devices."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped, UInt32

from portax.planning.jax_context import fetch

_SEEDS = (0x9E3779B1, 0x85EBCA77)
_IN_FLIGHT = 8  # sums over devices; with a hundred at a time, simulated devices wait for each other for ever
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def fingerprint(x: Shaped[Array | np.ndarray, "..."]) -> UInt32[Array, "2"]:
    """Returns two 32-bit sums over hashes of every element's bits and position.

    A changed, moved or swapped element changes both. Nothing is gathered: each device sums its own shards.

    Args:
        x: Any array of elements of up to four bytes.
    """
    bits = lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    place = places(x.shape)
    return jnp.stack([jnp.sum(_mixed(bits, place, np.uint32(seed)), dtype=jnp.uint32) for seed in _SEEDS])


def places(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Returns every element's number in an array of this shape, modulo 2**32."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return place


def _mixed(bits: UInt32[Array, "..."], place: UInt32[Array, "..."], seed: np.uint32) -> UInt32[Array, "..."]:
    hashed = (place + np.uint32(1)) * seed ^ (bits + np.uint32(1)) * np.uint32(0xC2B2AE3D)
    hashed = (hashed ^ (hashed >> 15)) * np.uint32(0x27D4EB2F)
    hashed = (hashed ^ (hashed >> 13)) * np.uint32(0x165667B1)
    return hashed ^ (hashed >> 16)


def fingerprints(leaves: Iterable[Any]) -> list[tuple[int, int] | None]:
    """Returns the fingerprints of several arrays of JAX or numpy; None for deleted arrays."""
    marks: list[Any] = []
    for leaf in leaves:
        if len(marks) >= _IN_FLIGHT:
            jax.block_until_ready(marks[-_IN_FLIGHT])
        marks.append(None if isinstance(leaf, jax.Array) and leaf.is_deleted() else fingerprint(leaf))
    return [None if mark is None else (int(mark[0]), int(mark[1])) for mark in fetch(marks)]
