"""What a user may name as weights: a checkpoint, or a tree that was dumped without its values."""

import os
from collections.abc import Mapping
from typing import Any

from portax.checkpoints.reading import open_checkpoint
from portax.testing.golden import Tree


def open_tree(
    path: str | os.PathLike, *, scratch: str | os.PathLike | None = None
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Opens a trainer's tree.

    Args:
        path: What `open_checkpoint` takes, or the `.json` of a dumped tree (configuration and shapes), which is filled
            with probe values.
        scratch: As for `open_checkpoint`.

    Returns:
        The parameters by path, and the configuration if the file has one.

    Raises:
        CheckpointError: There is no checkpoint, or it cannot be read.
        GoldenError: The dumped tree cannot be read.
    """
    if os.fspath(path).endswith(".json"):
        tree = Tree.load(path)
        return tree.fill(), tree.config
    return open_checkpoint(path, scratch=scratch), None
