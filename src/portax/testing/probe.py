"""The values of golden trees: every element depends on its path and place, so every permutation shows."""

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt64


def _splitmix64(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hashed(path: str, count: int) -> UInt64[np.ndarray, " n"]:
    """Returns 64 bits for each of the first `count` elements of a leaf: `splitmix64(i + crc32(path) * 2**32)`.

    Args:
        path: Full path of the leaf.
        count: Number of elements.
    """
    return _splitmix64(np.arange(count, dtype=np.uint64) + (np.uint64(zlib.crc32(path.encode())) << np.uint64(32)))


def probe(path: str, shape: Sequence[int]) -> Float32[np.ndarray, "..."]:
    """Returns the values of one leaf.

    Element `i` in C order hashes `i + crc32(path) * 2**32` (splitmix64) into a sign, an exponent from -4 to 3 and seven
    bits of fraction: 8 significant bits, exact in bfloat16.

    Args:
        path: Full path of the leaf, e.g. `base/decoder/decoder_norm/scale`.
        shape: Its shape.
    """
    bits = hashed(path, int(np.prod(shape, dtype=np.int64)))
    fraction = 1 + (bits & np.uint64(0x7F)).astype(np.float32) / np.float32(128)
    exponent = ((bits >> np.uint64(8)) & np.uint64(7)).astype(np.int32) - 4
    sign = np.where((bits >> np.uint64(7)) & np.uint64(1), np.float32(-1), np.float32(1))
    return np.ldexp(sign * fraction, exponent).astype(np.float32).reshape(shape)
