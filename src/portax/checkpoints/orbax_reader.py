"""Reads Orbax checkpoints leaf by leaf: local or in a cloud, zarr or OCDBT, whatever Orbax and tensorstore open."""

import functools
import hashlib
import importlib
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from portax.checkpoints.rechunk import Scratch, Unstacked
from portax.errors import CheckpointError
from portax.trainer.lazy_array import LazyArray, empty

_METADATA = "_METADATA"  # what Orbax writes beside the leaves of every tree
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of what it has not finished
_CLOUDS = {"gs": "gcs", "s3": "s3"}  # portax's extra with what each scheme needs
_USUAL_ITEMS = ("items", "default")  # MaxText's, and what Orbax takes where none is named


class StoredArray(LazyArray):
    """One leaf of an Orbax checkpoint.

    Attributes:
        name: Path of the leaf in the checkpoint.
        shape: Its shape.
        dtype: Its dtype.
        chunk: Shape of its stored chunks; each is read as a whole.
    """

    def __init__(self, name: str, metadata: Any, spec: dict[str, Any], context: Any, scratch: Scratch):
        self.name = name
        self.shape = tuple(metadata.shape)
        self.dtype = np.dtype(metadata.dtype)
        self.chunk = tuple(metadata.storage.chunk_shape if metadata.storage else self.shape)
        self._spec = spec
        self._context = context
        self._scratch = scratch
        self._unstacked: dict[tuple[int, ...], Unstacked] = {}

    def __getitem__(self, at: Any) -> Shaped[np.ndarray, "..."]:
        """Reads a slice. One that is smaller than a stored chunk (a layer of a stack) comes from a temporary copy.

        Raises:
            CheckpointError: Files are missing or cut short, or the disk has no space for the temporary copy.
        """
        at = () if at is ... else at if isinstance(at, tuple) else (at,)
        axes = tuple(axis for axis, where in enumerate(at) if not isinstance(where, slice))
        try:
            if not self._cuts_chunks(at):
                part = self._store[at]
                found = empty(part.shape, self.dtype)
                import_orbax("tensorstore").array(found).write(part).result()
                return found
            part = tuple(where for where in at if isinstance(where, slice))
            return self._layers(axes).read(tuple(at[axis] for axis in axes), part)
        except CheckpointError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self.name}: cannot be read ({first_line(error)}). Likely cause: the checkpoint was not written or "
                "copied to its end, or a file of it is gone or cut short"
            ) from error

    def release(self) -> None:
        """Frees its temporary copy."""
        self._unstacked.clear()

    def _cuts_chunks(self, at: tuple[int | slice, ...]) -> bool:
        """Tells whether another slice would need the rest of a chunk again."""
        for where, n, chunk in zip(at, self.shape, self.chunk, strict=False):
            read = len(range(*where.indices(n))) if isinstance(where, slice) else 1
            if read < min(chunk, n):
                return True
        return False

    @functools.cached_property
    def _store(self) -> Any:
        store = import_orbax("tensorstore").open(self._spec, open=True, read=True, context=self._context).result()
        if (store.shape, store.dtype.numpy_dtype) != (self.shape, self.dtype):
            raise ValueError(f"{store.dtype.numpy_dtype}{list(store.shape)} is stored, not {self.dtype}{self.shape}")
        return store

    def _layers(self, axes: tuple[int, ...]) -> Unstacked:
        if axes not in self._unstacked:
            self._unstacked[axes] = self._scratch.unstack(self._store, self.chunk, self.dtype, axes)
        return self._unstacked[axes]


class OrbaxReader:
    """The leaves of one Orbax checkpoint.

    Attributes:
        path: Folder or URL of its tree.
        form: Words for its format.
        leaves: Every array by its path, with `/` between parts; other values as scalar shapes.
        identity: Digest that changes when the checkpoint is written again.
    """

    def __init__(self, path: str, scratch: Scratch):
        """Reads the metadata; no bytes of any leaf.

        Args:
            path: A folder or URL: of a tree, of a step that holds one, or of a run that holds one step.
            scratch: The place for temporary copies of stacks, layer by layer.

        Raises:
            CheckpointError: There is no complete checkpoint, or Orbax is not installed.
        """
        ocp = import_orbax("orbax.checkpoint")
        folder = _found(path)
        self.path = str(folder)
        try:
            metadata = ocp.PyTreeCheckpointHandler().metadata(folder)
            ocdbt = ocp.type_handlers.is_ocdbt_checkpoint(folder)
            entries = ocp.tree.to_flat_dict(metadata.tree, sep="/")
        except Exception as error:  # whatever broken files make of it
            raise CheckpointError(
                f"{folder}: Orbax cannot read its metadata ({first_line(error)}). Likely cause: the checkpoint was "
                "not written or copied to its end"
            ) from error
        zarr3 = bool(metadata.use_zarr3)
        self.form = f"Orbax, {'zarr3' if zarr3 else 'zarr'}{' in OCDBT' if ocdbt else ''}"
        self.identity = _identity(folder)
        context = ocp.type_handlers.get_ts_context()

        def leaf(name: str, entry: Any) -> LazyArray | jax.ShapeDtypeStruct:
            if not isinstance(entry, ocp.metadata.ArrayMetadata):
                return jax.ShapeDtypeStruct((), getattr(entry, "dtype", None) or np.uint8)
            info = ocp.type_handlers.ParamInfo(
                name=entry.name, parent_dir=folder, use_zarr3=zarr3, is_ocdbt_checkpoint=ocdbt, ts_context=context
            )
            spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=ocdbt)
            return StoredArray(name, entry, spec, context, scratch)

        self.leaves = {name: leaf(name, entry) for name, entry in entries.items()}


def import_orbax(module: str) -> types.ModuleType:
    """Imports Orbax, or a package that comes with it.

    Raises:
        CheckpointError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CheckpointError(
            f"an Orbax checkpoint needs {module}, which is not installed: pip install 'portax[orbax]'"
        ) from error


def _found(path: str) -> Any:
    """Returns the folder of the tree, on disk or in a cloud whose package is installed."""
    epath = import_orbax("etils.epath")
    scheme = path.partition("://")[0] if "://" in path else None
    try:
        return _tree_folder(epath.Path(path))
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path}: {scheme}:// is no place that Orbax reads from; gs:// and s3:// are") from error
    except ImportError as error:
        raise CheckpointError(
            f"{path}: {scheme}:// needs a package that is not installed ({error.name or first_line(error)}): pip "
            f"install 'portax[{_CLOUDS.get(str(scheme), 'orbax')}]'"
        ) from error
    except Exception as error:  # whatever a cloud, or the way to it, makes of it
        raise CheckpointError(f"{path}: cannot be read ({first_line(error)})") from error


def _tree_folder(path: Any) -> Any:
    """Returns the folder of the tree, given the tree, its step, or its run."""
    if _UNFINISHED in str(path):
        raise CheckpointError(f"{path}: Orbax has not finished writing this checkpoint")
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    if (path / _METADATA).exists():
        return path
    children = sorted(child for child in path.iterdir() if child.is_dir() and _UNFINISHED not in child.name)
    items = {child.name: child for child in children if (child / _METADATA).exists()}
    if usual := [items[name] for name in _USUAL_ITEMS if name in items] or (len(items) == 1 and [*items.values()]):
        return usual[0]
    steps = [child for child in children if child.name.rpartition("_")[2].isdigit()]
    if len(steps) == 1 and not items:
        return _tree_folder(steps[0])
    what = "several trees" if items else "several steps" if steps else f"no {_METADATA} file, so no Orbax checkpoint"
    choice = f"; name one: {', '.join(str(child) for child in items.values() or steps)}" if items or steps else ""
    raise CheckpointError(f"{path}: holds {what}{choice}")


def _identity(folder: Any) -> str:
    digest = hashlib.sha256(str(folder).encode())
    for path in _identifying(folder):
        if path.exists():
            digest.update(f"{path.name}{path.stat().mtime}".encode() + path.read_bytes())
    return digest.hexdigest()


def _identifying(folder: Any) -> Iterator[Any]:
    yield folder / _METADATA
    yield folder / "manifest.ocdbt"
    for place in (folder, folder.parent):  # with the time of the commit
        yield place / "_CHECKPOINT_METADATA"


def first_line(error: Exception) -> str:
    """Returns the message of an error, without the traces that tensorstore adds."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
