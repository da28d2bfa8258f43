"""Carries arrays from a trainer's processes to an engine's, where JAX's `device_put` does not reach."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Shaped

from portax import kernels
from portax.errors import SyncError
from portax.names import numbers

Arrays: TypeAlias = tuple[Shaped[Array, "..."], ...]
Shapes: TypeAlias = Sequence[jax.ShapeDtypeStruct]

_ALL = "all"


class Bridge:
    """One program over both sides' devices, in which each trainer device sends its shard to one of the engine's.

    Every process of either side makes the same calls in the same order: they are collectives.

    Attributes:
        ends: The devices of either side.
        sends: Whether this process has devices of the trainer.
        receives: Whether it has devices of the engine.
    """

    def __init__(self, sources: Sequence[jax.Device], targets: Sequence[jax.Device]):
        """Pairs the devices of both sides, in order.

        Raises:
            SyncError: There are not as many of the one as of the other, or they share devices.
        """
        if len(sources) != len(targets) or set(sources) & set(targets):
            raise SyncError(
                f"the trainer has {len(sources)} devices, on {_processes(sources)}, and the engine {len(targets)}, on "
                f"{_processes(targets)}: between processes each device of the one sends to one of the other, so both "
                "need as many, and none in common. Or keep a copy in the engine's layout on the trainer's side, "
                "portax.Staging(converter, mesh), and let a transport move it"
            )
        everyone = (*sources, *targets)
        self._mesh = Mesh(np.array(everyone), (_ALL,))
        self._cut = NamedSharding(self._mesh, PartitionSpec(_ALL))
        self._pairs = [(i, i + len(sources)) for i in range(len(sources))]
        self._own = [device for device in everyone if device.process_index == jax.process_index()]
        self._compiled: dict[Any, Any] = {}
        self._any = jax.jit(lambda x: x.max(0), out_shardings=NamedSharding(self._mesh, PartitionSpec()))
        self.ends = (tuple(sources), tuple(targets))
        self.sends = any(device in sources for device in self._own)
        self.receives = any(device in targets for device in self._own)

    def compile(self, shapes: Shapes) -> Any:
        """The program that carries arrays of these shapes and dtypes, under the engine's shardings."""
        key = tuple((shape.shape, shape.dtype, shape.sharding) for shape in shapes)
        if key not in self._compiled:
            stacks = [jax.ShapeDtypeStruct(self._stacked(s), s.dtype, sharding=self._cut) for s in shapes]
            self._compiled[key] = jax.jit(self._send, donate_argnums=0).lower(stacks).compile()
        return self._compiled[key]

    def carry(self, arrays: Arrays, donors: Arrays, shapes: Shapes) -> Arrays:
        """Sends arrays to the engine's devices; what they lived in is freed.

        Args:
            arrays: What the trainer's devices hold, cut as the engine cuts it; empty, on processes without any.
            donors: Arrays of the engine whose buffers the results take over.
            shapes: Shape, dtype and sharding of each at the engine's.

        Returns:
            The arrays at the engine's; without any shard, on processes that have none of its devices.
        """
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

    def agreed(self, flags: Bool[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which flags are set on any process."""
        rows = [jax.device_put(flags[None].astype(np.uint8), device) for device in self._own]
        shape = (self._mesh.size, *flags.shape)
        stacked = jax.make_array_from_single_device_arrays(shape, self._cut, rows)
        return np.asarray(self._any(stacked)).astype(bool)

    def _send(self, stacks: list[Shaped[Array, "..."]]) -> list[Shaped[Array, "..."]]:
        def sent(shard):
            return kernels.cooked(lax.ppermute(kernels.raw(shard), _ALL, self._pairs))

        spec = PartitionSpec(_ALL)
        return jax.shard_map(lambda shards: [*map(sent, shards)], mesh=self._mesh, in_specs=spec, out_specs=spec)(
            stacks
        )

    def _stacked(self, shape: jax.ShapeDtypeStruct) -> tuple[int, ...]:
        """The shape of every device's shard, of both sides, one after another."""
        first, *rest = shape.sharding.shard_shape(shape.shape)
        return (self._mesh.size * first, *rest)


def _received(stack: Shaped[Array, "..."], shape: jax.ShapeDtypeStruct) -> Shaped[Array, "..."]:
    shards = [shard.data for shard in stack.addressable_shards if shard.device in shape.sharding.device_set]
    return jax.make_array_from_single_device_arrays(shape.shape, shape.sharding, shards, dtype=shape.dtype)


def bridge_between(
    sources: Sequence[jax.Device], targets: Sequence[jax.Device], existing: Bridge | None = None
) -> Bridge | None:
    """What connects these devices; None where they are of the same processes, or where the source is host memory.

    Args:
        sources: The trainer's.
        targets: The engine's.
        existing: Taken again, with its programs, if it connects the same.

    Raises:
        SyncError: As `Bridge`.
    """
    if not sources or _indices(sources) == _indices(targets):
        return None
    if existing is not None and existing.ends == (tuple(sources), tuple(targets)):
        return existing
    return Bridge(sources, targets)


def _processes(devices: Sequence[jax.Device]) -> str:
    found = sorted(_indices(devices))
    return f"process{'es' * (len(found) > 1)} {numbers(found)}"


def _indices(devices: Sequence[jax.Device]) -> set[int]:
    return {device.process_index for device in devices}
