"""`LazyArray`: a weight that is read when it is asked for, a part at a time."""

import abc
import itertools
import math
from collections.abc import Iterator
from types import EllipsisType
from typing import TypeAlias

import numpy as np
from jaxtyping import Shaped

Index: TypeAlias = int | slice | EllipsisType | tuple[int | slice, ...]
"""A part of an array: numbers and slices (of step 1), one for each of the first axes; `...` for all of it."""

_ALIGNMENT = 64  # bytes; from such an address JAX takes an array on the CPU over as it is


def empty(shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    """As `numpy.empty`, in memory that a JAX array on the CPU shares instead of copying."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def pieces(shape: tuple[int, ...], chunk: tuple[int, ...], most: int) -> Iterator[tuple[slice, ...]]:
    """Cuts an array into boxes of whole chunks.

    Args:
        shape: Its shape.
        chunk: Shape of the pieces in which it is stored.
        most: Most elements of one box; a chunk that has more is a box all the same.

    Yields:
        A slice for each axis, in C order; last axes are cut last, because they make long runs.
    """
    steps = [min(a, n) for a, n in zip(chunk, shape, strict=True)]
    for axis in reversed(range(len(steps))):
        others = math.prod(steps) // steps[axis]
        times = most // (others * chunk[axis])
        steps[axis] = min(shape[axis], max(steps[axis], times * chunk[axis]))
    for corner in itertools.product(*(range(0, n, step) for n, step in zip(shape, steps, strict=True))):
        yield tuple(slice(a, min(a + step, n)) for a, step, n in zip(corner, steps, shape, strict=True))


class LazyArray(abc.ABC):
    """An array that is somewhere else than in memory, such as a leaf of a checkpoint on disk.

    A plan needs its shape and dtype alone. A conversion asks for one layer's part of it, or for all of it, as
    `array[at]`, and drops what it got as soon as that layer is done.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it, in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def release(self) -> None:  # noqa: B027 - most have nothing
        """Frees what is kept so that parts can be read faster; the next read makes it anew."""

    @abc.abstractmethod
    def __getitem__(self, at: Index) -> Shaped[np.ndarray, "..."]:
        """Reads a part into host memory.

        Args:
            at: Numbers and slices (of step 1), one for each of the first axes; `...` for all of it.
        """
