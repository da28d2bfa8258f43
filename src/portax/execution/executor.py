"""Runs a plan: one compiled program for each group of layers, a bounded number of layers at a time."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Container, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, Sharding
from jaxtyping import Array, Shaped

from portax.execution import _compat
from portax.execution.inputs import Input, Inputs, allowing_host, source_sharding, tree_sharding
from portax.execution.propagate import Cuts, cuts_of, forwards, spec_of
from portax.execution.reshard import lower
from portax.execution.scale_check import ScaleCheck
from portax.execution.schedule import ProgramCall, schedule
from portax.execution.sharding import (
    automatic,
    automatic_axes,
    check_arrays,
    device_order,
    mesh_of,
    on_sharding,
    reachable,
    replicated,
    spread,
)
from portax.execution.zero_padding import check_padding
from portax.planning.jax_context import each_in_own_context
from portax.planning.plan import PROGRAMS_IN_FLIGHT, Plan
from portax.planning.trace import Hooks, HookTrace, trace_hooks
from portax.trainer.layer_params import own_shape
from portax.trainer.padding import padded_leaves
from portax.trainer.param_tree import ParamTree
from portax.trainer.scan import LayerGroup
from portax.weights import bits, kernels

Arrays: TypeAlias = tuple[Shaped[Array, "..."], ...]
Targets: TypeAlias = tuple[Sharding, ...] | None


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedCall:
    """A program call, with everything that does not change from one tree to the next.

    Attributes:
        call: The leaves to make.
        program: Makes them, from the layer's arrays, its position, and donors.
        position: Index of the layer on each scan axis, on the source's devices.
        wanted: Partitioning of each result in the program; None leaves it to the compiler.
        results: The shardings that results get; the same partitioning, perhaps spelled in another way.
    """

    call: ProgramCall
    program: Any
    position: Shaped[Array, " depth"]
    wanted: Targets
    results: Targets

    def __call__(self, inputs: Inputs, donors: Arrays = ()) -> Arrays:
        """Makes the tensors.

        Args:
            inputs: The inputs of the tree.
            donors: Arrays whose buffers the results take over, with the results' partitioning, on the source's devices.
        """
        arrays = inputs.arrays(self.call)
        with allowing_host(arrays):
            outputs = self.program(arrays, self.position, tuple(map(automatic_axes, donors)))
        if self.results is None:
            return outputs
        return tuple(on_sharding(output, target) for output, target in zip(outputs, self.results, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Conversion:
    """A plan, the weights that it is for, and the executor that runs it.

    Attributes:
        plan: The plan.
        tree: The trainer's weights, or their shapes.
        groups: The same, as groups of layers.
        executor: The converter's.
    """

    plan: Plan
    tree: ParamTree
    groups: tuple[LayerGroup, ...]
    executor: "Executor"

    def check(self) -> None:
        """Raises a `PlanError` if leaves cannot be converted, or if padding is not zero."""
        check_arrays(self.tree)
        self.executor.check_padding(self.tree, self.groups)

    def calls(self, bucket_bytes: int | None) -> tuple[ProgramCall, ...]:
        """Returns the work, in order: a layer at a time, or parts of a layer that need no more memory than a bucket.

        Arrays that move between devices exist twice, as sent and as received: so a call makes half a bucket.
        """
        return self.executor.calls(self.plan, self.groups, bucket_bytes and max(bucket_bytes // 2, 1))

    def inputs(self, mesh: Mesh | None = None) -> Inputs:
        """Returns the arguments of calls; leaves on disk are read to `mesh`."""
        return Inputs(self.tree, mesh)

    def buckets(
        self, bucket_bytes: int | None, only: Container[str] | None = None, *, by_stack: bool = False
    ) -> Iterator[dict[str, Shaped[Array, "..."]]]:
        """Yields all weights, or some of them, each bucket made when it is asked for.

        Args:
            bucket_bytes: Most bytes in a bucket, if leaves permit; None makes each layer a bucket.
            only: Names of the weights to make; None for all.
            by_stack: In the order of the trainer's stacks on disk instead of layer by layer; see `schedule`.

        Raises:
            PlanError: The tree has shapes instead of values, or leaves on different devices.
        """
        self.check()
        work = schedule(self.plan, self.groups, bucket_bytes, only, stacks_of=self.tree.leaves if by_stack else None)
        return each_in_own_context(self.executor.run(self, work, bucket_bytes))

    def prepare(self, call: ProgramCall, targets: Targets, *, donating: bool) -> PreparedCall:
        """As `Executor.prepare`."""
        return self.executor.prepare(self, call, targets, donating=donating)

    def compile(self, call: ProgramCall, targets: tuple[Sharding, ...], *, donating: bool) -> jax.stages.Compiled:
        """As `Executor.compile`."""
        return self.executor.compile(self, call, targets, donating=donating)


class Executor:
    """Compiles and runs the programs of one converter; keeps them, so that a second run compiles nothing."""

    def __init__(self, hooks: Hooks, mesh: Mesh | None):
        self._hooks = hooks
        self._mesh = mesh
        self._traces: dict[Any, HookTrace] = {}
        self._programs: dict[Any, Any] = {}
        self._compiled: dict[Any, jax.stages.Compiled] = {}
        self._positions: dict[Any, jax.Array] = {}
        self._calls: dict[Any, tuple[Plan, tuple[ProgramCall, ...]]] = {}

    def calls(self, plan: Plan, groups: tuple[LayerGroup, ...], bucket_bytes: int | None) -> tuple[ProgramCall, ...]:
        """Returns the calls of a plan; those of the last plan are kept."""
        kept = self._calls.get(bucket_bytes)
        if kept is None or kept[0] is not plan:
            kept = self._calls[bucket_bytes] = plan, tuple(schedule(plan, groups, bucket_bytes))
        return kept[1]

    def check_padding(self, tree: ParamTree, groups: tuple[LayerGroup, ...]) -> None:
        """As `zero_padding.check_padding`, of whatever the hooks' configuration says is padding."""
        check_padding(tree, padded_leaves(groups, self._hooks.config), self._hooks.config)

    def run(
        self, conversion: Conversion, work: Iterator[ProgramCall], bucket_bytes: int | None
    ) -> Iterator[dict[str, Shaped[Array, "..."]]]:
        """Converts bucket by bucket.

        Args:
            conversion: The tree, and its plan.
            work: The calls.
            bucket_bytes: Most bytes in a bucket, if leaves permit; None makes each call a bucket, which is yielded
                unchecked, so that the next call runs meanwhile.

        Raises:
            QuantizationError: Values cannot be quantised; before their bucket, if it has a size.
        """
        inputs = conversion.inputs(self._read_mesh(conversion.tree))
        in_flight: collections.deque[dict[str, jax.Array]] = collections.deque()
        bucket: dict[str, jax.Array] = {}
        size = 0
        checks: collections.deque[ScaleCheck] = collections.deque()
        for call in work:
            if bucket and (bucket_bytes is None or size + call.nbytes > bucket_bytes):
                _settle(checks, keep=0 if bucket_bytes is not None else PROGRAMS_IN_FLIGHT)
                yield bucket
                bucket, size = {}, 0
            if len(in_flight) == PROGRAMS_IN_FLIGHT:  # what a consumer has already donated is ready
                jax.block_until_ready([leaf for leaf in in_flight.popleft().values() if not leaf.is_deleted()])
            finished = self._run(conversion, call, inputs)
            for path in call.frees:
                if release := getattr(conversion.tree.leaves[path], "release", None):
                    release()
            in_flight.append(finished)
            checks.append(ScaleCheck(call.entries, finished.values()))
            bucket |= finished
            size += call.nbytes
        _settle(checks, keep=0)
        yield bucket

    def _read_mesh(self, tree: ParamTree) -> Mesh | None:
        """Returns the mesh that leaves on disk are read to: of leaves that are on devices, or else of the results."""
        source = tree_sharding(tree)
        on = mesh_of(source) if source is not None else self._mesh
        return None if on is None else mesh_of(automatic(NamedSharding(on, jax.sharding.PartitionSpec())))

    def _run(self, conversion: Conversion, call: ProgramCall, inputs: Inputs) -> dict[str, jax.Array]:
        targets = None
        if self._mesh is not None:
            targets = tuple(NamedSharding(self._mesh, entry.spec) for entry in call.entries)
        outputs = self.prepare(conversion, call, targets, donating=False, inputs=inputs)(inputs)
        if targets is not None and device_order(outputs[0].sharding) != device_order(targets[0]):
            with jax.transfer_guard_device_to_device("allow"):  # to the mesh that the caller named
                outputs = jax.device_put(outputs, targets)
        return dict(zip(call.names, outputs, strict=True))

    def prepare(
        self,
        conversion: Conversion,
        call: ProgramCall,
        targets: Targets,
        *,
        donating: bool,
        inputs: Inputs | None = None,
    ) -> PreparedCall:
        """Prepares a call: its program, its position, and the partitioning of its results.

        Args:
            conversion: The tree, and its plan; only shapes and shardings count.
            call: The leaves to make.
            targets: The partitioning that each result is to have. If that is on other devices than the source's,
                results are made on the source's, partitioned the same way where there are as many, or a multiple.
            donating: True if the call will have donors.
            inputs: The tree's inputs; None to make them.
        """
        inputs = inputs or conversion.inputs(self._read_mesh(conversion.tree) if targets is None else _mesh(targets))
        shapes = inputs.shapes(call)
        source = source_sharding(shapes)
        results = reachable(source, targets)
        mesh = None if results is None else _mesh(results)  # None: nothing is moved, so specs may name other axes
        if results is None and source is not None and not _compat.NAMES_EVERY_SHARDING and (own := mesh_of(source)):
            results = tuple(spread(entry.shape, own) for entry in call.entries)
        wanted = results and tuple(map(automatic, results))
        key = _key(call, shapes, wanted, donating)
        program = self._compiled.get(key) or self._program(key, call, shapes, wanted, mesh, donating)
        position = () if all(each.is_slice for each in shapes) else call.layer.position
        return PreparedCall(call, program, self._placed(position, source), wanted, results)

    def compile(
        self, conversion: Conversion, call: ProgramCall, targets: tuple[Sharding, ...], *, donating: bool
    ) -> jax.stages.Compiled:
        """Compiles the program of one call, if that has not been done; shapes with shardings are enough.

        Args:
            conversion: The tree, or its shapes.
            call: The leaves that the program makes.
            targets: The partitioning that each result is to have.
            donating: True if the call will have donors.
        """
        inputs = conversion.inputs(_mesh(targets))
        prepared = self.prepare(conversion, call, targets, donating=donating, inputs=inputs)
        shapes = inputs.shapes(call)
        key = _key(call, shapes, prepared.wanted, donating)
        if key not in self._compiled:
            donors = tuple(
                jax.ShapeDtypeStruct(entry.shape, entry.dtype, sharding=sharding)
                for entry, sharding in zip(call.entries, prepared.wanted or targets, strict=True)
            )
            arrays = tuple(each.shape for each in shapes)
            lowered = prepared.program.lower(arrays, prepared.position, donors if donating else ())
            self._compiled[key] = lowered.compile()
        return self._compiled[key]

    def _program(
        self,
        key: tuple,
        call: ProgramCall,
        shapes: tuple[Input, ...],
        wanted: Targets,
        mesh: Mesh | None,
        donating: bool,
    ) -> Callable[..., Any]:
        if key not in self._programs:
            make = functools.partial(_make, self._hooks, self._trace(call.group), call, shapes, mesh)
            # Whatever reads them: a donor that a program drops is not written into.
            self._programs[key] = jax.jit(make, out_shardings=wanted, donate_argnums=2, keep_unused=donating)
        return self._programs[key]

    def _trace(self, group: LayerGroup) -> HookTrace:
        key = _signature(group)
        if key not in self._traces:
            self._traces[key] = trace_hooks(self._hooks, group)
        return self._traces[key]

    def _placed(self, position: tuple[int, ...], source: Sharding | None) -> jax.Array:
        key = (position, source)
        if key not in self._positions:
            where = None if source is None else replicated(source)
            with jax.transfer_guard_host_to_device("allow"):  # a few bytes, also where a trainer forbids transfers
                self._positions[key] = jax.device_put(np.array(position or (0,), np.int32), where)
        return self._positions[key]


def _settle(checks: collections.deque[ScaleCheck], *, keep: int) -> None:
    while len(checks) > keep:
        checks.popleft().settle()


def _make(
    hooks: Hooks,
    trace: HookTrace,
    call: ProgramCall,
    shapes: tuple[Input, ...],
    mesh: Mesh | None,
    arrays: tuple[Any, ...],
    position: Shaped[Array, " depth"],
    donors: Arrays,
) -> Arrays:
    """Traces the program: reads the layer's leaves, calls the hooks, and lowers the blocks to the engine's tensors."""
    group = call.group
    zero = position[0] < 0  # false, in a way that no compiler can know
    given = dict(zip(call.needs, zip(arrays, shapes, strict=True), strict=True))
    values: list[Any] = []
    cuts: list[Cuts | None] = []
    for path, whole in zip(group.paths, group.shapes, strict=True):
        if path not in given:
            dtype = jax.dtypes.canonicalize_dtype(whole.dtype)
            shape = own_shape(tuple(whole.shape), group.scan_axis(path), group.scan)
            values.append(bits.to_bits(jnp.zeros(shape, dtype)))
            cuts.append(None)
            continue
        array, described = given[path]
        values.append(_own(group, path, jnp.asarray(array), described, position, zero))
        own = described.own
        cuts.append(None if own is None else cuts_of(own.spec, values[-1].ndim))
    source = next((each.own.mesh for each in shapes if each.own is not None), None)
    held = _held(trace, cuts, source)
    made: list[Any] = []
    layout = hooks.layout.for_layer(group.types)
    for block in trace(values, zero):
        count = len(jax.tree.leaves(block))
        made += lower(layout, block, mesh, [next(held) for _ in range(count)], zero)
    return tuple(made[call.tensors])


def _own(group: LayerGroup, path: str, array: Any, described: Input, position: Any, zero: Any) -> Shaped[Array, "..."]:
    """Returns one layer's own leaf, bfloat16 as its bits."""
    own = bits.to_bits(array)
    if group.scan and not described.is_slice:
        first = group.scan_axis(path)
        own = kernels.unscan(own, position, axes=tuple(range(first, first + len(group.scan))))
    if described.own is not None:  # else XLA may communicate before the cast to bits, and then does it in float32
        own = lax.with_sharding_constraint(own, described.own)
    return bits.pin_bits(own, zero)


def _held(trace: HookTrace, cuts: list[Cuts | None], mesh: Any) -> Iterator[NamedSharding | None]:
    """Returns the trainer's partitioning of each array of the blocks, where it is known."""
    if mesh is None:
        return iter([None] * len(trace.jaxpr.out_avals))
    found = forwards(trace.jaxpr.jaxpr, [*cuts, None], dict(mesh.shape))
    return iter([None if cut is None else NamedSharding(mesh, spec_of(cut)) for cut in found])


def _mesh(targets: tuple[Sharding, ...]) -> Mesh | None:
    return mesh_of(automatic(targets[0]))


def _key(call: ProgramCall, shapes: tuple[Input, ...], wanted: Targets, donating: bool) -> tuple[Any, ...]:
    """Returns a key that is equal for calls of one compiled program."""
    arguments = tuple((each.shape.shape, each.shape.dtype, each.shape.sharding, each.is_slice) for each in shapes)
    return _signature(call.group), call.tensors.start, call.tensors.stop, arguments, wanted, donating


def _signature(group: LayerGroup) -> tuple[Any, ...]:
    """Returns a key that is equal for groups with the same programs."""
    shapes = tuple(
        (own_shape(tuple(leaf.shape), axis, group.scan), np.dtype(leaf.dtype))
        for leaf, axis in zip(group.shapes, group.scan_axes, strict=True)
    )
    return group.is_global, group.types, group.paths, len(group.scan), group.scan_axes, shapes
