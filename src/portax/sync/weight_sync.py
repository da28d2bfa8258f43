"""`WeightSync`: plan once, then write a live engine's weights in place, every step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import Sharding

from portax._text.timing import timed
from portax.converters.base import BaseConverter
from portax.errors import ConfigError, PlanError, Problem, QuantizationError, SyncError
from portax.execution.byte_counts import byte_count
from portax.execution.executor import Arrays, Conversion, PreparedCall
from portax.execution.inputs import Inputs, source_sharding, tree_sharding
from portax.execution.scale_check import ScaleCheck
from portax.execution.schedule import ProgramCall
from portax.execution.sharding import automatic, device_order, mesh_of, on_sharding
from portax.planning.jax_context import in_own_context
from portax.planning.plan import Plan
from portax.sync.attempts import Attempt, mark_lost, mark_written, torn
from portax.sync.claim import Claim
from portax.sync.engine_state import EngineLeaves, EngineState, pointer
from portax.sync.fingerprint import fingerprints
from portax.sync.pending import Pending
from portax.sync.report import PHASES, SyncReport, Torn, Verification, peak_bytes, writing_seconds
from portax.sync.transfer import CrossProcessTransfer, LocalTransfer, all_moved_bytes, route_between
from portax.trainer.param_tree import Params

_Prepared: TypeAlias = tuple[Plan, dict[str, Any], Any, list[tuple[ProgramCall, PreparedCall | None, bool]]]
"""A plan, the sources and the transfer that its calls are prepared for, and the calls; True for those in place."""


class WeightSync:
    """Keeps the weights of a live engine equal to a trainer's.

    Every call writes the trainer's weights *in place*: the engine's mapping gets arrays in the buffers of those they
    replace, with the same shardings. Leaves that the engine fills itself stay untouched. From the second call on,
    nothing is compiled.

    Attributes:
        version: Number of completed syncs.
        plan: The leaves that every sync writes, and those that the engine fills itself.

    Example:
        >>> engine = converter.convert(params)  # in earnest `portax.integrations.tpu_inference.engine_state(llm)`
        >>> sync = portax.WeightSync(converter, engine, params=params)
        >>> sync(params).leaves
        19
    """

    @in_own_context
    def __init__(
        self,
        converter: BaseConverter,
        engine_state: EngineLeaves,
        *,
        params: Params | None = None,
        bucket_bytes: int = 2**30,
        verify: bool = False,
        atomic: bool = False,
    ):
        """Plans the sync and checks it against the engine's leaves; writes nothing.

        Args:
            converter: The converter for the engine.
            engine_state: The live mapping, a flat dict of arrays or an `nnx.State`, or a function that returns it, for
                engines that may replace it. It is written to.
            params: The trainer's parameters, or their shapes with shardings: plans and compiles for them now, and not
                in the first sync.
            bucket_bytes: Most bytes in work at a time.
            verify: True compares fingerprints of all leaves after every sync, at the price of a second conversion.
            atomic: True switches all leaves at once, when all are ready, at the price of a second copy of the weights.

        Raises:
            ConfigError: `bucket_bytes` is no number of bytes.
            PlanError: The engine holds other leaves than the converter makes, leaves that share a buffer, or leaves in
                the host's memory.
            SyncError: Another sync into this engine is running.
        """
        self.version = 0
        self._converter = converter
        self._engine = EngineState(engine_state)
        self._bucket_bytes = byte_count("bucket_bytes", bucket_bytes)
        self._verify = verify
        self._atomic = atomic
        claim = Claim()
        with claim.lock:
            self._engine.enter(claim)
            held = self._engine.leaves()
            self.plan = converter.plan_into(held) if params is None else converter.plan(params, held)
            self._engine.record(self.plan)
        self._attempt = Attempt()
        self._counted: tuple[Any, int] = (None, 0)
        self._prepared: _Prepared | None = None
        self._pending: Pending | None = None
        self._route: LocalTransfer | CrossProcessTransfer = LocalTransfer()
        if params is not None:
            self._compile(self._planned(params))

    @in_own_context
    def __call__(self, params: Params) -> SyncReport:
        """Writes the trainer's weights into the engine.

        Args:
            params: As for `converter.convert`.

        Returns:
            A report, with the time of each phase; its `str` is a table.

        Raises:
            PlanError: The trainer's tree or the engine's leaves are not what they should be; nothing was written.
            SyncError: Another sync into this engine is running, this one's or another object's; the trainer's devices
                do not reach the engine's; or leaves differ afterwards (with `verify=True`).
            QuantizationError: Values cannot be quantised: the engine is torn, or, with `atomic=True`, holds what it
                held.
        """
        claim = Claim()
        with claim.lock:
            self._engine.enter(claim)
            return self._sync(params)

    @property
    def torn(self) -> Torn | None:
        """The remains of a sync that failed half-way, by this object or another; None while all leaves belong together.

        It is read off the leaves that the engine holds now.
        """
        return torn(self._engine.planned())

    @in_own_context
    def verify(self, params: Params) -> Verification:
        """Compares the engine's leaves with the weights of these parameters, by fingerprints computed on the devices.

        Args:
            params: As for `converter.convert`.

        Raises:
            PlanError: As for a sync.
            SyncError: A sync into this engine is running.
        """
        claim = Claim()
        with claim.lock:
            self._engine.enter(claim)
            return self._compared(self._checked(params), self._engine.leaves())

    @in_own_context
    def begin(self, params: Params) -> None:
        """Starts to make a new version beside the one that the engine serves, and returns; `commit` switches to it.

        The devices do the work behind what they are already doing. The trainer may donate or free its arrays at once.
        Only weights in host memory or on disk are read before this returns, and with `verify=True` the comparison is
        made before. A version that was begun and not committed is replaced.

        Args:
            params: As for `converter.convert`.

        Raises:
            ConfigError: The sync is not atomic.
            PlanError: As for a sync; a version that was begun before is kept.
            SyncError: Another sync into this engine is running; or, with `verify=True`, leaves differ.

        Example:
            >>> sync = portax.WeightSync(converter, converter.convert(params), atomic=True)
            >>> sync.begin(params)  # the engine goes on with its old weights
            >>> sync.commit().version  # between two steps of the engine
            1
        """
        if not self._atomic:
            raise ConfigError("begin() needs WeightSync(..., atomic=True): the old version stays until commit()")
        claim = Claim()
        with claim.lock:
            self._engine.enter(claim)
            conversion, seconds = self._ready_to_make(params)
            self._pending = None  # before the next one takes its memory
            self._pending = self._begun(conversion, seconds)

    @property
    def ready(self) -> bool:
        """True if a version was begun and is finished, so that `commit` does not wait for it."""
        return self._pending is not None and self._pending.ready()

    @in_own_context
    def commit(self) -> SyncReport:
        """Waits for the version that was begun, and switches all leaves of the engine to it, or none.

        Call it between two steps of the engine.

        Returns:
            A report; its `standstill` is the time of the switch alone.

        Raises:
            SyncError: No version was begun; another sync into this engine is running.
            PlanError: The engine's leaves are no longer what they were when the sync was made; nothing was written.
            QuantizationError: Values cannot be quantised: the version is given up, and the engine holds what it held.
        """
        claim = Claim()
        with claim.lock:
            self._engine.enter(claim)
            if self._pending is None:
                raise SyncError("no version was begun, or it was aborted or committed: call begin(params) first")
            self._engine.check()
            return self._completed(self._pending, self._switch)

    def abort(self) -> None:
        """Gives up the version that was begun, if there is one; the engine keeps the one it serves."""
        self._pending = None

    def _sync(self, params: Params) -> SyncReport:
        conversion, seconds = self._ready_to_make(params)
        self._pending = None
        return self._completed(Pending(conversion, seconds), self._make_and_switch if self._atomic else self._write)

    def _ready_to_make(self, params: Params) -> tuple[Conversion, dict[str, float]]:
        seconds = dict.fromkeys(PHASES, 0.0)
        with timed(seconds, "plan"):
            conversion = self._checked(params)
        with timed(seconds, "compile"):
            self._compile(conversion)
        return conversion, seconds

    def _completed(self, version: Pending, write: Callable[[Pending], None]) -> SyncReport:
        self._attempt = Attempt()
        try:
            write(version)
        except BaseException as error:
            self._attempt.cause = repr(error)
            raise
        self.version += 1
        plan, seconds = version.conversion.plan, version.seconds
        return SyncReport(
            version=self.version,
            leaves=len(plan.entries),
            seconds=seconds,
            bytes_read=plan.bytes_in,
            bytes_written=plan.bytes_out,
            bytes_moved=version.moved,
            peak_bytes=peak_bytes(self._engine.devices()),
            verification=version.verification,
            standstill=seconds["assign"] if self._atomic else writing_seconds(seconds),
            left=plan.left,
        )

    def _planned(self, params: Params) -> Conversion:
        conversion = self._converter.conversion(params)
        source = tree_sharding(conversion.tree)
        sources = () if source is None else device_order(source)
        self._route = route_between(sources, self._engine.device_order(), self._route)
        return conversion

    def _checked(self, params: Params) -> Conversion:
        conversion = self._planned(params)
        conversion.check()
        self._engine.check()
        held = self._engine.buffers()
        shared = [
            Problem(
                conversion.tree.root + path,
                f"the buffer of the engine's {held[pointer(leaf)]}",
                "a buffer of its own",
                "the engine was given the trainer's arrays, which a sync would overwrite: give it copies",
            )
            for path, leaf in conversion.tree.leaves.items()
            if pointer(leaf) in held
        ]
        if shared:
            raise PlanError(shared)
        return conversion

    def _compile(self, conversion: Conversion) -> None:
        """Prepares every call, and compiles missing programs; for a tree like the last one there is nothing to do."""
        # On the host and on disk leaves have no sharding, and are read in different ways: there the type counts.
        sources = {path: getattr(leaf, "sharding", type(leaf)) for path, leaf in conversion.tree.leaves.items()}
        kept = self._prepared
        if kept is not None and kept[0] is conversion.plan and kept[1:3] == (sources, self._route):
            return
        calls: list[tuple[ProgramCall, PreparedCall | None, bool]] = []
        inputs = self._inputs(conversion)
        for call in conversion.calls(self._bucket_bytes):
            self._route.compile(self._shapes(call))
            if self._route.sends:
                donating = self._in_place(inputs, call)
                targets = self._shardings(call)
                conversion.compile(call, targets, donating=donating)
                calls.append((call, conversion.prepare(call, targets, donating=donating), donating))
            else:
                calls.append((call, None, False))
        self._prepared = (conversion.plan, sources, self._route, calls)

    def _inputs(self, conversion: Conversion) -> Inputs:
        return conversion.inputs(mesh_of(automatic(next(iter(self._engine.all_shardings())))))

    def _write(self, version: Pending) -> None:
        """Puts every leaf in its place as soon as it is finished; then compares them, with `verify`."""
        for ready in self._finished(version):
            self._assign(ready, version.seconds)
        if not self._verify:
            return
        with timed(version.seconds, "verify"):
            version.verification = found = self._compared(version.conversion, self._engine.leaves())
        if found.different:
            for name in found.different:
                mark_lost(self._engine.leaf(name), self._attempt)
            raise SyncError(f"after writing, {found}")

    def _make_and_switch(self, version: Pending) -> None:
        for ready in self._finished(version):
            version.add(ready)
        self._verify_made(version)
        self._switch(version)

    def _begun(self, conversion: Conversion, seconds: dict[str, float]) -> Pending:
        version = Pending(conversion, seconds)
        for leaves, check, _ in self._started(version):
            version.add(leaves, check)
            version.bound(in_flight=8 if self._simulated() else None)
        self._verify_made(version)
        return version

    def _simulated(self) -> bool:
        """Tells whether the devices are the host's; with many programs at a time they wait for each other for ever."""
        return self._engine.device_order()[0].platform == "cpu"

    def _verify_made(self, version: Pending) -> None:
        """Compares leaves that no engine holds yet with the trainer's weights, if the sync verifies."""
        if not self._verify:
            return
        with timed(version.seconds, "verify"):
            version.verification = found = self._compared(version.conversion, version.leaves)
        if found.different:
            raise SyncError(f"of what was made, {found}; nothing was written")

    def _switch(self, version: Pending) -> None:
        """Puts all leaves in their places, or none, as soon as they are finished."""
        try:
            with timed(version.seconds, "transfer"):
                version.settle()
        except QuantizationError:
            self._pending = None
            raise
        with self._engine.all_or_nothing():
            self._assign(version.leaves, version.seconds)
            if self._verify:
                self._verify_kept(version.leaves)
        self._pending = None

    def _verify_kept(self, leaves: dict[str, jax.Array]) -> None:
        """Compares what the engine made of its new leaves with them, where a box keeps something else."""
        changed = [name for name, leaf in leaves.items() if self._engine.leaf(name) is not leaf]
        made, kept = (fingerprints(map(of, changed)) for of in (leaves.__getitem__, self._engine.leaf))
        different = tuple(name for name, a, b in zip(changed, made, kept, strict=True) if a != b)
        if different:
            found = Verification(len(leaves), different)
            raise SyncError(f"after writing, {found}; what was there before is put back")

    def _finished(self, version: Pending) -> Iterator[dict[str, jax.Array]]:
        """Yields finished leaves on the engine's devices; the next call converts while the last one moves."""
        last: dict[str, jax.Array] = {}
        check, phase = ScaleCheck((), ()), "convert"
        for leaves, next_check, phase in self._started(version):
            with timed(version.seconds, phase):
                check.settle()
                ready = jax.block_until_ready(last)
            yield ready
            last, check = leaves, next_check
        with timed(version.seconds, phase):
            check.settle()
            ready = jax.block_until_ready(last)
        yield ready

    def _started(self, version: Pending) -> Iterator[tuple[dict[str, jax.Array], ScaleCheck, str]]:
        """Starts one call after another; yields its leaves, not yet finished, their check and the phase to wait in.

        Args:
            version: The version they belong to; it learns the bytes that moved.
        """
        conversion, seconds = version.conversion, version.seconds
        inputs = self._inputs(conversion)
        made: dict[str, Sharding] = {}
        for call, prepared, in_place in self._calls():
            donors = None if self._atomic else self._donate(call.names)
            with timed(seconds, "convert"):
                arrays = prepared(inputs, donors or () if in_place else ()) if prepared is not None else ()
            made |= {name: array.sharding for name, array in zip(call.names, arrays, strict=False)}
            check = ScaleCheck(call.entries, arrays)
            phase = "convert" if in_place else "transfer"
            if not in_place:
                with timed(seconds, phase):
                    arrived = self._route.send(arrays, donors, self._shapes(call))
                    arrays = tuple(map(on_sharding, arrived, self._shardings(call)))
                    check = check if self._route.sends else ScaleCheck(call.entries, arrays)
            yield dict(zip(call.names, arrays, strict=True)), check, phase
        version.moved = self._moved(conversion, made)

    def _calls(self) -> list[tuple[ProgramCall, PreparedCall | None, bool]]:
        assert self._prepared is not None  # noqa: S101 - _compile ran
        return self._prepared[3]

    def _make(self, conversion: Conversion, inputs: Inputs, call: ProgramCall) -> Arrays:
        if not self._route.sends:
            return ()
        return conversion.prepare(call, self._shardings(call), donating=False)(inputs)

    def _assign(self, leaves: dict[str, jax.Array], seconds: dict[str, float]) -> None:
        with timed(seconds, "assign"):
            for leaf in leaves.values():
                mark_written(leaf, self._attempt)
            self._engine.assign(leaves)
            for name, leaf in leaves.items():
                if (kept := self._engine.leaf(name)) is not leaf:  # by a box that makes something else of it
                    mark_written(kept, self._attempt)

    def _donate(self, names: Sequence[str]) -> Arrays:
        for name in names:  # lost, until what is made of them has arrived
            mark_lost(self._engine.leaf(name), self._attempt)
        return tuple(self._engine.donate(name) for name in names)

    def _compared(self, conversion: Conversion, leaves: Mapping[str, Any]) -> Verification:
        different = []
        inputs = self._inputs(conversion)
        for call in conversion.calls(self._bucket_bytes):
            names = call.names
            expected = fingerprints(self._make(conversion, inputs, call))
            held = fingerprints(leaves[name] for name in names) if self._route.receives else []
            shared = zip(
                names, self._route.shared(expected, len(names)), self._route.shared(held, len(names)), strict=True
            )
            different += [name for name, made, found in shared if made != found]
        return Verification(len(conversion.plan.entries), tuple(different))

    def _moved(self, conversion: Conversion, made: dict[str, Sharding]) -> int:
        """Returns the bytes that moved between devices; computed once for all syncs that are alike."""
        leaves, plan = conversion.tree.rooted, conversion.plan
        alike = (plan, {path: getattr(leaf, "sharding", None) for path, leaf in leaves.items()}, made)
        if self._counted[0] != alike:
            targets = self._engine.shapes([entry.name for entry in plan.entries])
            self._counted = (alike, all_moved_bytes(plan, leaves, made, targets))
        return self._counted[1]

    def _shapes(self, call: ProgramCall) -> tuple[jax.ShapeDtypeStruct, ...]:
        return self._engine.shapes(call.names)

    def _shardings(self, call: ProgramCall) -> tuple[Sharding, ...]:
        return self._engine.shardings(call.names)

    def _in_place(self, inputs: Inputs, call: ProgramCall) -> bool:
        """Tells whether one program can read the trainer's arrays and write into the engine's."""
        source = source_sharding(inputs.shapes(call))
        return not self._atomic and source is not None and device_order(source) == self._engine.device_order()
