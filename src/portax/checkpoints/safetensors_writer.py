"""`ShardWriter`: writes tensors into shards, in the order in which they are made."""

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import numpy as np

from portax.checkpoints.file_io import PART, DirectFile
from portax.checkpoints.safetensors_shards import Shard

Part: TypeAlias = tuple[str, int]  # a tensor's name, and the byte of it that this part begins at


class ShardWriter:
    """Writes tensors to their positions in shards. A file gets its own name when all of its tensors are written.

    A context manager: files that are incomplete when it ends are removed.
    """

    def __init__(self, folder: pathlib.Path, shards: Iterable[Shard], report: Callable[[int], None]):
        """Makes a writer.

        Args:
            folder: Folder of the files.
            shards: The files.
            report: Called with the bytes of every part that has been written.
        """
        self._folder = folder
        self._of = {name: shard for shard in shards for name in shard.offsets}
        self._missing = {shard.name: shard.tensor_bytes for shard in self._of.values()}
        self._open: dict[str, DirectFile] = {}
        self._report = report

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for name, file in self._open.items():
            file.close()
            self._part(name).unlink()

    def write(self, parts: Mapping[Part, np.ndarray]) -> None:
        """Writes tensors, or parts of them; all parts of a tensor together hold each of its bytes once.

        Args:
            parts: Values by the tensor's name and their position in it, in bytes.

        Raises:
            OSError: The disk is full, or does not work.
        """
        for (name, start), values in parts.items():
            shard = self._of[name]
            self._file(shard).write(np.ascontiguousarray(values), shard.offsets[name] + start)
            self._report(values.nbytes)
            self._missing[shard.name] -= values.nbytes
            if not self._missing[shard.name]:
                self._finish(shard)

    def _part(self, name: str) -> pathlib.Path:
        return self._folder / f"{name}{PART}"

    def _file(self, shard: Shard) -> DirectFile:
        if shard.name not in self._open:
            self._open[shard.name] = DirectFile(self._part(shard.name))
            self._open[shard.name].write(np.frombuffer(shard.header, np.uint8), 0)
        return self._open[shard.name]

    def _finish(self, shard: Shard) -> None:
        file = self._open.pop(shard.name)
        file.sync()
        file.close()
        self._part(shard.name).rename(self._folder / shard.name)
