"""Converts a vocabulary some rows at a time, if its tensors are larger than a bucket.

An embedding can take more memory than the rest of an export. Its rows are independent of each other: some of its rows
are the embedding of the same model with a smaller vocabulary, and are converted as such.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Array, Shaped

from portax.converters.base import BaseConverter
from portax.planning.plan import Entry
from portax.trainer import param_tree
from portax.trainer.lazy_array import LazyArray
from portax.trainer.param_tree import Params, ParamTree


class Rows(LazyArray):
    """Some of an array's rows.

    Attributes:
        shape: Their shape.
        dtype: Their dtype.
    """

    def __init__(self, array: LazyArray, axis: int, start: int, stop: int):
        self._array, self._axis, self._start = array, axis, start
        self.shape = (*array.shape[:axis], stop - start, *array.shape[axis + 1 :])
        self.dtype = array.dtype

    def __getitem__(self, at: Any) -> Shaped[np.ndarray, "..."]:
        """Reads a part of the rows."""
        at = () if at is ... else at if isinstance(at, tuple) else (at,)
        whole = [*at, *[slice(None)] * (self.ndim - len(at))]
        first, last, _ = whole[self._axis].indices(self.shape[self._axis])
        whole[self._axis] = slice(self._start + first, self._start + last)
        return self._array[tuple(whole)]

    def release(self) -> None:
        """Frees the array's temporary copy."""
        self._array.release()


def in_pieces(converter: BaseConverter, params: Params, bucket_bytes: int) -> tuple[Entry, ...]:
    """Returns the tensors that are larger than a bucket, and whose rows are those of a vocabulary on disk.

    Args:
        converter: The converter.
        params: As for `converter.convert`.
        bucket_bytes: Bytes of a bucket.
    """
    leaves = converter.read(params).rooted
    large = {
        entry.name: entry
        for entry in converter.plan(params).entries
        if entry.nbytes > bucket_bytes and all(isinstance(leaves[source], LazyArray) for source in entry.sources)
    }
    vocabulary = converter.config.vocab_size
    if not large:
        return ()
    row, tree = _smaller(converter, params, 0, 1)
    return tuple(
        large[entry.name]
        for entry in row.plan(tree).entries
        if entry.name in large and large[entry.name].shape == (vocabulary, *entry.shape[1:]) and entry.shape[0] == 1
    )


def pieces(
    converter: BaseConverter, params: Params, entry: Entry, bucket_bytes: int
) -> Iterator[tuple[int, Shaped[Array, "rows ..."]]]:
    """Converts one of those tensors, piece by piece.

    Args:
        converter: The converter.
        params: As for `converter.convert`.
        entry: The tensor, one of `in_pieces`.
        bucket_bytes: Bytes of a piece and its sources, together.

    Yields:
        The first row of each piece, and the piece.
    """
    rows = entry.shape[0]
    leaves = converter.read(params).rooted
    largest = max(entry.nbytes, *(leaves[source].nbytes for source in entry.sources))
    step = max(1, rows * bucket_bytes // (2 * largest))  # what was read is there beside what was made of it
    same: BaseConverter | None = None
    for start in range(0, rows, step):
        part, tree = _smaller(converter, params, start, min(start + step, rows))
        if same is None or same.config != part.config:
            same = part  # its programs are for all pieces of this many rows
        for bucket in same.stream(tree, bucket_bytes=bucket_bytes, only={entry.name}):
            for piece in bucket.values():
                yield start, piece


def _smaller(converter: BaseConverter, params: Params, start: int, stop: int) -> tuple[BaseConverter, ParamTree]:
    """Returns the model whose vocabulary is some rows of this one's."""
    config = dataclasses.replace(converter.config, vocab_size=stop - start)
    smaller = converter.on(converter.mesh, config=config)
    state = converter.read(params)
    whole, part = (param_tree.read(of.expected_tree()).leaves for of in (converter, smaller))
    leaves = dict(state.leaves)
    for path in state.leaves.keys() & part.keys():
        if (few := part[path].shape) != (many := whole[path].shape):
            axis = next(i for i, (a, b) in enumerate(zip(few, many, strict=True)) if a != b)
            leaf = state.leaves[path]
            lazy = isinstance(leaf, LazyArray)
            at = (slice(None),) * axis + (slice(start, stop),)
            leaves[path] = Rows(leaf, axis, start, stop) if lazy else leaf[at]
    return smaller, dataclasses.replace(state, leaves=leaves)
