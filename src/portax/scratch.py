"""`Scratch`: stacks of layers on disk, rewritten layer by layer in a temporary file.

A trainer that scans its layers saves chunks that each hold a piece of *every* layer (Orbax writes what each device
holds, and nobody partitions the scan axis). Reading one layer then means to decode the whole stack: for a model of 94
layers, 94 times. Rewriting each stack once, chunk by chunk, costs one pass over it and the memory of the chunks in
work, whatever the size of the model. A leaf of no layers that is asked for in parts smaller than its chunks, such as a
vocabulary that goes in pieces, is copied there likewise. How much of the file then stays in memory is the operating
system's to decide.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from portax.disk import is_full, reserve, write_at
from portax.errors import CheckpointError
from portax.lazy import empty, pieces
from portax.tables import size

_SLAB_BYTES = 2**26  # of a stack, read at a time; a chunk that is larger is read whole
_SLABS_IN_FLIGHT = 2

_Slab: TypeAlias = tuple[slice, ...]


@runtime_checkable
class Store(Protocol):
    """What a stack is read from: an open `tensorstore.TensorStore`, or anything like it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stack."""

    def __getitem__(self, at: Any) -> Any:
        """A part of it, with a `read()` that returns a future of an array."""


class Scratch:
    """A temporary file without a name: it goes when the process ends, however it ends."""

    def __init__(self, folder: str | os.PathLike | None = None):
        """Makes a scratch; the file itself is made when something is written.

        Args:
            folder: Where the file is; None for the system's folder of temporary files.
        """
        self.folder = os.fspath(folder) if folder is not None else tempfile.gettempdir()
        self._file: IO[bytes] | None = None
        self._end = 0

    def unstack(self, store: Store, chunk: tuple[int, ...], dtype: np.dtype, axes: tuple[int, ...]) -> "Unstacked":
        """Rewrites a stack layer by layer.

        Args:
            store: The stack.
            chunk: Shape of the pieces that it is read in.
            dtype: Its dtype.
            axes: Its scan axes.

        Raises:
            CheckpointError: There is no space for it.
        """
        scan = tuple(store.shape[axis] for axis in axes)
        rest = tuple(n for axis, n in enumerate(store.shape) if axis not in axes)
        nbytes = math.prod(store.shape) * dtype.itemsize
        with self._spacious(nbytes):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - lives as long as what is read
            reserve(self._file.fileno(), self._end, nbytes)
            unstacked = Unstacked(self._file, self._end, scan, rest, dtype)
            pieces = tuple(n for axis, n in enumerate(chunk) if axis not in axes)
            with concurrent.futures.ThreadPoolExecutor(_SLABS_IN_FLIGHT) as pool:
                writing: collections.deque[concurrent.futures.Future[None]] = collections.deque()
                for slab, layers in _slabs(store, pieces, axes, unstacked):
                    if len(writing) == _SLABS_IN_FLIGHT:
                        writing.popleft().result()
                    writing.append(pool.submit(unstacked.write, slab, np.moveaxis(layers, axes, range(len(axes)))))
                    del layers
                for write in writing:
                    write.result()
        self._end += nbytes
        return unstacked

    @contextlib.contextmanager
    def _spacious(self, nbytes: int) -> Iterator[None]:
        need = f"{size(nbytes)} more for what is read out of larger chunks; name another folder with scratch="
        if (free := shutil.disk_usage(self.folder).free) < nbytes:
            raise CheckpointError(f"{self.folder}: {size(free)} of temporary space is left, and it takes {need}")
        try:
            yield
        except OSError as error:
            if not is_full(error):
                raise
            raise CheckpointError(f"{self.folder}: no temporary space is left, and it takes {need}") from error


@dataclasses.dataclass(frozen=True)
class Unstacked:
    """A stack in a scratch, one layer after the other.

    Attributes:
        file: The scratch.
        offset: Where in it the first layer begins, in bytes.
        scan: How many layers there are on each scan axis.
        layer: Shape of one layer.
        dtype: Dtype of all.
    """

    file: IO[bytes]
    offset: int
    scan: tuple[int, ...]
    layer: tuple[int, ...]
    dtype: np.dtype

    def read(self, position: tuple[int, ...], part: tuple[slice, ...] = ()) -> Shaped[np.ndarray, "..."]:
        """One layer, or a part of it.

        Args:
            position: Its index on each scan axis.
            part: What of its first axes; empty for all.
        """
        start = self._start(position)
        if any(where.indices(n) != (0, n, 1) for where, n in zip(part, self.layer, strict=False)):
            return np.array(np.memmap(self.file, self.dtype, "r", start, self.layer)[part])
        whole = empty(self.layer, self.dtype)
        view = whole.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            if not (count := os.preadv(self.file.fileno(), [view[done:]], start + done)):
                raise OSError(errno.EIO, "the scratch file is shorter than what was written to it")
            done += count
        return whole

    def write(self, slab: _Slab, layers: Shaped[np.ndarray, "..."]) -> None:
        """Writes a piece of every layer.

        Args:
            slab: Which piece: a slice for each axis of a layer.
            layers: Its values, with the scan axes first.
        """
        whole_rows = all(s.stop - s.start == n for s, n in zip(slab[1:], self.layer[1:], strict=True))
        for position in np.ndindex(self.scan):
            start = self._start(position)
            if whole_rows:
                first = start + slab[0].start * self._row_bytes if slab else start
                write_at(self.file.fileno(), np.ascontiguousarray(layers[position]), first)
            else:
                self._scatter(start, slab, layers[position])

    def _scatter(self, start: int, slab: _Slab, values: Shaped[np.ndarray, "..."]) -> None:
        """Writes parts of rows, by mapping some rows at a time: a call for each part takes three times as long."""
        rows, *rest = slab
        step = max(1, _SLAB_BYTES // self._row_bytes)
        for first in range(rows.start, rows.stop, step):
            last = min(first + step, rows.stop)
            shape = (last - first, *self.layer[1:])
            place = np.memmap(self.file, self.dtype, "r+", start + first * self._row_bytes, shape)
            place[(slice(None), *rest)] = values[first - rows.start : last - rows.start]

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.layer[1:]) * self.dtype.itemsize

    def _start(self, position: tuple[int, ...]) -> int:
        number = int(np.ravel_multi_index(position, self.scan)) if self.scan else 0
        return self.offset + number * math.prod(self.layer) * self.dtype.itemsize


def _slabs(
    store: Store, chunk: tuple[int, ...], axes: tuple[int, ...], into: Unstacked
) -> Iterator[tuple[_Slab, np.ndarray]]:
    """Reads a stack in pieces of whole chunks, the next one while the last one is in work."""
    most = _SLAB_BYTES // (math.prod(into.scan) * into.dtype.itemsize)
    reading: collections.deque[tuple[_Slab, Any]] = collections.deque()
    for slab in pieces(into.layer, chunk, most):
        rest = iter(slab)
        at = tuple(slice(None) if axis in axes else next(rest) for axis in range(len(store.shape)))
        reading.append((slab, store[at].read()))
        if len(reading) == _SLABS_IN_FLIGHT:
            ready, future = reading.popleft()
            yield ready, future.result()
    while reading:
        ready, future = reading.popleft()
        yield ready, future.result()
