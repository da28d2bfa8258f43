"""An engine in this process: a `vllm.LLM` whose worker is reached without any transport."""

import contextlib
from collections.abc import Iterator
from typing import Any

from portax.errors import SyncError
from portax.integrations.vllm.plugin import BACKEND
from portax.integrations.vllm.torch_views import torch_view


class LocalEngine:
    """The calls of a weight update, on a `vllm.LLM` in this process."""

    def __init__(self, llm: Any):
        """Checks that the engine can be reached, and takes weights by the backend "portax".

        Raises:
            SyncError: Its worker is in another process, or it was started without that backend.
        """
        self._llm = llm
        if not hasattr(llm.llm_engine, "model_executor"):
            raise SyncError(
                "the engine's core runs in another process: set VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM is "
                "imported"
            )
        config = llm.llm_engine.vllm_config
        if config.parallel_config.world_size > 1:
            raise SyncError(
                f"the engine has {config.parallel_config.world_size} workers, which are in other processes; one that "
                "is fed in this process has tensor_parallel_size=1"
            )
        backend = getattr(config.weight_transfer_config, "backend", None)
        if backend != BACKEND:
            raise SyncError(
                f"the engine takes weights by {backend!r}: call portax.integrations.vllm.register() before it is made, "
                f"and make it with weight_transfer_config=WeightTransferConfig(backend={BACKEND!r})"
            )

    def ask(self, tensors: list[tuple] | None) -> dict[str, Any]:
        """Returns what the worker says about an update with these tensors, and about itself."""
        answer: dict[str, Any] = {}
        self._llm.init_weight_transfer_engine({"init_info": {"tensors": tensors, "answer": answer}})
        return answer

    @property
    def identity(self) -> Any:
        """The object that two syncs must not work on at once."""
        return self._llm

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the engine from working on requests.

        Raises:
            SyncError: Requests are in flight: their caches hold what the old weights gave.
        """
        if self._llm.llm_engine.has_unfinished_requests():
            raise SyncError("the engine works on requests; sync when it has finished them, or abort them")
        self._llm.sleep(level=0)
        try:
            yield
        finally:
            self._llm.wake_up(tags=["scheduling"])

    def start(self) -> None:
        """Starts an update; ends one that a trainer left behind which is gone."""
        if self.ask(None)["active"]:
            self.abandon("the trainer that had started it did not finish it")
        self._llm.start_weight_update()

    def update(self, bucket: dict[str, Any]) -> None:
        """Loads converted arrays, without a copy."""
        tensors = [(name, torch_view(array)) for name, array in bucket.items()]
        self._llm.update_weights({"update_info": {"tensors": tensors}})

    def abandon(self, cause: str) -> None:
        """Ends an update that failed; an engine on which none goes on takes no notice."""
        with contextlib.suppress(RuntimeError):
            self._llm.update_weights({"update_info": {"abandon": cause}})

    def finish(self, version: str) -> None:
        """Finishes the update, and drops what was computed by the old weights.

        Raises:
            SyncError: The prefix cache could not be reset, or the engine has another version afterwards.
        """
        self._llm.finish_weight_update(version)
        if not self._llm.reset_prefix_cache():
            raise SyncError("the engine could not reset its prefix cache, which holds what the old weights gave")
        if (found := self._llm.get_weight_version()) != version:
            raise SyncError(f"the engine says that it has the weights {found!r}, and not {version!r}")
