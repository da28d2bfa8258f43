"""`VllmSync`: keeps a stock vLLM engine equal to a trainer, through vLLM's own weight-transfer API."""

from typing import Any

from portax._text.timing import timed
from portax.converters.base import BaseConverter
from portax.errors import PlanError, Problem
from portax.execution.byte_counts import byte_count
from portax.integrations.vllm.hub_layout import check_hub_layout
from portax.integrations.vllm.local_engine import LocalEngine
from portax.planning.plan import Plan
from portax.sync.claim import Claim
from portax.sync.report import PHASES, SyncReport, Torn, writing_seconds
from portax.trainer.param_tree import Params


class VllmSync:
    """Keeps the weights of a `vllm.LLM` equal to a trainer's.

    Before an engine's first weight moves, vLLM's own loaders are run on tensors without memory: every tensor of the
    trainer has to go somewhere, and every parameter of the engine has to be filled whole. vLLM itself is silent there.

    Attributes:
        version: Number of completed syncs; the engine's `get_weight_version()` tells it, too.
        plan: The tensors of the last sync; None before the first.

    Example:
        >>> portax.integrations.vllm.register()
        >>> llm = LLM(model, load_format="dummy", weight_transfer_config=WeightTransferConfig(backend="portax"))
        >>> sync = portax.integrations.vllm.VllmSync(llm, converter)
        >>> print(sync(params))
    """

    def __init__(self, llm: Any, converter: BaseConverter, *, params: Params | None = None, bucket_bytes: int = 2**28):
        """Finds the engine's worker; writes nothing.

        Args:
            llm: A `vllm.LLM` in this process, made with the weight-transfer backend "portax".
            converter: A converter with the layout `HuggingFace`, in the engine's dtype.
            params: The trainer's parameters, or their shapes: checks them against the engine now, and not in the first
                sync.
            bucket_bytes: Most bytes in work at a time.

        Raises:
            ConfigError: `bucket_bytes` is no number of bytes.
            LayoutError: The converter's layout is another one.
            PlanError: As for a sync, with `params`.
            SyncError: The engine is in another process, or was made without that backend.
        """
        check_hub_layout(converter)
        self.version = 0
        self.plan: Plan | None = None
        self._converter = converter
        self._engine = LocalEngine(llm)
        self._bucket_bytes = byte_count("bucket_bytes", bucket_bytes)
        if params is not None:
            self._checked(params)

    def __call__(self, params: Params) -> SyncReport:
        """Writes the trainer's weights into the engine.

        Args:
            params: As for `converter.convert`.

        Returns:
            A report, with the time of each phase: `assign` is vLLM's loading, `transfer` its pause, and its end.

        Raises:
            PlanError: The trainer's tree, or what the engine would make of it, is not what it should be; nothing was
                written.
            SyncError: Another sync into this engine is running, requests are in flight, or the engine is not as it
                should be afterwards.
        """
        claim = Claim()
        with claim.lock:
            claim.take(lambda: [self._engine.identity])
            return self._sync(params)

    @property
    def torn(self) -> Torn | None:
        """The remains of a sync that failed half-way, by this object or another; None while all belongs together.

        The engine itself tells it.
        """
        found = self._engine.ask(None)["torn"]
        return None if found is None else Torn(**found)

    def _sync(self, params: Params) -> SyncReport:
        seconds = dict.fromkeys(PHASES, 0.0)
        with timed(seconds, "plan"):
            plan = self._checked(params)
        with self._engine.paused():
            self._write(params, seconds)
        self.version += 1
        return SyncReport(
            version=self.version,
            leaves=len(plan.entries),
            seconds=seconds,
            bytes_read=plan.bytes_in,
            bytes_written=plan.bytes_out,
            bytes_moved=0,
            peak_bytes=None,
            verification=None,
            standstill=writing_seconds(seconds),
            left=plan.left,
        )

    def _checked(self, params: Params) -> Plan:
        plan = self._converter.plan(params)
        answer = self._engine.ask([(entry.name, entry.dtype.name, entry.shape) for entry in plan.entries])
        if answer["problems"]:
            raise PlanError([Problem(*found) for found in answer["problems"]], plan)
        self.plan = plan
        return plan

    def _write(self, params: Params, seconds: dict[str, float]) -> None:
        with timed(seconds, "transfer"):
            self._engine.start()
        try:
            buckets = self._converter.stream(params, bucket_bytes=self._bucket_bytes)
            while True:
                with timed(seconds, "convert"):
                    bucket = next(buckets, None)
                if bucket is None:
                    break
                with timed(seconds, "assign"):
                    self._engine.update(bucket)
            with timed(seconds, "transfer"):
                self._engine.finish(str(self.version + 1))
        except BaseException as error:
            self._engine.abandon(repr(error))
            raise
