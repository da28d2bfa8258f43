"""Files on disk: a file gets its name when it is complete; large arrays bypass the page cache, in another thread."""

import concurrent.futures
import contextlib
import errno
import mmap
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
from jaxtyping import Shaped

PART = ".part"
"""Ends the name of a file that is being written."""

_BLOCK = 4096  # bytes; file systems want direct writes to begin and end at multiples of this, in memory too
_STAGING_BYTES = 2**22  # written at a time; enough for a disk, and it stays in a core's reach

_Item = TypeVar("_Item")


def write_at(descriptor: int, values: Shaped[np.ndarray, "..."], offset: int) -> None:
    """Writes all of a contiguous array, in C order, at an offset in bytes."""
    view = values.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def read_at(descriptor: int, into: Shaped[np.ndarray, "..."], offset: int) -> None:
    """Fills a contiguous array, in C order, from an offset in bytes.

    Raises:
        OSError: The file ends before.
    """
    view = into.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        if not (count := os.preadv(descriptor, [view[done:]], offset + done)):
            raise OSError(errno.EIO, "the file is shorter than what was written to it")
        done += count


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file that exists either complete or not at all."""
    part = path.with_name(path.name + PART)
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def sync_folder(folder: pathlib.Path) -> None:
    """Waits until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Tells whether an error means that there is no space or no quota left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def consume_behind(items: Iterable[_Item], consume: Callable[[_Item], None]) -> None:
    """Calls a function with each item, in a thread of its own, while the next item is made.

    Args:
        items: The items; one is made while the one before it is consumed.
        consume: A function, called once at a time and in order. After an error, no further item is consumed.
    """
    last: concurrent.futures.Future[None] | None = None
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        for item in items:
            if last is not None:
                last.result()
            last = thread.submit(consume, item)
            del item  # the next one is made without it
    if last is not None:
        last.result()


class DirectFile:
    """A file that is written directly, in blocks; the uneven ends of an array go through the page cache.

    A write through the page cache first copies the array into memory that the system must find. For a checkpoint that
    copy can take longer than the disk does, and it evicts the pages of others. If the file system does not support
    direct writes, everything goes through the page cache.
    """

    def __init__(self, path: pathlib.Path):
        """Creates the file, or empties it.

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
            offset: Position in the file, in bytes.

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
        """Waits until the whole file is on disk."""
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
