"""Transfers from the trainer's devices to an engine's buffers, within one set of processes or between two."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Shaped

from portax._text.names import numbers
from portax.errors import SyncError
from portax.execution.executor import Arrays
from portax.planning.jax_context import fetch
from portax.planning.plan import Plan
from portax.weights import bits

Shapes: TypeAlias = tuple[jax.ShapeDtypeStruct, ...]
Devices: TypeAlias = tuple[jax.Device, ...]
Marks: TypeAlias = list[tuple[int, int] | None]

_ALL = "all"


class LocalTransfer:
    """Trainer and engine are on the same processes, where `device_put` reaches from any devices to any others.

    Attributes:
        sends: True: this process has devices of the trainer.
        receives: True: it has devices of the engine.
    """

    sends = receives = True

    def compile(self, shapes: Shapes) -> None:
        """Does nothing: `device_put` needs no program."""

    def send(self, arrays: Arrays, donors: Arrays | None, shapes: Shapes) -> Arrays:
        """As `CrossProcessTransfer.send`."""
        with jax.transfer_guard_device_to_device("allow"):  # to the engine's devices
            arrived = jax.device_put(arrays, tuple(shape.sharding for shape in shapes))
        return arrived if donors is None else _settled(arrived, donors)

    def shared(self, marks: Marks, count: int) -> Marks:
        """As `CrossProcessTransfer.shared`: every process has them all."""
        return marks


class CrossProcessTransfer:
    """One program over both sides' devices, in which each trainer device sends its shard to one of the engine's.

    Every process of either side makes the same calls in the same order: they are collectives.

    Attributes:
        ends: The devices of either side.
        sends: True if this process has devices of the trainer.
        receives: True if it has devices of the engine.
    """

    def __init__(self, sources: Devices, targets: Devices):
        """Pairs the devices of both sides, in order; surplus devices of the trainer hold further copies.

        Raises:
            SyncError: The trainer has not as many as the engine, or a multiple, or they share devices.
        """
        if len(sources) % len(targets) or set(sources) & set(targets):
            raise SyncError(
                f"the trainer has {len(sources)} devices, on {_processes(sources)}, and the engine {len(targets)}, on "
                f"{_processes(targets)}: between processes each device of the engine gets its part from one of the "
                "trainer, which therefore needs as many, or a multiple, and none in common. Or keep a copy in the "
                "engine's layout on the trainer's side, portax.Staging(converter, mesh), and let a transport move it"
            )
        everyone = (*sources, *targets)
        self._mesh = Mesh(np.array(everyone), (_ALL,))
        self._cut = NamedSharding(self._mesh, PartitionSpec(_ALL))
        self._pairs = [(i, i + len(sources)) for i in range(len(targets))]
        self._own = [device for device in everyone if device.process_index == jax.process_index()]
        self._compiled: dict[Any, Any] = {}
        self._highest = jax.jit(lambda x: x.max(0), out_shardings=NamedSharding(self._mesh, PartitionSpec()))
        self.ends = (sources, targets)
        self.sends = any(device in sources for device in self._own)
        self.receives = any(device in targets for device in self._own)

    def compile(self, shapes: Shapes) -> Any:
        """Compiles the program that carries arrays of these shapes and dtypes, under the engine's shardings."""
        key = tuple((shape.shape, shape.dtype, shape.sharding) for shape in shapes)
        if key not in self._compiled:
            stacks = [jax.ShapeDtypeStruct(self._stacked(s), s.dtype, sharding=self._cut) for s in shapes]
            self._compiled[key] = jax.jit(self._send, donate_argnums=0).lower(stacks).compile()
        return self._compiled[key]

    def send(self, arrays: Arrays, donors: Arrays | None, shapes: Shapes) -> Arrays:
        """Moves arrays to the engine's devices; between processes, their old buffers are freed.

        Args:
            arrays: The trainer's arrays, with the engine's partitioning; empty on processes without any.
            donors: Arrays of the engine whose buffers the results take over; None for new ones.
            shapes: Shape, dtype and sharding of each at the engine's.

        Returns:
            The arrays at the engine's; without any shard, on processes that have none of its devices.
        """
        donors = tuple(map(zeros, shapes)) if donors is None else donors
        stacks = []
        for i, shape in enumerate(shapes):
            held = {
                shard.device: shard.data
                for array in (*arrays[i : i + 1], donors[i])
                for shard in array.addressable_shards
            }
            shards = [held[device] for device in self._own]
            stacks.append(jax.make_array_from_single_device_arrays(self._stacked(shape), self._cut, shards))
        return tuple(map(_received, self.compile(shapes)(stacks), shapes))

    def shared(self, marks: Marks, count: int) -> Marks:
        """Shares fingerprints that one side knows with all processes.

        Args:
            marks: The fingerprints; empty on processes of the other side.
            count: Number of fingerprints.
        """
        words = np.array([(0, 0, 0) if mark is None else (1, *mark) for mark in marks or [None] * count], np.uint32)
        with jax.transfer_guard_host_to_device("allow"):  # a few bytes
            rows = [jax.device_put(words[None], device) for device in self._own]
        stacked = jax.make_array_from_single_device_arrays((self._mesh.size, *words.shape), self._cut, rows)
        return [(int(a), int(b)) if known else None for known, a, b in fetch(self._highest(stacked))]

    def _send(self, stacks: list[Shaped[Array, "..."]]) -> list[Shaped[Array, "..."]]:
        def sent(shard):
            return bits.from_bits(lax.ppermute(bits.to_bits(shard), _ALL, self._pairs))

        spec = PartitionSpec(_ALL)
        return jax.shard_map(lambda shards: [*map(sent, shards)], mesh=self._mesh, in_specs=spec, out_specs=spec)(
            stacks
        )

    def _stacked(self, shape: jax.ShapeDtypeStruct) -> tuple[int, ...]:
        """Returns the shape of every device's shard, of both sides, one after another."""
        first, *rest = shape.sharding.shard_shape(shape.shape)
        return (self._mesh.size * first, *rest)


def _received(stack: Shaped[Array, "..."], shape: jax.ShapeDtypeStruct) -> Shaped[Array, "..."]:
    shards = [shard.data for shard in stack.addressable_shards if shard.device in shape.sharding.device_set]
    return jax.make_array_from_single_device_arrays(shape.shape, shape.sharding, shards, dtype=shape.dtype)


def route_between(
    sources: Devices, targets: Devices, existing: LocalTransfer | CrossProcessTransfer | None = None
) -> LocalTransfer | CrossProcessTransfer:
    """Returns the transfer from some devices to others.

    Args:
        sources: The trainer's devices; empty if its arrays are in host memory.
        targets: The engine's devices.
        existing: A transfer to reuse, with its programs, if it connects the same devices.

    Raises:
        SyncError: As `CrossProcessTransfer`.
    """
    if not sources or _indices(sources) == _indices(targets):
        return existing if isinstance(existing, LocalTransfer) else LocalTransfer()
    if isinstance(existing, CrossProcessTransfer) and existing.ends == (sources, targets):
        return existing
    return CrossProcessTransfer(sources, targets)


def all_moved_bytes(plan: Plan, leaves: Mapping[str, Any], made: Mapping[str, Sharding], targets: Shapes) -> int:
    """Estimates the bytes that devices have to receive from each other in one sync; see `received_bytes`.

    Args:
        plan: The plan of the sync.
        leaves: The trainer's leaves by their whole path.
        made: Sharding of each new leaf before the transfer; without those that this process did not make.
        targets: Shapes and shardings of the engine's leaves, in the order of the plan.
    """
    total = 0
    for entry, target in zip(plan.entries, targets, strict=True):
        held = made.get(entry.name)
        if held is not None:
            at_first = jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=held)
            total += received_bytes(at_first, [leaves[source] for source in entry.sources])
        total += moved_bytes(target, held)
    return total


@functools.cache
def moved_bytes(target: jax.ShapeDtypeStruct, source: Sharding | None) -> int:
    """Returns the bytes that devices receive when an array gets another sharding.

    Args:
        target: Its shape, dtype and new sharding.
        source: Its old sharding; None if no target device holds any of it.
    """
    held = {} if source is None else source.devices_indices_map(target.shape)
    wanted = target.sharding.devices_indices_map(target.shape)
    return _shard_bytes(target) * sum(held.get(device) != index for device, index in wanted.items())


def received_bytes(target: jax.ShapeDtypeStruct, sources: Iterable[Any]) -> int:
    """Estimates the bytes that devices receive from each other when they make an array from sharded ones.

    The estimate uses shardings alone: a device is taken to hold the same fraction of what it needs as of everything.
    That is exact if the target is cut along other dimensions than its sources.

    Args:
        target: Shape, dtype and sharding of the new array.
        sources: Its sources, as arrays or shapes; those without a sharding come from the host.
    """
    held = ((s.shape, s.dtype.itemsize, sharding) for s in sources if (sharding := getattr(s, "sharding", None)))
    return _received_bytes(target, tuple(held))


@functools.cache
def _received_bytes(target: jax.ShapeDtypeStruct, sources: tuple[tuple[tuple[int, ...], int, Sharding], ...]) -> int:
    sizes = [math.prod(shape) * itemsize for shape, itemsize, _ in sources]
    if not sum(sizes):
        return 0
    missing = 0.0
    for device in target.sharding.device_set:
        held = sum(
            math.prod(sharding.shard_shape(shape)) * itemsize
            for shape, itemsize, sharding in sources
            if device in sharding.device_set
        )
        missing += 1 - held / sum(sizes)
    return round(_shard_bytes(target) * missing)


def _shard_bytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def zeros(shape: jax.ShapeDtypeStruct) -> Shaped[Array, "..."]:
    """Returns zeros of this shape, dtype and sharding; without any shard, on processes with none of its devices."""
    if not shape.sharding.addressable_devices:
        return jax.make_array_from_single_device_arrays(shape.shape, shape.sharding, [], dtype=shape.dtype)
    return _zeros(shape.shape, shape.dtype, shape.sharding)()


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
def _settled(arrived: Arrays, donors: Arrays) -> Arrays:
    """Copies values into the donors' buffers. The barrier keeps JAX from returning the arguments as they are."""
    return lax.optimization_barrier(arrived)


def _processes(devices: Devices) -> str:
    found = sorted(_indices(devices))
    return f"process{'es' * (len(found) > 1)} {numbers(found)}"


def _indices(devices: Devices) -> set[int]:
    return {device.process_index for device in devices}
