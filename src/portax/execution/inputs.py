"""What a program is called with: the leaves of one layer, sliced if they are in host memory, read if they are not."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from portax.trainer.lazy_array import LazyArray
from portax.trainer.scan import Kind, Layer

_Index: TypeAlias = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class Operands:
    """The arguments of a program that converts one layer.

    Attributes:
        kind: What the program is made for; without scan axes where the leaves have been sliced.
        arrays: The leaves, in the order of the kind's paths.
        position: Index of the layer on each remaining scan axis.
    """

    kind: Kind
    arrays: tuple[Any, ...]
    position: tuple[int, ...]


class Reader:
    """Prepares operands. What it reads for one part of a layer it keeps for the layer's other parts, and no longer."""

    def __init__(self, scan_axis: int):
        """Makes a reader.

        Args:
            scan_axis: First scan axis of stacked leaves.
        """
        self._scan_axis = scan_axis
        self._layer: Layer | None = None
        self._held: dict[tuple[str, Mesh | None], Any] = {}

    def operands(
        self, kind: Kind, layer: Layer, *, needs: Callable[[str], bool], last: bool, mesh: Mesh | None, shapes: bool
    ) -> Operands:
        """The operands for a part of one layer.

        Args:
            kind: The layer's kind.
            layer: The layer.
            needs: Whether this part is made of the leaf of this path; no other leaf is read.
            last: Whether no other part of the layer comes after this one.
            mesh: Where the program runs: each device then reads its share alone. None: on the default device.
            shapes: Whether shapes in place of what would be read are enough.
        """
        arrays = tuple(layer.leaves[path] for path in kind.paths)
        if not any(isinstance(leaf, LazyArray) for leaf in arrays):
            return self._in_memory(kind, arrays, layer.position)
        if layer is not self._layer:
            self._layer, self._held = layer, {}
        sliced = all(isinstance(leaf, LazyArray | np.ndarray) for leaf in arrays)
        at = self._at(layer.position) if sliced else ()

        def own(path: str, leaf: Any) -> Any:
            if not isinstance(leaf, LazyArray):
                return leaf[at] if at else leaf
            if not needs(path):
                return _unread(leaf, at)
            if shapes:
                return _abstract(leaf, at, mesh)
            if (path, mesh) not in self._held:
                self._held[path, mesh] = _read(leaf, at, mesh)
            return self._held[path, mesh]

        read = tuple(own(path, leaf) for path, leaf in zip(kind.paths, arrays, strict=True))
        if last:
            self._layer, self._held = None, {}
        return Operands(dataclasses.replace(kind, scan=()), read, ()) if at else Operands(kind, read, layer.position)

    def _in_memory(self, kind: Kind, arrays: tuple[Any, ...], position: tuple[int, ...]) -> Operands:
        """Stacks in host memory are sliced there, so that one layer at a time is moved."""
        if position and all(isinstance(leaf, np.ndarray) for leaf in arrays):
            at = self._at(position)
            return Operands(dataclasses.replace(kind, scan=()), tuple(leaf[at] for leaf in arrays), ())
        return Operands(kind, arrays, position)

    def _at(self, position: tuple[int, ...]) -> _Index:
        return (slice(None),) * self._scan_axis + position if position else ()


def _rest(leaf: LazyArray, at: _Index) -> tuple[int, ...]:
    """Shape of a leaf's part: its axes without those that a number picks from."""
    return tuple(size for i, size in enumerate(leaf.shape) if i >= len(at) or isinstance(at[i], slice))


def _unread(leaf: LazyArray, at: _Index) -> np.ndarray:
    """Stands for a leaf that the program drops; it is of the right shape and takes no memory."""
    return np.broadcast_to(np.zeros((), leaf.dtype), _rest(leaf, at))


def _abstract(leaf: LazyArray, at: _Index, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    shape = _rest(leaf, at)
    sharding = jnp.zeros(()).sharding if mesh is None else spread(shape, mesh)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def _read(leaf: LazyArray, at: _Index, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jax.device_put(leaf[at or ...])
    pieces: dict[Any, np.ndarray] = {}

    def piece(wanted: tuple[slice, ...] | None) -> np.ndarray:
        parts = iter(wanted or ())
        whole = tuple(next(parts) if isinstance(where, slice) else where for where in at) + tuple(parts)
        key = tuple((where.start, where.stop) if isinstance(where, slice) else where for where in whole)
        if key not in pieces:
            pieces[key] = leaf[whole]
        return pieces[key]

    shape = _rest(leaf, at)
    return jax.make_array_from_callback(shape, spread(shape, mesh), piece, dtype=leaf.dtype)


def spread(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Cut over all of the mesh along the largest axis that it divides; else a copy on each device.

    Args:
        shape: Shape of an array.
        mesh: The mesh.
    """
    cut = max((i for i, size in enumerate(shape) if size % mesh.size == 0), key=lambda i: shape[i], default=None)
    spec = PartitionSpec() if cut is None or mesh.size == 1 else PartitionSpec(*[None] * cut, mesh.axis_names)
    return NamedSharding(mesh, spec)
