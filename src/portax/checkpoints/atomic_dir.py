"""Folders that get their name when they are complete: exports and imports grow in one."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from portax._text.tables import size
from portax.checkpoints.file_io import PART, is_full, sync_folder, write_text
from portax.errors import CheckpointError

_MANIFEST = "portax-export.json"
_LOCK = "portax-export.lock"


def unfinished_folder(folder: str | os.PathLike) -> pathlib.Path:
    """Returns the folder in which an export grows."""
    folder = pathlib.Path(folder)
    return folder.with_name(f".{folder.name}.unfinished")


def refuse_existing(folder: pathlib.Path) -> None:
    """Raises a `CheckpointError` if something of this name exists."""
    if folder.exists() or folder.is_symlink():
        raise CheckpointError(f"{folder}: exists; nothing was written")


def free_space(path: pathlib.Path) -> int:
    """Returns the free bytes at a path, which need not exist."""
    return shutil.disk_usage(existing(path)).free


def existing(path: pathlib.Path) -> pathlib.Path:
    """Returns the nearest parent folder that exists."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def check_space(folder: pathlib.Path, need: int) -> None:
    """Raises a `CheckpointError` unless a folder has space for so many bytes."""
    if need > (free := shutil.disk_usage(folder).free):
        raise CheckpointError(f"{folder.parent}: {size(free)} are free, and {size(need)} would be written")


@contextlib.contextmanager
def atomic_dir(folder: pathlib.Path, manifest: Mapping[str, Any] | None) -> Iterator[pathlib.Path]:
    """Makes a folder that gets its name when the block ends without an error.

    Files of an interrupted export with the same manifest are kept; those of any other are removed, never mixed.

    Args:
        folder: The final name.
        manifest: An export resumes an earlier one with an equal manifest; None if it cannot be resumed, and its files
            are removed if it fails.

    Yields:
        The unfinished folder.

    Raises:
        CheckpointError: The name is taken, another export is running there, or the disk is full or fails.
    """
    unfinished = unfinished_folder(folder)
    with _reported(folder, unfinished):
        if unfinished.exists() and not (unfinished / _LOCK).exists() and any(unfinished.iterdir()):
            raise CheckpointError(f"{unfinished}: is in the way, and was not made by an export; move it away")
        unfinished.mkdir(parents=True, exist_ok=True)
        with (unfinished / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(f"{unfinished}: another export is writing there") from error
            _clean(unfinished, None if manifest is None else json.dumps(manifest, indent=1))
            try:
                yield unfinished
            except BaseException:
                if manifest is None:
                    _remove(unfinished)
                raise
            refuse_existing(folder)
            sync_folder(unfinished)
            unfinished.rename(folder)
            sync_folder(folder.parent)
            (folder / _MANIFEST).unlink(missing_ok=True)  # not before: what has no lock was not made by an export
            (folder / _LOCK).unlink()


def _remove(folder: pathlib.Path) -> None:
    with contextlib.suppress(OSError):  # the error that led here is the one to tell of
        _clean(folder, None)
        (folder / _LOCK).unlink()
        folder.rmdir()


def _clean(folder: pathlib.Path, manifest: str | None) -> None:
    known = folder / _MANIFEST
    same = manifest is not None and known.exists() and known.read_text() == manifest
    for path in folder.iterdir():
        if path.name != _LOCK and not (same and path.suffix != PART):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if manifest is not None and not same:
        write_text(known, manifest)


@contextlib.contextmanager
def _reported(folder: pathlib.Path, unfinished: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = "the disk is full" if is_full(error) else f"cannot be written ({error})"
        kept = (
            f"; files that are whole are kept in {unfinished}, for the same export to go on"
            if unfinished.exists()
            else ""
        )
        raise CheckpointError(f"{folder}: {what}{kept}") from error
