"""Carries out a plan: one compiled program for each kind of layer, a bounded number of layers at a time."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Shaped

from portax import kernels
from portax.errors import PlanError, Problem
from portax.layers import Kind, Layer, Section
from portax.plan import PROGRAMS_IN_FLIGHT, Entry, Plan
from portax.tracing import Hooks, hold, layer_leaves
from portax.trainer_state import TrainerState


def check_arrays(state: TrainerState) -> None:
    """Raises a `PlanError` if any leaf has no values to convert, or if leaves are spread over different devices."""
    problems = []
    devices: dict[tuple, str] = {}
    for path, leaf in state.leaves.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            cause = "shapes are enough for plan(), not for convert()"
            problems.append(Problem(state.root + path, "a shape", "an array", cause))
        elif isinstance(leaf, jax.Array) and leaf.is_deleted():
            cause = "it was donated to another program, or freed, before the conversion"
            problems.append(Problem(state.root + path, "a deleted array", "a live array", cause))
        elif isinstance(leaf, jax.Array) and leaf.committed:
            devices.setdefault(_device_order(leaf.sharding), path)
    if len(devices) > 1:
        found = "; ".join(f"{path} on {[d.id for d in order]}" for order, path in devices.items())
        cause = "part of the state was moved or restored onto other devices than the rest"
        problems.append(Problem("params", found, "all leaves on the same devices, in one order", cause))
    if problems:
        raise PlanError(problems)


@dataclasses.dataclass(frozen=True)
class _Job:
    """Some of the tensors of one layer, made by one call of a program."""

    section: Section
    layer: Layer
    tensors: slice
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


class Executor:
    """Compiles and runs the programs of one converter; keeps them, so that a second run compiles nothing."""

    def __init__(self, hooks: Hooks, mesh: Mesh | None):
        self._hooks = hooks
        self._mesh = mesh if mesh is None else _auto(mesh)
        self._wanted_mesh = mesh
        self._programs: dict[Any, Callable] = {}
        self._positions: dict[Any, jax.Array] = {}

    def run(
        self, plan: Plan, sections: Iterable[Section], bucket_bytes: int | None
    ) -> Iterator[dict[str, Shaped[Array, "..."]]]:
        """Converts bucket by bucket.

        Args:
            plan: A plan of these sections.
            sections: The trainer's weights.
            bucket_bytes: Most bytes in a bucket, where leaves permit; None makes each layer a bucket.
        """
        in_flight: collections.deque[dict[str, jax.Array]] = collections.deque()
        bucket: dict[str, jax.Array] = {}
        size = 0
        for job in _jobs(plan, sections, bucket_bytes):
            if bucket and (bucket_bytes is None or size + job.nbytes > bucket_bytes):
                yield bucket
                bucket, size = {}, 0
            if len(in_flight) == PROGRAMS_IN_FLIGHT:  # what a consumer has already donated is ready
                jax.block_until_ready([leaf for leaf in in_flight.popleft().values() if not leaf.is_deleted()])
            finished = self._run(job)
            in_flight.append(finished)
            bucket |= finished
            size += job.nbytes
        yield bucket

    def _run(self, job: _Job) -> dict[str, jax.Array]:
        kind, arrays, position = _operands(job, self._hooks.config.param_scan_axis)
        source = next((leaf.sharding for leaf in arrays if isinstance(leaf, jax.Array)), None)
        targets = None
        if self._mesh is not None:
            targets = tuple(NamedSharding(self._mesh, entry.spec) for entry in job.entries)
        in_program = source is not None and targets and _device_order(source) == _device_order(targets[0])
        sliced = _sliced_shardings(kind, arrays, self._hooks.config.param_scan_axis)
        program = self._program(kind, job.tensors, sliced, targets if in_program else None)
        outputs = program(arrays, self._placed(position, source))
        if targets and not in_program:
            outputs = jax.device_put(outputs, targets)
        if self._wanted_mesh is not None and self._wanted_mesh != self._mesh:
            wanted = [NamedSharding(self._wanted_mesh, entry.spec) for entry in job.entries]
            outputs = [_on_mesh(output, sharding) for output, sharding in zip(outputs, wanted, strict=True)]
        return dict(zip((entry.name for entry in job.entries), outputs, strict=True))

    def _program(
        self,
        kind: Kind,
        tensors: slice,
        sources: tuple[NamedSharding | None, ...],
        targets: tuple[NamedSharding, ...] | None,
    ) -> Callable:
        key = (kind, tensors.start, tensors.stop, sources, targets)
        if key not in self._programs:
            mesh = self._mesh if targets else None
            shardings = {path: source for path, source in zip(kind.paths, sources, strict=True) if source is not None}

            def program(arrays, position):
                leaves = layer_leaves(self._hooks, kind, arrays, position, shardings)

                def place(array, spec):
                    return kernels.seal(array if mesh is None else _spread(array, mesh, spec), leaves.zero)

                held, _ = hold(self._hooks, leaves, is_global=kind.is_global, place=place)
                return tuple(tensor.array for tensor in held[tensors])

            self._programs[key] = jax.jit(program, out_shardings=targets)
        return self._programs[key]

    def _placed(self, position: tuple[int, ...], source: Sharding | None) -> jax.Array:
        key = (position, source)
        if key not in self._positions:
            where = None if source is None else _replicated(source)
            self._positions[key] = jax.device_put(np.array(position or (0,), np.int32), where)
        return self._positions[key]


def _sliced_shardings(kind: Kind, arrays: tuple[Any, ...], scan_axis: int) -> tuple[NamedSharding | None, ...]:
    """How one layer's slice of each leaf is partitioned; None for what is not spread over devices."""

    def sliced(leaf: Any) -> NamedSharding | None:
        sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
        if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
            return None
        axes = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
        del axes[scan_axis : scan_axis + len(kind.scan)]
        return NamedSharding(sharding.mesh, PartitionSpec(*axes))

    return tuple(sliced(leaf) for leaf in arrays)


def _spread(array: Shaped[Array, "..."], mesh: Mesh, spec: PartitionSpec) -> Shaped[Array, "..."]:
    """Partitions a finished array in two steps: over all of the mesh first, then as the engine replicates it.

    In one step XLA may gather whole arrays; and without the constraint it would move the cast back to floats, and with
    it the communication, in front of the packing.
    """
    axes = [*spec, *[None] * (array.ndim - len(spec))]
    spare = tuple(axis for axis, size in mesh.shape.items() if axis not in axes and size > 1)
    copies = math.prod(mesh.shape[axis] for axis in spare)
    free = [i for i, axis in enumerate(axes) if axis is None and array.shape[i] % copies == 0]
    if spare and free and array.ndim > 1:
        cut = max(free, key=lambda i: array.shape[i])
        everywhere = PartitionSpec(*axes[:cut], spare, *axes[cut + 1 :])
        array = lax.with_sharding_constraint(array, NamedSharding(mesh, everywhere))
    return lax.with_sharding_constraint(array, NamedSharding(mesh, spec))


def _operands(job: _Job, scan_axis: int) -> tuple[Kind, tuple[Any, ...], tuple[int, ...]]:
    """What a program is called with. Stacks in host memory are sliced there, so that one layer at a time is moved."""
    kind, position = job.section.kind, job.layer.position
    arrays = tuple(_automatic(leaf) for leaf in job.section.arrays(job.layer))
    if position and all(isinstance(leaf, np.ndarray) for leaf in arrays):
        at = (slice(None),) * scan_axis + position
        return dataclasses.replace(kind, scan=()), tuple(leaf[at] for leaf in arrays), ()
    return kind, arrays, position


def _jobs(plan: Plan, sections: Iterable[Section], bucket_bytes: int | None) -> Iterator[_Job]:
    entries = iter(plan.entries)
    for section, count in zip(sections, plan.tensors_per_layer, strict=True):
        for layer in section.layers:
            mine = tuple(itertools.islice(entries, count))
            for chosen in _cuts(mine, bucket_bytes):
                yield _Job(section, layer, chosen, mine[chosen])


def _cuts(entries: tuple[Entry, ...], most: int | None) -> Iterator[slice]:
    start = size = 0
    for i, entry in enumerate(entries):
        if most is not None and i > start and size + entry.nbytes > most:
            yield slice(start, i)
            start, size = i, 0
        size += entry.nbytes
    yield slice(start, len(entries))


def _auto(mesh: Mesh) -> Mesh:
    """The same devices and axes, partitioned by the compiler: constraints and packing need no types for that."""
    return Mesh(mesh.devices, mesh.axis_names)


def _automatic(leaf: Any) -> Any:
    mesh = getattr(leaf.sharding, "mesh", None) if isinstance(leaf, jax.Array) else None
    return (
        leaf if mesh is None or mesh == _auto(mesh) else _on_mesh(leaf, NamedSharding(_auto(mesh), leaf.sharding.spec))
    )


def _on_mesh(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The same shards under a mesh that differs in the types of its axes only; nothing is copied."""
    shards = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards, dtype=leaf.dtype)


def _device_order(sharding: Sharding) -> tuple[jax.Device, ...]:
    if isinstance(sharding, NamedSharding):
        return tuple(sharding.mesh.devices.flat)
    return tuple(sorted(sharding.device_set, key=lambda device: device.id))


def _replicated(sharding: Sharding) -> Sharding:
    if isinstance(sharding, SingleDeviceSharding):
        return sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else Mesh(np.array(_device_order(sharding)), ("all",))
    return NamedSharding(mesh, PartitionSpec())
