"""Weights in files: trainer trees in, safetensors out."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from portax.errors import GoldenError
from portax.golden import Tree


def read_tree(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], Mapping[str, Any] | None]:
    """Reads a trainer's tree.

    Args:
        path: A `.safetensors` file of the parameters by path, or the `.json` of a dumped tree (configuration and
            shapes), which is filled with probe values.

    Returns:
        The parameters by path, and the configuration if the file has one.

    Raises:
        GoldenError: The file cannot be read as either.
    """
    path = pathlib.Path(path)
    if path.suffix == ".json":
        tree = Tree.load(path)
        return tree.fill(), tree.config
    if path.suffix != ".safetensors":
        raise GoldenError(f"{path}: a tree is a .safetensors file or a dumped tree's .json")
    try:
        return safetensors.numpy.load_file(path), None
    except (OSError, safetensors.SafetensorError) as error:
        raise GoldenError(f"{path}: cannot be read as safetensors ({error})") from error


def write_weights(path: str | os.PathLike, weights: Mapping[str, Any]) -> None:
    """Writes weights to one safetensors file, under a temporary name until it is whole.

    Args:
        path: The file; must not exist.
        weights: Arrays by name.

    Raises:
        GoldenError: The file exists or cannot be written.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise GoldenError(f"{path}: exists; nothing was written")
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        safetensors.numpy.save_file({name: np.asarray(leaf) for name, leaf in weights.items()}, unfinished)
        unfinished.rename(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise GoldenError(f"{path}: cannot be written ({error})") from error
    finally:
        unfinished.unlink(missing_ok=True)
