"""Compares two arrays in pieces: which elements differ, and by how much."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Shaped

from portax.planning.jax_context import fetch
from portax.trainer.lazy_array import pieces

_BLOCK_BYTES = 2**18  # compared at a time: it stays in a core's cache
_UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of comparing two arrays.

    Attributes:
        different: Number of elements that differ: in their bits, or in their values if the dtypes differ.
        largest: Largest absolute difference of two elements without NaN; None if no two such differ.
        nans: Number of NaNs in each of the two.
    """

    different: int = 0
    largest: float | None = None
    nans: tuple[int, int] = (0, 0)

    def __add__(self, other: "Found") -> "Found":
        largest = [number for number in (self.largest, other.largest) if number is not None]
        nans = (self.nans[0] + other.nans[0], self.nans[1] + other.nans[1])
        return Found(self.different + other.different, max(largest, default=None), nans)

    def to_dict(self) -> dict[str, Any]:
        """Returns values for JSON, which has no infinity: an infinite largest difference is the string `inf`."""
        endless = self.largest is not None and math.isinf(self.largest)
        return dataclasses.asdict(self) | {"largest": "inf" if endless else self.largest}


def common_dtype(a: np.dtype, b: np.dtype) -> np.dtype | None:
    """Returns a dtype that holds both dtypes without loss: one of the two, or a wider one; None if there is none."""
    if a == b:
        return a
    if all(jnp.issubdtype(dtype, jnp.floating) for dtype in (a, b)):
        return np.dtype(np.float64 if 8 in (a.itemsize, b.itemsize) else np.float32)
    if all(jnp.issubdtype(dtype, jnp.integer) for dtype in (a, b)) and np.uint64 not in (a, b):
        return np.dtype(np.int64)
    return None


def compare(a: Any, b: Any, *, piece_bytes: int, progress: Callable[[int], None] = lambda _: None) -> Found:
    """Compares two arrays of one shape, whose dtypes have a common one.

    Args:
        a: An array: of numpy, of JAX (fetched as a whole), or lazy.
        b: Another one.
        piece_bytes: Bytes to read of each at a time; at least one chunk of an array in chunks.
        progress: Called with the number of bytes of `a` compared since its last call.
    """
    dtype = common_dtype(np.dtype(a.dtype), np.dtype(b.dtype))
    a, b = (fetch(side) if isinstance(side, jax.Array) else side for side in (a, b))
    found = Found()
    if not math.prod(a.shape):
        return found
    chunks = [getattr(side, "chunk", (1,) * len(a.shape)) for side in (a, b)]
    chunk = tuple(max(sizes) for sizes in zip(*chunks, strict=True))
    for at in pieces(tuple(a.shape), chunk, piece_bytes // np.dtype(dtype).itemsize):
        whole = all(where == slice(0, size) for where, size in zip(at, a.shape, strict=True))
        found += _piece(*(np.asarray(side[... if whole else at]).astype(dtype, copy=False) for side in (a, b)))
        progress(math.prod(where.stop - where.start for where in at) * np.dtype(a.dtype).itemsize)
    return found


def _piece(a: Shaped[np.ndarray, "..."], b: Shaped[np.ndarray, "..."]) -> Found:
    a, b = np.ascontiguousarray(a).reshape(-1), np.ascontiguousarray(b).reshape(-1)
    step = _BLOCK_BYTES // a.dtype.itemsize
    return sum((_block(a[at : at + step], b[at : at + step]) for at in range(0, a.size, step)), Found())


def _block(a: Shaped[np.ndarray, " n"], b: Shaped[np.ndarray, " n"]) -> Found:
    bits = _UNSIGNED.get(a.dtype.itemsize, f"V{a.dtype.itemsize}")
    differ = a.view(bits) != b.view(bits)
    different = int(np.count_nonzero(differ))
    a, b = _widened(a), _widened(b) if different else b
    nans = _nans(a)
    if not different:
        return Found(nans=(nans, nans))
    return Found(different, _largest(a, b, differ), (nans, _nans(b)))


def _widened(x: Shaped[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
    """Widens bfloat16 to float32, bit for bit, which speeds up the comparison many times."""
    return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32) if x.dtype == jnp.bfloat16 else x


def _nans(x: Shaped[np.ndarray, " n"]) -> int:
    return int(np.count_nonzero(np.isnan(x))) if jnp.issubdtype(x.dtype, jnp.inexact) else 0


def _largest(a: Shaped[np.ndarray, " n"], b: Shaped[np.ndarray, " n"], differ: Bool[np.ndarray, " n"]) -> float | None:
    wide = np.complex128 if jnp.issubdtype(a.dtype, jnp.complexfloating) else np.float64
    with np.errstate(invalid="ignore"):  # infinities, and NaNs of other payloads
        apart = np.abs(a.astype(wide) - b.astype(wide))
    largest = float(np.fmax.reduce(apart, initial=-1, where=differ))  # fmax passes NaNs over
    return None if largest < 0 else largest
