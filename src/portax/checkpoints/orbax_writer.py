"""Writes an Orbax checkpoint of arrays that are never whole in memory: each is filled part by part, in any order."""

import collections
import dataclasses
import errno
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from portax.checkpoints.file_io import write_text
from portax.checkpoints.orbax_reader import first_line, import_orbax

ITEM = "items"  # as trainers name it
_FORM = {"use_ocdbt": True, "use_zarr3": True}  # MaxText's
_STEP = "_CHECKPOINT_METADATA"  # Orbax writes it beside the items of a step, or, if there is but one thing, in that
CHUNK_BYTES = 2**26  # what a reader decodes at a time; a device that needs a part of it reads all of it


@dataclasses.dataclass(frozen=True, eq=False)
class NewArray:
    """An array to write.

    Attributes:
        path: Its path in the tree, with `/` between parts.
        shape: Its shape.
        dtype: Its dtype.
        chunk: Shape of its stored chunks, each compressed on its own.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array, before compression."""
        return math.prod(self.shape) * self.dtype.itemsize


def chunk_shape(
    shape: tuple[int, ...], dtype: np.dtype, scan: Iterable[int], most: int = CHUNK_BYTES
) -> tuple[int, ...]:
    """Returns the shape of chunks that hold one layer each, or an even part of one.

    Args:
        shape: Shape of the array.
        dtype: Its dtype.
        scan: Its scan axes.
        most: Bytes of one chunk, if its axes can be divided so far.
    """
    chunk = [1 if axis in scan else size for axis, size in enumerate(shape)]
    for axis, size in enumerate(chunk):
        excess = -(-math.prod(chunk) * dtype.itemsize // most)
        chunk[axis] = size // next(parts for parts in range(min(excess, size) or 1, size + 1) if size % parts == 0)
    return tuple(chunk)


class Stores:
    """Arrays of an unfinished checkpoint, open for writing.

    A context manager: all writing has stopped when it ends, also after an error.
    """

    def __init__(self, stores: Mapping[str, Any]):
        """Takes over open tensorstores, by the path of their array."""
        self._stores = stores
        self._layers: collections.deque[list[Any]] = collections.deque()

    def __enter__(self) -> "Stores":
        return self

    def __exit__(self, *_: object) -> None:
        _settle(itertools.chain.from_iterable(self._layers))

    def write(self, parts: Mapping[str, tuple[Any, np.ndarray]]) -> None:
        """Writes one layer's parts; returns as soon as those of the layer before are written.

        Args:
            parts: By the path of its array, each part's place there, as an index, and the part, which must not change
                any more.

        Raises:
            OSError: The disk is full, or does not work.
        """
        layer: list[Any] = []
        self._layers.append(layer)
        for path, (at, part) in parts.items():
            layer.append(self._stores[path][at].write(part))
        self.wait(1)

    def wait(self, layers: int = 0) -> None:
        """Waits until at most so many layers are unwritten.

        Raises:
            OSError: As `write`.
        """
        while len(self._layers) > layers:
            for future in self._layers[0]:
                _result(future)
            self._layers.popleft()


def _settle(futures: Iterable[Any]) -> None:
    """Waits until all have ended, with or without an error."""
    for future in futures:
        future.exception()


def _result(future: Any) -> Any:
    try:
        return future.result()
    except (RuntimeError, ValueError) as error:
        system = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(system[1]) if system else errno.EIO
        raise OSError(number, os.strerror(number) if system else first_line(error)) from error


def write_checkpoint(
    folder: pathlib.Path, arrays: Iterable[NewArray], fill: Callable[[Stores], None], metadata: Mapping[str, Any]
) -> None:
    """Writes a checkpoint of one item into a folder, as trainers do; the item gets its name when it is complete.

    Args:
        folder: The folder to write into.
        arrays: Its arrays.
        fill: Writes all of every array.
        metadata: Metadata of the checkpoint.

    Raises:
        OSError: The disk is full, or does not work.
        CheckpointError: Orbax is not installed.
    """
    ocp = import_orbax("orbax.checkpoint")
    tree: dict[str, Any] = {}
    for array in arrays:
        *parents, last = array.path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    handlers = ((NewArray, _handler(ocp, fill)), (jax.Array, ocp.type_handlers.ArrayHandler()))
    registry = ocp.type_handlers.create_type_handler_registry(*handlers)
    item = folder.absolute() / ITEM
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry, **_FORM)) as checkpointer:
        checkpointer.save(item, args=ocp.args.PyTreeSave(tree), custom_metadata=dict(metadata))
    step = json.loads((item / _STEP).read_text())
    write_text(folder / _STEP, json.dumps({**step, "item_handlers": {ITEM: step["item_handlers"]}}))
    (item / _STEP).unlink()


def _handler(ocp: Any, fill: Callable[[Stores], None]) -> Any:
    """Tells Orbax how to save a `NewArray`; it is read as any other array."""

    class Handler(ocp.type_handlers.TypeHandler):
        def typestr(self) -> str:
            return "np.ndarray"

        async def metadata(self, infos: Any) -> Any:
            raise NotImplementedError

        async def deserialize(self, infos: Any, args: Any = None) -> Any:
            raise NotImplementedError

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            tensorstore = import_orbax("tensorstore")
            stores = {}
            for array, info in zip(values, infos, strict=True):
                spec = ocp.type_handlers.get_json_tspec_write(
                    info,
                    use_ocdbt=info.is_ocdbt_checkpoint,
                    global_shape=array.shape,
                    local_shape=array.chunk,
                    dtype=array.dtype,
                    process_index=0,
                )
                stores[array.path] = tensorstore.open(
                    {**spec, "dtype": array.dtype.name}, create=True, context=info.ts_context
                )
            _settle(stores.values())
            with Stores({path: _result(store) for path, store in stores.items()}) as opened:
                fill(opened)
                opened.wait()
            return []

    return Handler()
