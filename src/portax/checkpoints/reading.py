"""`Checkpoint`: a trainer's parameters on disk, planned from their metadata and read as a conversion needs them."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from portax.checkpoints.orbax_reader import OrbaxReader
from portax.checkpoints.rechunk import Scratch
from portax.checkpoints.safetensors_reader import INDEX, SafetensorsReader
from portax.errors import CheckpointError
from portax.trainer.lazy_array import LazyArray
from portax.trainer.train_state import select

_PICKLED = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_MODEL = "model/"  # what a full train state of NNX has in front of its parameters


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, LazyArray]):
    """The parameters of a checkpoint, by path. Converters take it wherever they take a trainer's tree.

    Attributes:
        path: Its folder, file or URL.
        form: Words for its format.
        root: Prefix of every path that is not a usual root: `model/` in a full train state of NNX.
        leaves: The parameters by path, e.g. `base/decoder/decoder_norm/scale`.
        others: Values that are not parameters, by path: optimizer state, step, random state.
        identity: Digest that changes when the checkpoint is written again.

    Example:
        >>> checkpoint = portax.open_checkpoint("checkpoint")
        >>> checkpoint["decoder/decoder_norm/scale"].shape
        (64,)
        >>> weights = converter.convert(checkpoint)
    """

    path: str
    form: str
    root: str
    leaves: Mapping[str, LazyArray]
    others: Mapping[str, Any]
    identity: str

    def __getitem__(self, path: str) -> LazyArray:
        """Returns one parameter."""
        return self.leaves[path]

    def __iter__(self) -> Iterator[str]:
        """Iterates over the paths of all parameters."""
        return iter(self.leaves)

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self.leaves)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, in memory."""
        return sum(leaf.nbytes for leaf in self.leaves.values())


def open_checkpoint(path: str | os.PathLike, *, scratch: str | os.PathLike | None = None) -> Checkpoint:
    """Opens a checkpoint; reads its metadata, and no weights.

    Args:
        path: An Orbax checkpoint (its tree, its step, or a run with one step; a folder or a URL that Orbax takes), or
            safetensors of a trainer's parameters by path (a file, or a folder with an index).
        scratch: Folder for temporary copies of leaves that are read in parts smaller than their chunks: stacks whose
            chunks hold several layers, a large vocabulary, leaves that a mesh cuts finer than Orbax did. None for the
            system's. A copy is made when the first such part of a leaf is read.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: There is no checkpoint, or it is incomplete, of an unknown format, or without parameters.

    Example:
        >>> plan = converter.plan(portax.open_checkpoint("checkpoint"))  # or "gs://run/checkpoints/1000/items"
    """
    files = _open(os.fspath(path), Scratch(scratch))
    arrays = {tuple(path.split("/")): leaf for path, leaf in files.leaves.items() if isinstance(leaf, LazyArray)}
    selection, twice = select(arrays.items())
    if twice:
        raise CheckpointError(f"{files.path}: holds two leaves of the path {twice[0]}, one of them in a box (value)")
    if not selection.params:
        raise CheckpointError(
            f"{files.path}: holds no parameters, only {', '.join(sorted(files.leaves)[:5]) or 'nothing'}"
        )
    root = _MODEL if selection.root.startswith(_MODEL) else ""
    leaves = {selection.root.removeprefix(root) + path: leaf for path, leaf in selection.params.items()}
    no_arrays = {path: leaf for path, leaf in files.leaves.items() if not isinstance(leaf, LazyArray)}
    others = {**selection.ignored, **no_arrays}
    return Checkpoint(files.path, files.form, root, {**leaves, **selection.strangers}, others, files.identity)


def _open(path: str, scratch: Scratch) -> OrbaxReader | SafetensorsReader:
    if "://" in path:
        return OrbaxReader(path, scratch)
    local = pathlib.Path(path)
    if not local.exists():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    inside = [*local.iterdir()] if local.is_dir() else [local]
    if any(file.suffix == ".safetensors" or file.name == INDEX for file in inside):
        return SafetensorsReader(local)
    if pickled := [file.name for file in inside if file.suffix in _PICKLED]:
        raise CheckpointError(
            f"{path}: {pickled[0]} is a pickle, which can run code when it is read, and is refused; save the weights "
            "as safetensors"
        )
    if local.suffix == ".json" and _is_dumped_tree(local):
        raise CheckpointError(
            f"{path}: is a dumped tree: names, shapes and dtypes of a model, and no values. What is made up for them "
            "may check portax (plan, verify, doctor, demo), and must not pass for a model's weights"
        )
    if local.is_file():
        raise CheckpointError(f"{path}: is neither an Orbax checkpoint's folder nor a .safetensors file")
    return OrbaxReader(str(local.absolute()), scratch)


def _is_dumped_tree(path: pathlib.Path) -> bool:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"config", "params"} <= {*content}
