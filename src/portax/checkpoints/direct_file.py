"""`DirectFile`: large arrays to disk, around the page cache.

A write through the page cache is a copy into memory that the system must find first, and the disk gets it all the
same. For a checkpoint that copy can take longer than the disk does, and it pushes out what others keep there.
"""

import contextlib
import errno
import mmap
import os
import pathlib

import numpy as np
from jaxtyping import Shaped

from portax.checkpoints.file_io import write_at

_BLOCK = 4096  # bytes; file systems want direct writes to begin and end at multiples of this, in memory too
_STAGING_BYTES = 2**22  # written at a time; enough for a disk, and it stays in a core's reach


class DirectFile:
    """A file that is written in blocks, directly; what is left at the ends of an array goes through the page cache.

    Where the file system cannot do that, everything goes through the page cache.
    """

    def __init__(self, path: pathlib.Path):
        """Makes the file, or empties it.

        Args:
            path: Its name.
        """
        self._cached = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o666)
        self._direct = _open_direct(path)
        self._staging = np.frombuffer(mmap.mmap(-1, _STAGING_BYTES), np.uint8)  # at the start of a page

    def write(self, values: Shaped[np.ndarray, "..."], offset: int) -> None:
        """Writes all of a contiguous array, in C order.

        Args:
            values: The array.
            offset: Where in the file, in bytes.

        Raises:
            OSError: The disk is full, or does not work.
        """
        raw = values.reshape(-1).view(np.uint8)
        first = min(-offset % _BLOCK, len(raw))
        last = first + (len(raw) - first) // _BLOCK * _BLOCK
        for start, stop in ((0, first), (last, len(raw))):
            write_at(self._cached, raw[start:stop], offset + start)
        for start in range(first, last, _STAGING_BYTES):
            self._write_blocks(raw[start : min(start + _STAGING_BYTES, last)], offset + start)

    def _write_blocks(self, raw: Shaped[np.ndarray, "bytes"], offset: int) -> None:
        if self._direct is not None:
            staged = self._staging[: len(raw)]
            np.copyto(staged, raw)
            try:
                return write_at(self._direct, staged, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            os.close(self._direct)
            self._direct = None
        return write_at(self._cached, raw, offset)

    def sync(self) -> None:
        """Waits until all of it is on disk."""
        os.fsync(self._cached)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)


def _open_direct(path: pathlib.Path) -> int | None:
    if hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):
            return os.open(path, os.O_WRONLY | os.O_DIRECT)
    return None
