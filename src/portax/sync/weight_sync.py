"""`WeightSync`: plan once, then write a live engine's weights in place, every step."""

import threading
from typing import Any

import jax

from portax._text.timing import timed
from portax.analysis.hlo_collectives import moved_bytes
from portax.converters.base import BaseConverter
from portax.errors import PlanError, Problem, SyncError
from portax.execution.executor import Arrays, Conversion, check_arrays, device_order, on_sharding
from portax.execution.schedule import Job
from portax.sync.engine_state import EngineState, pointer
from portax.sync.fingerprint import fingerprints
from portax.sync.report import PHASES, SyncReport, Torn, Verification, peak_bytes
from portax.sync.transfer import CrossProcessTransfer, LocalTransfer, route_between

_NEVER = 0  # the attempt that no leaf was written by


class WeightSync:
    """Keeps the weights of a live engine equal to a trainer's.

    Every call writes all that the trainer owns *in place*: the engine's mapping gets arrays that live in the buffers of
    those they replace, with the same shardings. What the engine owns is not touched. From the second call on nothing is
    compiled.

    Attributes:
        version: How many syncs have been completed.
        plan: What every sync writes, and what the engine fills itself.

    Example:
        >>> sync = portax.WeightSync(converter, runner.state)
        >>> report = sync(params)
    """

    def __init__(
        self,
        converter: BaseConverter,
        engine_state: Any,
        *,
        params: Any = None,
        bucket_bytes: int = 2**30,
        verify: bool = False,
        atomic: bool = False,
    ):
        """Checks that what the converter makes is what the engine holds; writes nothing.

        Args:
            converter: Says what the engine should hold.
            engine_state: The live mapping, a flat dict of arrays or an `nnx.State`, or a function that returns it, for
                engines that may replace it. It is written to.
            params: The trainer's parameters, or their shapes with shardings: plans and compiles for them now, and not
                in the first sync.
            bucket_bytes: Most bytes in work at a time.
            verify: Whether every sync compares fingerprints of all leaves afterwards, at the price of a second
                conversion.
            atomic: Whether a sync switches all leaves at once, when all are ready, at the price of a second copy of
                the weights.

        Raises:
            PlanError: The engine holds other leaves than the converter makes, or leaves that share a buffer.
        """
        self.version = 0
        self._converter = converter
        self._engine = EngineState(engine_state)
        self._bucket_bytes = bucket_bytes
        self._verify = verify
        self._atomic = atomic
        self._lock = threading.Lock()
        plan = converter.plan(converter.expected_tree() if params is None else params, self._engine.leaves())
        self._engine.own(plan)
        self.plan = plan
        self._attempt = _NEVER
        self._written_by: dict[str, int | None] = dict.fromkeys((entry.name for entry in plan.entries), _NEVER)
        self._cause = ""
        self._route: LocalTransfer | CrossProcessTransfer = LocalTransfer()
        if params is not None:
            self._compile(self._planned(params))

    def __call__(self, params: Any) -> SyncReport:
        """Writes the trainer's weights into the engine.

        Args:
            params: As for `converter.convert`.

        Returns:
            What was done, and how long each phase took; its `str` is a table.

        Raises:
            PlanError: The trainer's tree or the engine's leaves are not what they should be; nothing was written.
            SyncError: Another sync is running, the engine is on other processes, or leaves differ afterwards (with
                `verify=True`).
        """
        if not self._lock.acquire(blocking=False):
            raise SyncError("a sync is running; wait for it: two at once would write the same buffers")
        try:
            return self._sync(params)
        finally:
            self._lock.release()

    @property
    def torn(self) -> Torn | None:
        """What a sync that failed half-way left behind; None while all leaves belong together."""
        if len(set(self._written_by.values())) == 1 and None not in self._written_by.values():
            return None
        by = {
            "new": [name for name, attempt in self._written_by.items() if attempt == self._attempt],
            "lost": [name for name, attempt in self._written_by.items() if attempt is None],
        }
        old = [name for name in self._written_by if name not in {*by["new"], *by["lost"]}]
        return Torn(new=tuple(by["new"]), old=tuple(old), lost=tuple(by["lost"]), cause=self._cause)

    def verify(self, params: Any) -> Verification:
        """Compares the engine's leaves with what these parameters give, by fingerprints computed on the devices.

        Args:
            params: As for `converter.convert`.

        Raises:
            PlanError: As for a sync.
        """
        return self._compared(self._checked(params))

    def _sync(self, params: Any) -> SyncReport:
        seconds = dict.fromkeys(PHASES, 0.0)
        with timed(seconds, "plan"):
            conversion = self._checked(params)
        with timed(seconds, "compile"):
            exchanged = self._compile(conversion)
        self._attempt += 1
        try:
            moved = self._write(conversion, seconds)
            verification = None
            if self._verify:
                with timed(seconds, "verify"):
                    verification = self._compared(conversion)
                self._refuse(verification)
        except BaseException as error:
            self._cause = repr(error)
            raise
        self.version += 1
        plan = conversion.plan
        return SyncReport(
            version=self.version,
            leaves=len(plan.entries),
            seconds=seconds,
            bytes_read=plan.bytes_in,
            bytes_written=plan.bytes_out,
            bytes_moved=None if exchanged is None else exchanged + moved,
            peak_bytes=peak_bytes(self._engine.devices()),
            verification=verification,
        )

    def _planned(self, params: Any) -> Conversion:
        conversion = self._converter.conversion(params)
        shardings = (getattr(leaf, "sharding", None) for leaf in conversion.state.leaves.values())
        source = next((device_order(sharding) for sharding in shardings if sharding is not None), ())
        self._route = route_between(source, self._engine.device_order(), self._route)
        return conversion

    def _checked(self, params: Any) -> Conversion:
        conversion = self._planned(params)
        check_arrays(conversion.state)
        self._engine.check()
        held = self._engine.buffers()
        shared = [
            Problem(
                conversion.state.root + path,
                f"the buffer of the engine's {held[pointer(leaf)]}",
                "a buffer of its own",
                "the engine was given the trainer's arrays, which a sync would overwrite: give it copies",
            )
            for path, leaf in conversion.state.leaves.items()
            if pointer(leaf) in held
        ]
        if shared:
            raise PlanError(shared)
        return conversion

    def _compile(self, conversion: Conversion) -> int | None:
        """Compiles what is not compiled yet. Returns the bytes that programs exchange between devices, if known."""
        exchanged: list[int | None] = []
        for job in conversion.jobs(self._bucket_bytes):
            self._route.compile(self._shapes(job))
            if self._route.sends:
                program = conversion.compile(job, self._shardings(job), donating=self._in_place(job))
                exchanged.append(program.received)
        known = [size for size in exchanged if size is not None]
        return sum(known) if len(known) == len(exchanged) else None

    def _write(self, conversion: Conversion, seconds: dict[str, float]) -> int:
        """Converts and assigns; the next job converts while the last one moves. Returns the bytes moved."""
        moving: dict[str, jax.Array] = {}
        ready: dict[str, jax.Array] = {}
        moved = 0
        for job in conversion.jobs(self._bucket_bytes):
            names = [entry.name for entry in job.entries]
            with timed(seconds, "convert"):
                donors = self._take(names) if self._in_place(job) else ()
                made = jax.block_until_ready(self._make(conversion, job, donors))
            if donors:
                ready = dict(zip(names, made, strict=True))
            else:
                with timed(seconds, "transfer"):
                    ready |= jax.block_until_ready(moving)
                    arrived = self._route.send(made, None if self._atomic else self._take(names), self._shapes(job))
                    sources = [array.sharding for array in made] or [None] * len(names)
                    moved += sum(map(moved_bytes, self._shapes(job), sources))
                    moving = dict(zip(names, map(on_sharding, arrived, self._shardings(job)), strict=True))
            if not self._atomic:
                self._assign(ready, seconds)
                ready = {}
        with timed(seconds, "transfer"):
            ready |= jax.block_until_ready(moving)
        self._assign(ready, seconds)
        return moved

    def _make(self, conversion: Conversion, job: Job, donors: Arrays = ()) -> Arrays:
        return conversion.make(job, self._shardings(job), donors) if self._route.sends else ()

    def _assign(self, leaves: dict[str, jax.Array], seconds: dict[str, float]) -> None:
        with timed(seconds, "assign"):
            self._engine.assign(leaves)
            self._written_by |= dict.fromkeys(leaves, self._attempt)

    def _take(self, names: list[str]) -> Arrays:
        donors = tuple(self._engine.take(name) for name in names)
        self._written_by |= dict.fromkeys(names)  # lost, until what is made of them has arrived
        return donors

    def _compared(self, conversion: Conversion) -> Verification:
        engine = self._engine.leaves()
        different = []
        for job in conversion.jobs(self._bucket_bytes):
            names = [entry.name for entry in job.entries]
            expected = fingerprints(self._make(conversion, job))
            held = fingerprints(engine[name] for name in names) if self._route.receives else []
            shared = zip(
                names, self._route.shared(expected, len(names)), self._route.shared(held, len(names)), strict=True
            )
            different += [name for name, made, found in shared if made != found]
        return Verification(len(conversion.plan.entries), tuple(different))

    def _refuse(self, verification: Verification) -> None:
        if verification.different:
            self._written_by |= dict.fromkeys(verification.different)
            raise SyncError(f"after writing, {verification}")

    def _shapes(self, job: Job) -> tuple[jax.ShapeDtypeStruct, ...]:
        return self._engine.shapes([entry.name for entry in job.entries])

    def _shardings(self, job: Job) -> tuple[Any, ...]:
        return self._engine.shardings([entry.name for entry in job.entries])

    def _in_place(self, job: Job) -> bool:
        """Whether one program can read the trainer's arrays and write into the engine's."""
        source = job.source_sharding
        target = self._shardings(job)[0]
        return not self._atomic and source is not None and device_order(source) == device_order(target)
