"""A local `vllm.LLM` on tpu-inference, booted with random weights and synced, that generates.

vLLM is imported when an engine is made. Tried with vllm-tpu 0.32.0.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax

from portax._text.timing import timed
from portax.checkpoints import config_json
from portax.errors import MissingPackageError, ValidationError
from portax.integrations.tpu_inference import updating, weight_sync
from portax.validation.session import Engine, Generated, Job, Loaded

_PACKAGES = ("vllm", "tpu_inference")
_BLOCK = 128  # the engine's context is a multiple of it


class Vllm(Engine):
    """An engine for `portax.validation.validate`.

    Every leaf is written by `WeightSync` and compared with the conversion afterwards. Its phases: `load` is the start
    of the engine, if it was given none; `compile` is the sync, planned against the engine's leaves; `sync` is the
    conversion, the writing and the comparison.

    Attributes:
        name: Name and version.
    """

    def __init__(self, llm: Any = None, *, tp: int = 1):
        """Takes an engine, or checks that one can be made.

        Args:
            llm: A `vllm.LLM` of this model, whose core runs in this process; None to make one with random weights.
            tp: Tensor-parallel size of the one that is made.

        Raises:
            MissingPackageError: vLLM or tpu-inference is not installed.
            ValidationError: There is no TPU.
        """
        if llm is None:
            _check_machine(tp)
        self.name = f"vllm on tpu-inference {importlib.metadata.version('tpu-inference')}"
        self._llm = llm
        self._tp = tp
        self._ends: list[int] = []

    def load(self, job: Job) -> Loaded:
        """Boots the engine, if it was given none, and writes the weights.

        Raises:
            LayoutError, PlanError, SyncError: As for `tpu_inference.weight_sync`, and for a sync.
        """
        if self._llm is None:
            with timed(job.seconds, "load"):
                self._llm = _boot(job, self._tp)
        with timed(job.seconds, "compile"):
            sync = weight_sync(self._llm, job.converter.config, params=job.params, verify=True)
        with timed(job.seconds, "sync"), updating(self._llm):
            sync(job.params)
        ends = config_json.field(job.hub_config, "eos_token_id")  # the engine has no tokenizer that would tell it
        self._ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
        return Loaded(sync.plan, sync.plan.ties)

    def generate(self, tokens: Sequence[int], count: int) -> Generated:
        """Generates greedily, to an end-of-sequence token or to that many tokens."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        greedy = SamplingParams(
            max_tokens=count, temperature=0, logprobs=2, detokenize=False, stop_token_ids=self._ends
        )
        (out,) = self._llm.generate([TokensPrompt(prompt_token_ids=list(tokens))], greedy, use_tqdm=False)
        best = (sorted((each.logprob for each in step.values()), reverse=True) for step in out.outputs[0].logprobs)
        return Generated(tuple(out.outputs[0].token_ids), tuple(first - second for first, second, *_ in best))


def _check_machine(tp: int) -> None:
    if absent := [package for package in _PACKAGES if importlib.util.find_spec(package) is None]:
        raise MissingPackageError(
            f"--engine vllm: no module named {absent[0]!r}. It needs vllm-tpu, pip install vllm-tpu, and a TPU; "
            "--engine transformers runs on any CPU"
        )
    devices = jax.devices()
    if devices[0].platform != "tpu" or len(devices) < tp:
        raise ValidationError(
            f"--engine vllm: needs {tp} TPU device{'s' * (tp != 1)}, and JAX finds {len(devices)} of platform "
            f"{devices[0].platform!r} here; --engine transformers runs on any CPU"
        )


def _boot(job: Job, tp: int) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a sync needs the engine's arrays in this process
    from vllm import LLM

    room = len(job.prompt.tokens) + job.max_new_tokens
    with config_json.in_folder(job.hub_config, job.plan) as folder:
        return LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            tensor_parallel_size=tp,
            max_model_len=-(-room // _BLOCK) * _BLOCK,
            max_num_seqs=1,
        )
