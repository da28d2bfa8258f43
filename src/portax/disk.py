"""Writing to disk so that what has its name is whole."""

import errno
import os
import pathlib

import numpy as np
from jaxtyping import Shaped

PART = ".part"
"""Ends the name of a file that is being written."""
_ZEROS = 2**24


def write_at(descriptor: int, values: Shaped[np.ndarray, "..."], offset: int) -> None:
    """Writes all of a contiguous array, in C order, at an offset in bytes."""
    view = values.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def reserve(descriptor: int, offset: int, nbytes: int) -> None:
    """Has the disk set space aside: what is written there through a mapping cannot find it full, which is fatal.

    Raises:
        OSError: There is no space.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, offset, nbytes)
        return
    zeros = np.zeros(min(nbytes, _ZEROS), np.uint8)
    for start in range(0, nbytes, _ZEROS):
        write_at(descriptor, zeros[: nbytes - start], offset + start)


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
