"""Shardings: of a layer's slice, of results on the source's devices, and the same shards under another name."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from portax.errors import PlanError, Problem
from portax.trainer.param_tree import ParamTree


def check_arrays(tree: ParamTree) -> None:
    """Raises a `PlanError` if any leaf has no values to convert, or if leaves are on different devices."""
    problems = []
    devices: dict[tuple, str] = {}
    for path, leaf in tree.leaves.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            cause = "shapes are enough for plan(), not for convert()"
            problems.append(Problem(tree.root + path, "a shape", "an array", cause))
        elif isinstance(leaf, jax.Array) and leaf.is_deleted():
            cause = "it was donated to another program, or freed, before the conversion"
            problems.append(Problem(tree.root + path, "a deleted array", "a live array", cause))
        elif isinstance(leaf, jax.Array) and leaf.committed:
            devices.setdefault(device_order(leaf.sharding), path)
    if len(devices) > 1:
        found = "; ".join(f"{path} on {[d.id for d in order]}" for order, path in devices.items())
        cause = "part of the state was moved or restored onto other devices than the rest"
        problems.append(Problem("params", found, "all leaves on the same devices, in one order", cause))
    if problems:
        raise PlanError(problems)


@functools.lru_cache(maxsize=4096)
def is_on_host(sharding: Sharding | None) -> bool:
    """Tells whether arrays with this sharding are in the host's memory, where no program can read them."""
    kind = getattr(sharding, "memory_kind", None)
    return kind is not None and kind != _default_memory_kind(next(iter(sharding.device_set)))  # type: ignore[union-attr]


@functools.cache
def _default_memory_kind(device: jax.Device) -> str:
    return device.default_memory().kind


def on_device(sharding: Sharding) -> Sharding:
    """Returns the same sharding in the devices' own memory."""
    kind = _default_memory_kind(next(iter(sharding.device_set)))
    return sharding if sharding.memory_kind in (None, kind) else sharding.with_memory_kind(kind)


def without_scan_axes(sharding: Sharding | None, ndim: int, scan_axis: int, count: int) -> NamedSharding | None:
    """Returns the partitioning of one layer's slice of a leaf; None for a leaf that is not spread over devices.

    Args:
        sharding: The leaf's.
        ndim: The leaf's number of axes.
        scan_axis: First scan axis.
        count: Number of scan axes.
    """
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    axes = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    del axes[scan_axis : scan_axis + count]
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def reachable(source: Sharding | None, targets: tuple[Sharding, ...] | None) -> tuple[Sharding, ...] | None:
    """Returns shardings like the targets on the source's devices; None if no program there can make them.

    With as many devices as the targets have, or a multiple, every shard of a target is whole on some device of the
    source: otherwise JAX moves arrays by way of the host.
    """
    if source is None or targets is None:
        return None
    own = device_order(source)
    if own == device_order(targets[0]):
        return targets
    if len(own) % len(targets[0].device_set) or not all(isinstance(target, NamedSharding) for target in targets):
        return None
    return tuple(_repeated(target, np.array(own)) for target in targets if isinstance(target, NamedSharding))


def _repeated(target: NamedSharding, devices: np.ndarray) -> NamedSharding:
    """Returns the same sharding on other devices, repeated as often as they suffice."""
    shape, names = target.mesh.devices.shape, target.mesh.axis_names
    if len(devices) > target.mesh.size:
        shape, names = (-1, *shape), ("repeated", *names)
    return NamedSharding(Mesh(devices.reshape(shape), names), target.spec)


def spread(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Returns a sharding over all of the mesh, along the largest axis that it divides; else a copy on each device.

    Args:
        shape: Shape of an array.
        mesh: The mesh.
    """
    cut = max((i for i, size in enumerate(shape) if size % mesh.size == 0), key=lambda i: shape[i], default=None)
    spec = PartitionSpec() if cut is None or mesh.size == 1 else PartitionSpec(*[None] * cut, mesh.axis_names)
    return NamedSharding(mesh, spec)


@functools.lru_cache
def _auto(mesh: Mesh) -> Mesh:
    """Returns the same mesh with automatic axes: constraints and packing need no axis types."""
    return Mesh(mesh.devices, mesh.axis_names)


@functools.lru_cache(maxsize=4096)
def automatic(sharding: Sharding) -> Sharding:
    """Returns the same sharding with automatic axes."""
    mesh = mesh_of(sharding)
    if mesh is None or mesh == _auto(mesh) or not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(_auto(mesh), sharding.spec, memory_kind=sharding.memory_kind)


def mesh_of(sharding: Sharding | None) -> Mesh | None:
    """Returns the mesh of a sharding that has one."""
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def automatic_axes(leaf: Any) -> Any:
    """Returns an array, or a shape, with automatic axes; copies nothing."""
    if (own := getattr(leaf, "sharding", None)) is None or (sharding := automatic(own)) == own:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return on_sharding(leaf, sharding)


def on_sharding(leaf: jax.Array, sharding: Sharding) -> jax.Array:
    """Returns the same shards under a sharding with another spelling or other axis types; copies nothing."""
    if leaf.sharding == sharding:
        return leaf
    shards = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards, dtype=leaf.dtype)


def device_order(sharding: Sharding) -> tuple[jax.Device, ...]:
    """Returns the devices of a sharding, in the order in which programs number them."""
    if isinstance(sharding, NamedSharding):
        return tuple(sharding.mesh.devices.flat)
    return tuple(sorted(sharding.device_set, key=lambda device: device.id))


def replicated(sharding: Sharding) -> Sharding:
    """Returns a sharding with a copy on each of a sharding's devices."""
    if isinstance(sharding, SingleDeviceSharding):
        return sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else Mesh(np.array(device_order(sharding)), ("all",))
    return NamedSharding(mesh, PartitionSpec())
