"""Writing to disk so that what has its name is whole."""

import errno
import os
import pathlib

import numpy as np
from jaxtyping import Shaped

PART = ".part"
"""Ends the name of a file that is being written."""


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
    """Writes a file that is there as a whole or not at all."""
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
    """Whether there was no space left, or no quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
