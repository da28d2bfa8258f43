"""`WeightSync`: plan once, then write a live engine's weights in place, every step."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import Sharding

from portax._text.timing import timed
from portax.converters.base import BaseConverter
from portax.errors import PlanError, Problem, SyncError
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
from portax.sync.report import PHASES, SyncReport, Torn, Verification, peak_bytes
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

    def _sync(self, params: Params) -> SyncReport:
        seconds = dict.fromkeys(PHASES, 0.0)
        with timed(seconds, "plan"):
            conversion = self._checked(params)
        with timed(seconds, "compile"):
            self._compile(conversion)
        self._attempt = Attempt()
        made: dict[str, Sharding] = {}
        try:
            write = self._switch if self._atomic else self._write
            verification = write(conversion, made, seconds)
        except BaseException as error:
            self._attempt.cause = repr(error)
            raise
        self.version += 1
        plan = conversion.plan
        return SyncReport(
            version=self.version,
            leaves=len(plan.entries),
            seconds=seconds,
            bytes_read=plan.bytes_in,
            bytes_written=plan.bytes_out,
            bytes_moved=self._moved(conversion, made),
            peak_bytes=peak_bytes(self._engine.devices()),
            verification=verification,
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

    def _write(
        self, conversion: Conversion, made: dict[str, Sharding], seconds: dict[str, float]
    ) -> Verification | None:
        """Puts every leaf in its place as soon as it is finished; then compares them, with `verify`."""
        for ready in self._finished(conversion, made, seconds):
            self._assign(ready, seconds)
        if not self._verify:
            return None
        with timed(seconds, "verify"):
            found = self._compared(conversion, self._engine.leaves())
        if found.different:
            for name in found.different:
                mark_lost(self._engine.leaf(name), self._attempt)
            raise SyncError(f"after writing, {found}")
        return found

    def _switch(
        self, conversion: Conversion, made: dict[str, Sharding], seconds: dict[str, float]
    ) -> Verification | None:
        """Finishes all leaves, compares them, with `verify`, and puts all in their places, or none."""
        staged: dict[str, jax.Array] = {}
        for ready in self._finished(conversion, made, seconds):
            staged |= ready
        found = None
        if self._verify:
            with timed(seconds, "verify"):
                found = self._compared(conversion, staged)
            if found.different:
                raise SyncError(f"of what was made, {found}; nothing was written")
        with self._engine.all_or_nothing():
            self._assign(staged, seconds)
            if self._verify and any(self._engine.leaf(name) is not leaf for name, leaf in staged.items()):
                kept = self._compared(conversion, self._engine.leaves())
                if kept.different:
                    raise SyncError(f"after writing, {kept}; what was there before is put back")
        return found

    def _finished(
        self, conversion: Conversion, made: dict[str, Sharding], seconds: dict[str, float]
    ) -> Iterator[dict[str, jax.Array]]:
        """Yields finished leaves on the engine's devices; the next call converts while the last one moves.

        Args:
            conversion: The conversion that makes them.
            made: Receives the sharding of each one before the transfer.
            seconds: Seconds of each phase so far.
        """
        inputs = self._inputs(conversion)
        last: dict[str, jax.Array] = {}
        check = ScaleCheck((), ())
        for call, prepared, in_place in self._calls():
            donors = None if self._atomic else self._donate(call.names)
            with timed(seconds, "convert"):
                arrays = prepared(inputs, donors or () if in_place else ()) if prepared is not None else ()
            made |= {name: array.sharding for name, array in zip(call.names, arrays, strict=False)}
            of_made = ScaleCheck(call.entries, arrays)
            with timed(seconds, "convert" if in_place else "transfer"):
                if not in_place:
                    arrived = self._route.send(arrays, donors, self._shapes(call))
                    arrays = tuple(map(on_sharding, arrived, self._shardings(call)))
                check.settle()
                ready = jax.block_until_ready(last)
            yield ready
            last = dict(zip(call.names, arrays, strict=True))
            check = of_made if self._route.sends else ScaleCheck(call.entries, arrays)
        with timed(seconds, "convert"):
            check.settle()
            ready = jax.block_until_ready(last)
        yield ready

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
