"""Carries out a plan: one compiled program for each kind of layer, a bounded number of layers at a time."""

import collections
import dataclasses
import functools
from collections.abc import Container, Iterable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Shaped

from portax.analysis.hlo_collectives import received_bytes
from portax.errors import PlanError, Problem, SyncError
from portax.execution.inputs import Reader, spread
from portax.execution.reshard import Placer
from portax.execution.schedule import Job, jobs
from portax.planning.plan import PROGRAMS_IN_FLIGHT, Plan
from portax.planning.trace import Hooks, layer_leaves, lower
from portax.trainer.param_tree import ParamTree
from portax.trainer.scan import Kind, Section


def check_arrays(state: ParamTree) -> None:
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
            devices.setdefault(device_order(leaf.sharding), path)
    if len(devices) > 1:
        found = "; ".join(f"{path} on {[d.id for d in order]}" for order, path in devices.items())
        cause = "part of the state was moved or restored onto other devices than the rest"
        problems.append(Problem("params", found, "all leaves on the same devices, in one order", cause))
    if problems:
        raise PlanError(problems)


Arrays: TypeAlias = tuple[Shaped[Array, "..."], ...]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A plan, the weights that it is for, and what carries it out, a job at a time.

    Attributes:
        plan: The plan.
        state: The trainer's weights, or their shapes.
        sections: The same, as layers of each kind.
        executor: The converter's.
    """

    plan: Plan
    state: ParamTree
    sections: tuple[Section, ...]
    executor: "Executor"

    def jobs(self, bucket_bytes: int | None) -> Iterator[Job]:
        """The work, in order: a layer at a time, or parts of one that need no more memory than a bucket.

        What moves between devices is there twice, as it is sent and as it arrives: a job makes half a bucket.
        """
        return jobs(self.plan, self.sections, bucket_bytes and max(bucket_bytes // 2, 1))

    def buckets(
        self, bucket_bytes: int | None, only: Container[str] | None = None, *, by_stack: bool = False
    ) -> Iterator[dict[str, Shaped[Array, "..."]]]:
        """All weights, or some of them, made when they are asked for.

        Args:
            bucket_bytes: Most bytes in a bucket, where leaves permit; None makes each layer a bucket.
            only: Names of the weights that are wanted; None for all.
            by_stack: In the order of the trainer's stacks instead of layer by layer; see `jobs`.

        Raises:
            PlanError: There are shapes in place of values, or leaves on different devices.
        """
        check_arrays(self.state)
        work = jobs(self.plan, self.sections, bucket_bytes, only, by_stack=by_stack)
        return self.executor.run(map(self._alive, work), bucket_bytes)

    def _alive(self, job: Job) -> Job:
        """Raises a `SyncError` if a leaf of the trainer has been freed since the first job was done."""
        for path, leaf in zip(job.section.kind.paths, job.section.arrays(job.layer), strict=True):
            if isinstance(leaf, jax.Array) and leaf.is_deleted():
                raise SyncError(
                    f"{self.state.root}{job.layer.path(path)}: found a deleted array; expected a live one until the "
                    "last bucket is made. Likely cause: it was freed, or donated to the next training step, between "
                    "two buckets: take all of them before that"
                )
        return job

    def make(self, job: Job, targets: tuple[Sharding, ...], donors: Arrays = ()) -> Arrays:
        """As `Executor.make`.

        Raises:
            SyncError: A leaf of the trainer was freed since the first job was done.
        """
        self._alive(job)
        return self.executor.make(job, targets, donors)

    def compile(self, job: Job, targets: tuple[Sharding, ...], *, donating: bool) -> "Program":
        """As `Executor.compile`."""
        return self.executor.compile(job, targets, donating=donating)


@dataclasses.dataclass(frozen=True)
class Program:
    """What makes the tensors of one kind of job.

    Attributes:
        compiled: To be called with the layer's arrays, its position, and donors.
        received: Bytes that all devices together receive from others in one call; None if that cannot be read.
    """

    compiled: jax.stages.Compiled
    received: int | None


class Executor:
    """Compiles and runs the programs of one converter; keeps them, so that a second run compiles nothing."""

    def __init__(self, hooks: Hooks, mesh: Mesh | None):
        self._hooks = hooks
        self._mesh = mesh
        self._programs: dict[Any, Any] = {}
        self._compiled: dict[Any, Program] = {}
        self._positions: dict[Any, jax.Array] = {}
        self._unnamed: dict[Any, Mesh] = {}
        self._reader = Reader(hooks.config.param_scan_axis)

    def run(self, work: Iterable[Job], bucket_bytes: int | None) -> Iterator[dict[str, Shaped[Array, "..."]]]:
        """Converts bucket by bucket.

        Args:
            work: The jobs.
            bucket_bytes: Most bytes in a bucket, where leaves permit; None makes each job a bucket.
        """
        in_flight: collections.deque[dict[str, jax.Array]] = collections.deque()
        bucket: dict[str, jax.Array] = {}
        size = 0
        for job in work:
            if bucket and (bucket_bytes is None or size + job.nbytes > bucket_bytes):
                yield bucket
                bucket, size = {}, 0
            if len(in_flight) == PROGRAMS_IN_FLIGHT:  # what a consumer has already donated is ready
                jax.block_until_ready([leaf for leaf in in_flight.popleft().values() if not leaf.is_deleted()])
            finished = self._run(job)
            for leaf in job.frees:
                leaf.release()
            in_flight.append(finished)
            bucket |= finished
            size += job.nbytes
        yield bucket

    def _run(self, job: Job) -> dict[str, jax.Array]:
        targets = None
        if self._mesh is not None:
            targets = tuple(NamedSharding(self._mesh, entry.spec) for entry in job.entries)
        outputs = self.make(job, targets)
        if targets is not None and device_order(outputs[0].sharding) != device_order(targets[0]):
            outputs = jax.device_put(outputs, targets)
        return dict(zip((entry.name for entry in job.entries), outputs, strict=True))

    def make(self, job: Job, targets: tuple[Sharding, ...] | None, donors: Arrays = ()) -> Arrays:
        """Makes the tensors of one job.

        Args:
            job: What to make.
            targets: How each result is to be partitioned. If that is on other devices than the source's, results are
                made on the source's, partitioned the same way where there are as many of them, or a multiple.
            donors: Arrays whose buffers the results take over, partitioned as the targets on the source's devices.
        """
        call = self._call(job, targets, donating=bool(donors), shapes=False)
        if call.signature in self._unnamed:
            return self.make(job, _spread(job, self._unnamed[call.signature]))
        ahead = self._compiled.get(call.signature)
        program = call.program if ahead is None else ahead.compiled
        position = self._placed(call.position, call.source)
        try:
            outputs = program(call.arrays, position, tuple(_automatic(donor) for donor in donors))
        except ValueError:  # JAX 0.9 finds no name for how XLA spreads a result: half of a mesh's axis
            if call.reached is not None or (mesh := _mesh(call.source)) is None:
                raise
            self._unnamed[call.signature] = mesh
            return self.make(job, _spread(job, mesh))
        if call.reached is None:
            return outputs
        return tuple(on_sharding(output, target) for output, target in zip(outputs, call.reached, strict=True))

    def compile(self, job: Job, targets: tuple[Sharding, ...], *, donating: bool) -> Program:
        """Compiles the program of one job, if that has not been done; shapes with shardings are enough.

        Args:
            job: What the program is to make.
            targets: How each result is to be partitioned.
            donating: Whether it will be given donors.
        """
        call = self._call(job, targets, donating=donating, shapes=True)
        if call.signature in self._compiled:
            return self._compiled[call.signature]
        donors: tuple[jax.ShapeDtypeStruct, ...] = ()
        if donating:
            wanted = call.wanted or targets
            donors = tuple(
                jax.ShapeDtypeStruct(entry.shape, entry.dtype, sharding=sharding)
                for entry, sharding in zip(job.entries, wanted, strict=True)
            )
        position = self._placed(call.position, call.source)
        compiled = call.program.lower(call.arrays, position, donors).compile()
        devices = len(call.source.device_set) if call.source is not None else 1
        self._compiled[call.signature] = Program(compiled, received_bytes(compiled.as_text(), devices))
        return self._compiled[call.signature]

    def _call(self, job: Job, targets: tuple[Sharding, ...] | None, *, donating: bool, shapes: bool) -> "_Call":
        mesh = _mesh(_auto_sharding(targets[0])) if targets else None
        operands = self._reader.operands(
            job.section.kind, job.layer, needs=job.needs, last=job.last, mesh=mesh, shapes=shapes
        )
        kind, position = operands.kind, operands.position
        arrays = tuple(_automatic(leaf) for leaf in operands.arrays)
        source = next((leaf.sharding for leaf in arrays if getattr(leaf, "sharding", None) is not None), None)
        reached = _reachable(source, targets)
        wanted = reached and tuple(_auto_sharding(target) for target in reached)
        sliced = _sliced_shardings(kind, arrays, self._hooks.config.param_scan_axis)
        key = (kind, job.tensors.start, job.tensors.stop, sliced, wanted, donating)
        types = tuple((leaf.shape, np.dtype(leaf.dtype), getattr(leaf, "sharding", None)) for leaf in arrays)
        return _Call(self._program(key), (key, types), arrays, position, source, reached, wanted)

    def _program(self, key: tuple) -> Any:
        kind, start, stop, sources, targets, donating = key
        if key not in self._programs:
            mesh = _mesh(targets[0]) if targets else None
            shardings = {path: source for path, source in zip(kind.paths, sources, strict=True) if source is not None}

            def program(arrays, position, donors):
                leaves = layer_leaves(self._hooks, kind, arrays, position, shardings)

                held, _ = lower(self._hooks, leaves, is_global=kind.is_global, place=Placer(mesh, leaves))
                return tuple(tensor.array for tensor in held[start:stop])

            # Whatever reads them: a donor that a program drops is not written into.
            self._programs[key] = jax.jit(program, out_shardings=targets, donate_argnums=2, keep_unused=donating)
        return self._programs[key]

    def _placed(self, position: tuple[int, ...], source: Sharding | None) -> jax.Array:
        key = (position, source)
        if key not in self._positions:
            where = None if source is None else _replicated(source)
            with jax.transfer_guard_host_to_device("allow"):  # a few bytes, also where a trainer forbids transfers
                self._positions[key] = jax.device_put(np.array(position or (0,), np.int32), where)
        return self._positions[key]


@dataclasses.dataclass(frozen=True)
class _Call:
    """A program, and what it is called with; the signature is that of a program compiled ahead of time."""

    program: Any
    signature: tuple
    arrays: tuple[Any, ...]
    position: tuple[int, ...]
    source: Sharding | None
    reached: tuple[Sharding, ...] | None
    wanted: tuple[Sharding, ...] | None


def _spread(job: Job, mesh: Mesh) -> tuple[Sharding, ...]:
    """Every result over all of the mesh."""
    return tuple(spread(entry.shape, mesh) for entry in job.entries)


def _reachable(source: Sharding | None, targets: tuple[Sharding, ...] | None) -> tuple[Sharding, ...] | None:
    """How a program that runs on the source's devices can partition its results; None leaves it to the compiler.

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
    """The same on other devices, as often as they suffice for it."""
    shape, names = target.mesh.devices.shape, target.mesh.axis_names
    if len(devices) > target.mesh.size:
        shape, names = (-1, *shape), ("repeated", *names)
    return NamedSharding(Mesh(devices.reshape(shape), names), target.spec)


def _sliced_shardings(kind: Kind, arrays: tuple[Any, ...], scan_axis: int) -> tuple[NamedSharding | None, ...]:
    """How one layer's slice of each leaf is partitioned; None for what is not spread over devices."""

    def sliced(leaf: Any) -> NamedSharding | None:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
            return None
        axes = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
        del axes[scan_axis : scan_axis + len(kind.scan)]
        return NamedSharding(sharding.mesh, PartitionSpec(*axes))

    return tuple(sliced(leaf) for leaf in arrays)


@functools.lru_cache
def _auto(mesh: Mesh) -> Mesh:
    """The same devices and axes, partitioned by the compiler: constraints and packing need no types for that."""
    return Mesh(mesh.devices, mesh.axis_names)


def _auto_sharding(sharding: Sharding) -> Sharding:
    mesh = _mesh(sharding)
    if mesh is None or mesh == _auto(mesh) or not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(_auto(mesh), sharding.spec)


def _mesh(sharding: Sharding | None) -> Mesh | None:
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def _automatic(leaf: Any) -> Any:
    if (own := getattr(leaf, "sharding", None)) is None or (sharding := _auto_sharding(own)) == own:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return on_sharding(leaf, sharding)


def on_sharding(leaf: jax.Array, sharding: Sharding) -> jax.Array:
    """The same shards under a sharding that differs in its spelling or in the types of its axes; nothing is copied."""
    if leaf.sharding == sharding:
        return leaf
    shards = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards, dtype=leaf.dtype)


def device_order(sharding: Sharding) -> tuple[jax.Device, ...]:
    """The devices of a sharding, in the order in which programs number them."""
    if isinstance(sharding, NamedSharding):
        return tuple(sharding.mesh.devices.flat)
    return tuple(sorted(sharding.device_set, key=lambda device: device.id))


def _replicated(sharding: Sharding) -> Sharding:
    if isinstance(sharding, SingleDeviceSharding):
        return sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else Mesh(np.array(device_order(sharding)), ("all",))
    return NamedSharding(mesh, PartitionSpec())
