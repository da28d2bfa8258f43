"""The worker's side of the backend "portax": checks an update before it starts, and mends what a broken one leaves."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from vllm.distributed.weight_transfer import base
from vllm.model_executor.model_loader.reload import layerwise

from portax.errors import Problem
from portax.integrations.vllm.cpu_repairs import CpuRepairs, NoRepairs, repairs_for
from portax.integrations.vllm.history import History
from portax.integrations.vllm.rehearsal import Arriving, Rehearsal, rehearse
from portax.integrations.vllm.reload_state import EarlyTensors, abort, is_waiting, written_early
from portax.integrations.vllm.unsupported import unsupported


@dataclasses.dataclass
class InitInfo(base.WeightTransferInitInfo):
    """A question before an update.

    Attributes:
        tensors: Name, dtype and shape of every tensor to come; None to ask for the state alone.
        answer: Receives `problems`, and the state: `torn`, and True for `active` while an update goes on.
    """

    answer: dict[str, Any]
    tensors: list | None = None


@dataclasses.dataclass
class UpdateInfo(base.WeightTransferUpdateInfo):
    """Tensors of an update, or its end.

    Attributes:
        tensors: Names and tensors.
        abandon: The reason to end the update here; that raises `AbandonedError`, after which vLLM takes another.
    """

    tensors: list | None = None
    abandon: str = ""


class AbandonedError(RuntimeError):
    """The trainer has given up an update."""


class Receiver(base.WeightTransferEngine[InitInfo, UpdateInfo]):
    """vLLM's layerwise reload of hub tensors, with a rehearsal before it and a way back."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module):
        super().__init__(config, vllm_config, device, model)
        self._expected: dict[str, Arriving] = {}
        self._rehearsal = Rehearsal()
        self._arrived: set[str] = set()
        self._repairs: CpuRepairs | NoRepairs = NoRepairs(model)
        self._early: EarlyTensors = []
        self._history = History()

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Rehearses the update of these tensors, unless the last one was the same, and answers."""
        if init_info.tensors is not None:
            problems = self._plan([Arriving(name, dtype, tuple(shape)) for name, dtype, shape in init_info.tensors])
            init_info.answer["problems"] = [dataclasses.astuple(problem) for problem in problems]
        waiting = self._waiting()
        init_info.answer["active"] = bool(waiting)
        init_info.answer["torn"] = self._history.torn(self._old(waiting))

    def start_weight_update(self) -> None:
        """Takes the parameters away, layer by layer to be given back."""
        if not self._expected or self._rehearsal.problems:
            raise RuntimeError("an update that was not planned, or whose plan has problems")
        self._arrived = set()
        self._history.start(self._expected)
        self._repairs = repairs_for(self.device)(self.model)
        self._early = written_early(self.model)
        layerwise.initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Loads tensors; each finished layer is written into the memory of the old one."""
        try:
            if update_info.abandon:
                raise AbandonedError(update_info.abandon)
            tensors = update_info.tensors or []
            self._check(tensors)
            self.model.load_weights(iter(tensors))
        except BaseException as error:
            self._abort(update_info.abandon or repr(error))
            raise

    def finish_weight_update(self) -> None:
        """Finishes the layers that were not loaded whole, such as padded ones, and repairs what needs it."""
        try:
            if missing := self._expected.keys() - self._arrived:
                raise RuntimeError(f"{len(missing)} tensors have not come: {', '.join(sorted(missing)[:5])}")
            layerwise.finalize_layerwise_reload(self.model, self.model_config)
            self._repairs.finish()
        except BaseException as error:
            self._abort(repr(error))
            raise
        self._early = []
        self._history.end(old=())

    def shutdown(self) -> None:
        """Holds nothing that would have to be released."""

    def _plan(self, tensors: list[Arriving]) -> Sequence[Problem]:
        refused = unsupported(self.vllm_config)
        if refused or tensors == list(self._expected.values()):
            return refused or self._rehearsal.problems
        if self._waiting():
            self._abort("another trainer started another update")
        self._expected = {each.name: each for each in tensors}
        self._rehearsal = rehearse(self.model, tensors)
        return self._rehearsal.problems

    def _check(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Lets only tensors in that were planned, each once."""
        for name, tensor in tensors:
            found = Arriving(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            if self._expected.get(name) != found:
                raise RuntimeError(f"{found} came, and the plan has {self._expected.get(name)}")
            if name in self._arrived:
                raise RuntimeError(f"{name} came twice")
            self._arrived.add(name)

    def _abort(self, cause: str) -> None:
        old = self._old(self._waiting())
        self._repairs.abort()
        abort(self.model, self._early)
        self._history.end(old, cause)

    def _waiting(self) -> set[str]:
        return {path for path, module in self.model.named_modules() if is_waiting(module)}

    def _old(self, waiting: set[str]) -> list[str]:
        """Tensors whose modules are not finished."""
        return [name for name in self._expected if self._rehearsal.modules.get(name, set()) & waiting]
