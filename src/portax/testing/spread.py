"""Values with a realistic spread for quantised goldens: about normal, each channel of its own size."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from portax.testing.probe import hashed

_KERNELS = ("kernel", "wi_0", "wi_1", "wo")
_OUTLIER = np.float32(4096)


def spread(path: str, shape: Sequence[int]) -> Float32[np.ndarray, "..."]:
    """Returns the values of one leaf: exact in float32, with up to 18 significant bits.

    Every value is a sum of four 16-bit numbers, hashed from its path and place. Channels of kernels (the last axis)
    are scaled by up to 2**8; some are zeros, some have an element that is 4096 times too large.

    Args:
        path: Full path of the leaf, e.g. `base/decoder/decoder_norm/scale`.
        shape: Its shape.
    """
    return _spread(path, tuple(shape), edges=False)


def edges(path: str, shape: Sequence[int]) -> Float32[np.ndarray, "..."]:
    """As `spread`, with channels of denormals, of denormal scales, of huge values, and with infinities and NaN.

    Args:
        path: As for `spread`.
        shape: As for `spread`.
    """
    return _spread(path, tuple(shape), edges=True)


def _spread(path: str, shape: tuple[int, ...], *, edges: bool) -> Float32[np.ndarray, "..."]:
    words = hashed(path, int(np.prod(shape, dtype=np.int64)))
    total = words.view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.int64)
    values = np.ldexp((total - 131070).astype(np.float32), -21)
    if path.rpartition("/")[2] not in _KERNELS or len(shape) < 2:
        return values.reshape(shape)
    return _channels(path, values.reshape(-1, shape[-1]), edges=edges).reshape(shape)


def _channels(path: str, values: Float32[np.ndarray, "rows channels"], *, edges: bool) -> Float32[np.ndarray, "_ _"]:
    word = hashed(f"{path}#", values.shape[1])
    kind = ((word >> np.uint64(8)) & np.uint64(31)).astype(int)
    row = ((word >> np.uint64(16)) % np.uint64(len(values))).astype(int)
    fraction = ((word >> np.uint64(3)) & np.uint64(7)).astype(np.float32) / np.float32(8)
    size = np.ldexp(1 + fraction, (word & np.uint64(7)).astype(np.int32) - 4)
    power = np.select([kind == 2, kind == 3, kind == 7], [-125, -113, 120]) if edges else np.zeros(len(kind), int)
    with np.errstate(over="ignore", under="ignore"):
        values = np.ldexp(values * size, power.astype(np.int32))
    values[:, kind == 0] = 0
    values[row[kind == 1], np.flatnonzero(kind == 1)] *= _OUTLIER
    if edges:
        _not_finite(values, kind, row)
    return values


def _not_finite(values: Float32[np.ndarray, "rows channels"], kind: np.ndarray, row: np.ndarray) -> None:
    for channel in np.flatnonzero((kind >= 4) & (kind <= 6)):
        values[row[channel], channel] = {4: np.inf, 5: -np.inf, 6: np.nan}[kind[channel]]
        if kind[channel] == 5:
            values[(row[channel] + 1) % len(values), channel] = np.inf
