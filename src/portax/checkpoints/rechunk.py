"""`Scratch`: stacks of layers on disk, rewritten layer by layer in temporary files.

A trainer that scans its layers saves chunks that each hold a piece of *every* layer (Orbax writes each device's shard,
and nobody partitions the scan axis). To read one layer, the whole stack has to be decoded: 94 times for a model of 94
layers. Rewriting each stack once, chunk by chunk, costs one pass over it and the memory of the chunks in work, whatever
the size of the model. Other leaves that are read in parts smaller than their chunks, such as a vocabulary in pieces,
are copied there, too. The operating system decides how much of the files stays in memory.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from portax._text.tables import size
from portax.checkpoints.file_io import consume_behind, is_full, read_at, write_at
from portax.errors import CheckpointError
from portax.trainer.lazy_array import empty, pieces

_SLAB_BYTES = 2**26  # of a stack, read at a time; a chunk that is larger is read whole
_READS_IN_FLIGHT = 2

_Slab: TypeAlias = tuple[slice, ...]


@runtime_checkable
class Store(Protocol):
    """A source of stacks: an open `tensorstore.TensorStore`, or anything like it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stack."""

    def __getitem__(self, at: Any) -> Any:
        """Returns a part, with a `read()` that returns a future of an array."""


class Scratch:
    """Temporary files without names: each is freed with its `Unstacked`, or when the process ends."""

    def __init__(self, folder: str | os.PathLike | None = None):
        """Makes a scratch; a file is made with the first write.

        Args:
            folder: Folder of the files; None for the system's folder of temporary files.
        """
        self.folder = os.fspath(folder) if folder is not None else tempfile.gettempdir()

    def unstack(self, store: Store, chunk: tuple[int, ...], dtype: np.dtype, axes: tuple[int, ...]) -> "Unstacked":
        """Rewrites a stack layer by layer.

        Args:
            store: The stack.
            chunk: Shape of the pieces to read at a time.
            dtype: Its dtype.
            axes: Its scan axes.

        Raises:
            CheckpointError: The disk has no space for it.
        """
        scan = tuple(store.shape[axis] for axis in axes)
        layer, piece = (tuple(n for axis, n in enumerate(of) if axis not in axes) for of in (store.shape, chunk))
        most = _SLAB_BYTES // (math.prod(scan) * dtype.itemsize)
        with self._spacious(math.prod(store.shape) * dtype.itemsize):
            file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - lives as long as what is read
            unstacked = Unstacked(file, scan, layer, dtype, tuple(pieces(layer, piece, most)))
            consume_behind(_read(store, unstacked.slabs, axes), lambda read: unstacked.write(*read))
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
    """A stack in a scratch file, one layer after the other, each layer slab by slab.

    Attributes:
        file: Its file.
        scan: Number of layers on each scan axis.
        layer: Shape of one layer.
        dtype: Dtype of all.
        slabs: The pieces of a layer, as they are stored one after the other: a slice for each axis of a layer.
    """

    file: IO[bytes]
    scan: tuple[int, ...]
    layer: tuple[int, ...]
    dtype: np.dtype
    slabs: tuple[_Slab, ...]

    def read(self, position: tuple[int, ...], part: tuple[slice, ...] = ()) -> Shaped[np.ndarray, "..."]:
        """Reads one layer, or a part of it.

        Args:
            position: Its index on each scan axis.
            part: Slices of its first axes; empty for all.
        """
        wanted = [slice(*where.indices(n)[:2]) for where, n in zip(part, self.layer, strict=False)]
        wanted += [slice(0, n) for n in self.layer[len(part) :]]
        found = empty(_shape(wanted), self.dtype)
        for slab, offset in zip(self.slabs, self._offsets, strict=True):
            both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(slab, wanted, strict=True)]
            if all(where.start < where.stop for where in both):
                place = found[_within(both, wanted)] if both else found
                self._fill(place, slab, both, self._start(position) + offset)
        return found

    def _fill(self, place: np.ndarray, slab: _Slab, wanted: Sequence[slice], start: int) -> None:
        """Reads the wanted part of one slab: rows directly, or through a buffer."""
        if slab:
            row = math.prod(_shape(slab[1:])) * self.dtype.itemsize
            start += (wanted[0].start - slab[0].start) * row
        if place.flags.c_contiguous and wanted[1:] == [*slab[1:]]:
            read_at(self.file.fileno(), place, start)
            return
        rows = np.empty((len(place), *_shape(slab[1:])), self.dtype)
        read_at(self.file.fileno(), rows, start)
        place[...] = rows[(slice(None), *_within(wanted[1:], slab[1:]))]

    def write(self, number: int, layers: Shaped[np.ndarray, "..."]) -> None:
        """Writes a slab of every layer.

        Args:
            number: Number of the slab.
            layers: Its values, with the scan axes first.
        """
        for position in np.ndindex(self.scan):
            start = self._start(position) + self._offsets[number]
            write_at(self.file.fileno(), np.ascontiguousarray(layers[position]), start)

    def _start(self, position: tuple[int, ...]) -> int:
        """Returns the position of a layer, in bytes."""
        number = int(np.ravel_multi_index(position, self.scan)) if self.scan else 0
        return number * math.prod(self.layer) * self.dtype.itemsize

    @functools.cached_property
    def _offsets(self) -> tuple[int, ...]:
        """Position of each slab within a layer, in bytes."""
        sizes = [math.prod(_shape(slab)) * self.dtype.itemsize for slab in self.slabs]
        return tuple(itertools.accumulate(sizes[:-1], initial=0))


def _shape(of: Iterable[slice]) -> tuple[int, ...]:
    return tuple(where.stop - where.start for where in of)


def _within(these: Iterable[slice], those: Iterable[slice]) -> tuple[slice, ...]:
    """Returns slices relative to the start of others."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(these, those, strict=True))


def _read(store: Store, slabs: Iterable[_Slab], axes: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
    """Reads slabs of all layers, scan axes first; reads the next slab while the last one is in use."""
    reading: collections.deque[tuple[int, Any]] = collections.deque()
    for number, slab in enumerate(slabs):
        rest = iter(slab)
        at = tuple(slice(None) if axis in axes else next(rest) for axis in range(len(store.shape)))
        reading.append((number, store[at].read()))
        if len(reading) == _READS_IN_FLIGHT:
            yield _layers_first(*reading.popleft(), axes)
    while reading:
        yield _layers_first(*reading.popleft(), axes)


def _layers_first(number: int, future: Any, axes: tuple[int, ...]) -> tuple[int, np.ndarray]:
    return number, np.moveaxis(future.result(), axes, range(len(axes)))
