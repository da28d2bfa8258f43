"""Weights that a user can name: a checkpoint, or a dumped tree without values."""

import os
from collections.abc import Mapping
from typing import Any

from portax.checkpoints.reading import Checkpoint, open_checkpoint
from portax.testing.golden import Tree


def open_values(path: str | os.PathLike, *, scratch: str | os.PathLike | None = None) -> tuple[Checkpoint, None]:
    """Opens weights for their values.

    Args:
        path: As for `open_checkpoint`.
        scratch: As for `open_checkpoint`.

    Returns:
        The parameters by path, and no configuration: a checkpoint has none.

    Raises:
        CheckpointError: There is no checkpoint, it cannot be read, or it is a dumped tree, which has no values.
    """
    return open_checkpoint(path, scratch=scratch), None


def open_shapes(
    path: str | os.PathLike, *, scratch: str | os.PathLike | None = None
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Opens weights for their names, shapes and dtypes.

    Args:
        path: As for `open_checkpoint`, or the `.json` of a dumped tree (configuration and shapes).
        scratch: As for `open_checkpoint`.

    Returns:
        The parameters, or their shapes, by path; and the configuration if the file has one.

    Raises:
        CheckpointError: There is no checkpoint, or it cannot be read.
        GoldenError: The dumped tree cannot be read.
    """
    if not os.fspath(path).endswith(".json"):
        return open_values(path, scratch=scratch)
    tree = Tree.load(path)
    return tree.shapes, tree.config


def open_filled(
    path: str | os.PathLike, *, scratch: str | os.PathLike | None = None
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Opens weights for a check of portax itself: a dumped tree is filled with probe values.

    Arguments, results and errors are those of `open_shapes`.
    """
    if not os.fspath(path).endswith(".json"):
        return open_values(path, scratch=scratch)
    tree = Tree.load(path)
    return tree.fill(), tree.config
