"""Reads safetensors leaf by leaf: one file, or a folder of files with an index."""

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Shaped

from portax.errors import CheckpointError
from portax.trainer.lazy_array import LazyArray

INDEX = "model.safetensors.index.json"
_LFS_POINTER = b"version https://git-lfs"
_MOST_HEADER_BYTES = 10**8  # as safetensors itself has it
_SHARD = re.compile(r"-of-(\d+)\.safetensors$")
CODES = {
    np.dtype(dtype): code
    for dtype, code in (
        (np.float64, "F64"),
        (np.float32, "F32"),
        (np.float16, "F16"),
        (jnp.bfloat16, "BF16"),
        (np.int64, "I64"),
        (np.int32, "I32"),
        (np.int16, "I16"),
        (np.int8, "I8"),
        (np.uint8, "U8"),
        (np.uint16, "U16"),
        (np.uint32, "U32"),
        (np.uint64, "U64"),
        (np.bool_, "BOOL"),
        (jnp.float8_e4m3fn, "F8_E4M3"),
        (jnp.float8_e5m2, "F8_E5M2"),
    )
}
_DTYPES = {code: dtype for dtype, code in CODES.items()}


_NOT_NUMPYS = frozenset({np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2)})
"""Dtypes that safetensors reads for torch and not for numpy."""


class _Places:
    """The places of the tensors of one file, for dtypes that safetensors does not read."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    @functools.cached_property
    def _header(self) -> tuple[int, Mapping[str, Any]]:
        with self._path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return 8 + size, json.loads(file.read(size))

    def array(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
        """A tensor, mapped into memory."""
        start, header = self._header
        offset = start + header[name]["data_offsets"][0]
        return np.memmap(self._path, dtype, "r", offset, shape) if np.prod(shape) else np.empty(shape, dtype)


class SafetensorsArray(LazyArray):
    """One tensor of a safetensors file.

    Attributes:
        name: Its name there.
        shape: Its shape.
        dtype: Its dtype.
    """

    def __init__(self, name: str, path: pathlib.Path, file: Any, places: _Places):
        part = file.get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise CheckpointError(f"{path}: {name} is of dtype {part.get_dtype()}, which is no dtype of weights")
        self.name = name
        self.shape = tuple(part.get_shape())
        self.dtype = _DTYPES[part.get_dtype()]
        self._path, self._places = path, places

    @functools.cached_property
    def _part(self) -> Any:
        if self.dtype in _NOT_NUMPYS:
            return self._places.array(self.name, self.dtype, self.shape)
        return _opened(self._path).get_slice(self.name)

    def __getitem__(self, at: Any) -> Shaped[np.ndarray, "..."]:
        """Reads a part.

        Raises:
            CheckpointError: The file is gone or cut short.
        """
        try:
            return np.asarray(self._part[at])
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{self._path}: {self.name} cannot be read ({error})") from error


class SafetensorsReader:
    """The tensors of one safetensors file, or of a folder of them.

    Attributes:
        path: The file or folder.
        form: Words for its format.
        leaves: Every tensor by its name.
        identity: Digest that changes when a file is written again.
    """

    def __init__(self, path: pathlib.Path):
        """Reads the headers; no bytes of any tensor.

        Args:
            path: A `.safetensors` file, or a folder with `model.safetensors.index.json` or one such file.

        Raises:
            CheckpointError: Files are missing, cut short, or not what they should be.
        """
        self.path = str(path)
        files = _files(path)
        self.form = f"safetensors, {len(files)} {'file' if len(files) == 1 else 'files'}"
        self.leaves: dict[str, LazyArray] = {}
        digest = hashlib.sha256(str(path.absolute()).encode())
        for file, named in files.items():
            opened, places = _opened(file), _Places(file)
            found = {name: SafetensorsArray(name, file, opened, places) for name in opened.keys()}  # noqa: SIM118 - no mapping
            if named is not None and {*named} != {*found}:
                odd = sorted({*named} ^ {*found})
                raise CheckpointError(f"{file}: the index and the file differ over {', '.join(odd[:5])}")
            self.leaves |= found
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        self.identity = digest.hexdigest()


def _files(path: pathlib.Path) -> Mapping[pathlib.Path, Collection[str] | None]:
    """Returns the files to read, each with the tensors that the index gives it."""
    if not path.is_dir():
        return {path: None}
    if not (path / INDEX).exists():
        single = sorted(path.glob("*.safetensors"))
        of = _SHARD.search(single[0].name) if len(single) == 1 else None
        if len(single) == 1 and (of is None or int(of[1]) == 1):
            return {single[0]: None}
        found = f"{len(single)} .safetensors files" if of is None else f"one of {int(of[1])} .safetensors files"
        raise CheckpointError(f"{path}: holds {found} and no {INDEX}, which lists them")
    files: dict[pathlib.Path, set[str]] = {}
    for name, file in _weight_map(path / INDEX).items():
        if pathlib.PurePath(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            what = "an index names .safetensors files of its own folder"
            raise CheckpointError(f"{path / INDEX}: {file!r} is no such file's name: {what}")
        files.setdefault(path / file, set()).add(name)
    if not files:
        raise CheckpointError(f"{path / INDEX}: names no tensors")
    _refuse_missing(path, files)
    return files


def _weight_map(index: pathlib.Path) -> Mapping[str, str]:
    try:
        content = json.loads(index.read_text())
    except (OSError, ValueError) as error:
        what = _what_is_wrong(index) or f"cannot be read as JSON ({error})"
        raise CheckpointError(f"{index}: {what}") from error
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index}: holds no weight_map from names of tensors to files")
    return found


def _refuse_missing(folder: pathlib.Path, files: Collection[pathlib.Path]) -> None:
    missing = sorted(file.name for file in files if not file.exists())
    if missing:
        raise CheckpointError(
            f"{folder}: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}: missing, {len(missing)} of "
            f"{len(files)} files that {INDEX} names. Likely cause: the checkpoint was not downloaded to its end"
        )


def _opened(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        what = _what_is_wrong(path) or f"cannot be read as safetensors ({error})"
        raise CheckpointError(f"{path}: {what}") from error


def _what_is_wrong(path: pathlib.Path) -> str | None:
    """Returns the usual reasons why an existing file cannot be read; None for any other reason."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                return "is a Git LFS pointer, a text in place of the file; fetch the file itself: git lfs pull"
            file.seek(0)
            nbytes = path.stat().st_size
            header = int.from_bytes(file.read(8), "little")
            if path.suffix != ".safetensors" or header > _MOST_HEADER_BYTES:
                return None
            whole = 8 + header
            if nbytes >= whole:
                tensors = json.loads(file.read(header))
                whole += max((tensor["data_offsets"][1] for tensor in tensors.values() if "dtype" in tensor), default=0)
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        return None
    if nbytes >= whole:
        return None
    least = "" if nbytes >= 8 + header else "at least "
    return (
        f"is cut short: {nbytes} bytes are there, of {least}{whole}. Likely cause: it was not downloaded or copied to "
        "its end"
    )
