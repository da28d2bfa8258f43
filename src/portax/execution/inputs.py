"""Arguments of programs: the leaves of one layer, sliced if they are in host memory, read if they are on disk."""

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from portax.errors import SyncError
from portax.execution.schedule import ProgramCall
from portax.execution.sharding import (
    automatic,
    automatic_axes,
    is_on_host,
    on_device,
    spread,
    without_scan_axes,
)
from portax.planning.jax_context import fetch
from portax.trainer.lazy_array import LazyArray
from portax.trainer.param_tree import ParamTree

_Index: TypeAlias = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class Input:
    """One argument of a program, as shapes.

    Attributes:
        shape: Shape and dtype, and sharding if it is on devices.
        is_slice: True if it is already one layer's slice, and not the stack.
        own: The partitioning of the layer's own slice; None for a leaf that is not spread over devices.
    """

    shape: jax.ShapeDtypeStruct
    is_slice: bool
    own: NamedSharding | None


class Inputs:
    """The arguments of program calls, from one tree.

    Arrays that are read from disk or the host for one part of a layer are kept for the layer's other parts only.
    """

    def __init__(self, tree: ParamTree, mesh: Mesh | None):
        """Makes inputs of a tree.

        Args:
            tree: The trainer's tree.
            mesh: The mesh that leaves on disk are read to, each device only its share; None for the default device.
        """
        self._tree = tree
        self._mesh = mesh
        self._held: dict[str, Any] = {}
        self._layer: Any = None

    def shapes(self, call: ProgramCall) -> tuple[Input, ...]:
        """Returns the arguments of a call, as shapes, in the order of what it needs."""
        return tuple(self._shape(call, *read) for read in call.reads)

    def arrays(self, call: ProgramCall) -> tuple[Any, ...]:
        """Returns the arguments of a call, in the order of what it needs.

        Raises:
            SyncError: A leaf was freed or donated since the conversion began.
        """
        if call.layer is not self._layer:
            self._layer, self._held = call.layer, {}
        found = tuple(self._array(call, *read) for read in call.reads)
        if call.last:
            self._layer, self._held = None, {}
        return found

    def _shape(self, call: ProgramCall, path: str, whole: str, at: _Index) -> Input:
        leaf = self._tree.leaves[whole]
        sharding = getattr(leaf, "sharding", None)
        own = without_scan_axes(sharding, len(leaf.shape), call.group.scan_axis(path), len(call.group.scan))
        own = None if own is None else automatic(on_device(own))  # type: ignore[assignment]
        if isinstance(leaf, LazyArray):
            shape = _rest(tuple(leaf.shape), at)
            on = spread(shape, self._mesh) if self._mesh is not None else _default_sharding()
            cut = on if isinstance(on, NamedSharding) and on.mesh.size > 1 else None
            return Input(jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=on), True, cut)
        if isinstance(leaf, np.ndarray | np.generic):
            return Input(jax.ShapeDtypeStruct(_rest(leaf.shape, at), leaf.dtype), True, None)
        if is_on_host(sharding):
            shape = _rest(tuple(leaf.shape), at)
            on = own or _single(sharding)
            return Input(jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=on), True, own)
        if sharding is not None:
            sharding = automatic(sharding)
        return Input(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), not at, own)

    def _array(self, call: ProgramCall, path: str, whole: str, at: _Index) -> Any:
        leaf = self._tree.leaves[whole]
        if isinstance(leaf, np.ndarray | np.generic):
            return leaf[at] if at else leaf  # type: ignore[index]
        if isinstance(leaf, LazyArray):
            if path not in self._held:
                with jax.transfer_guard_host_to_device("allow"):
                    self._held[path] = _read(leaf, at, self._mesh)
            return self._held[path]
        if leaf.is_deleted():
            raise SyncError(
                f"{self._tree.root + whole}: found a deleted array; expected a live one until the last bucket is made. "
                "Likely cause: it was freed, or donated to the next training step, between two buckets: take all of "
                "them before that"
            )
        if is_on_host(leaf.sharding):
            if path not in self._held:
                with jax.transfer_guard_host_to_device("allow"):
                    self._held[path] = _from_host(leaf, at, self._shape(call, path, whole, at).shape.sharding)
            return self._held[path]
        return automatic_axes(leaf)


def source_sharding(inputs: tuple[Input, ...]) -> Sharding | None:
    """Returns the sharding of the first argument that is on devices; None if all are in host memory."""
    return next((each.shape.sharding for each in inputs if each.shape.sharding is not None), None)


def tree_sharding(tree: ParamTree) -> Sharding | None:
    """Returns the sharding of the first leaf that is on devices; None for a tree in host memory or on disk."""
    shardings = (getattr(leaf, "sharding", None) for leaf in tree.leaves.values())
    return next((sharding for sharding in shardings if sharding is not None), None)


def _default_sharding() -> Sharding:
    return SingleDeviceSharding(jax.local_devices()[0])


def _single(sharding: Any) -> Sharding:
    """Returns the devices' own memory, for a leaf that is on one device."""
    return (
        SingleDeviceSharding(next(iter(sharding.device_set))) if len(sharding.device_set) == 1 else on_device(sharding)
    )


def _rest(shape: tuple[int, ...], at: _Index) -> tuple[int, ...]:
    """Returns the shape of a leaf's part: without the axes at which a number picks one element."""
    return tuple(size for i, size in enumerate(shape) if i >= len(at) or isinstance(at[i], slice))


def _within(at: _Index, part: tuple[slice, ...]) -> tuple[int | slice, ...]:
    """Returns the index in a stack of a part of one layer's slice."""
    parts = iter(part)
    return tuple(next(parts) if isinstance(where, slice) else where for where in at) + tuple(parts)


def allowing_host(arrays: tuple[Any, ...]) -> AbstractContextManager:
    """Allows transfers from the host, whatever a trainer forbids, if some of a program's arguments are there."""
    there = any(isinstance(array, np.ndarray | np.generic) for array in arrays)
    return jax.transfer_guard_host_to_device("allow") if there else nullcontext()


def _read(leaf: LazyArray, at: _Index, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jax.device_put(leaf[at or ...])
    pieces: dict[Any, np.ndarray] = {}

    def piece(wanted: tuple[slice, ...] | None) -> np.ndarray:
        whole = _within(at, wanted or ())
        key = tuple((where.start, where.stop) if isinstance(where, slice) else where for where in whole)
        if key not in pieces:
            pieces[key] = leaf[whole]
        return pieces[key]

    shape = _rest(leaf.shape, at)
    return jax.make_array_from_callback(shape, spread(shape, mesh), piece, dtype=leaf.dtype)


def _from_host(leaf: jax.Array, at: _Index, sharding: Sharding) -> jax.Array:
    """Copies one layer's slice of a leaf from host memory to its devices; shard by shard, if no scan axis is cut."""
    shape = _rest(leaf.shape, at)
    shards: Mapping[jax.Device, Any] = {shard.device: shard for shard in leaf.addressable_shards}
    scanned = [axis for axis, where in enumerate(at) if not isinstance(where, slice)]
    whole = all(
        shard.index[axis] in (slice(None), slice(0, leaf.shape[axis]), slice(None, None, None))
        for shard in shards.values()
        for axis in scanned
    )
    if not whole:
        return jax.device_put(fetch(leaf)[at], sharding)
    parts = [jax.device_put(fetch(shards[device].data)[at or ...], device) for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts, dtype=leaf.dtype)
