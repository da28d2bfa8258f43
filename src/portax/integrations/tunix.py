"""Tunix's vLLM sampler and rollout, with `WeightSync` as their `update_params`. Tried with google-tunix 0.1.7.

    ClusterConfig(rollout_engine=functools.partial(VllmRollout, config=maxtext_config), ...)

Importing this module imports Tunix and vLLM.
"""

import contextlib
import dataclasses
import json
from typing import Any

import jax

from portax.errors import MissingPackageError, SyncError
from portax.integrations import tpu_inference
from portax.sync.report import SyncReport
from portax.trainer.param_tree import Params

try:
    from flax import nnx
    from tunix.generate import vllm_sampler
    from tunix.rl.rollout import vllm_rollout
except ModuleNotFoundError as error:
    raise MissingPackageError(
        f"portax.integrations.tunix: no module named {error.name!r}. It needs Tunix, pip install 'portax[tunix]', and "
        "the engine, vllm-tpu. Their pins of qwix exclude each other: install Tunix with --no-deps beside the engine"
    ) from error


class VllmSampler(vllm_sampler.VllmSampler):
    """Tunix's sampler over a live engine, written in place.

    Attributes:
        weight_sync: The sync into the engine; its `torn` is None while all weights belong together.
        report: The report of the last `update_params`; None before the first.
    """

    def __init__(self, tokenizer: Any, config: Any, trainer_config: Any, **options: Any):
        """Starts the engine, and checks that its leaves are those that the trainer's weights give.

        Args:
            tokenizer: As for Tunix's sampler.
            config: Tunix's `VllmConfig`; its key mappings are not used.
            trainer_config: The trainer's model configuration: anything that `portax.read_config` reads.
            **options: Of `WeightSync`.

        Raises:
            ConfigError, LayoutError, PlanError: As for `tpu_inference.weight_sync`.
            SyncError: The engine is to run with LoRA adapters.
        """
        if config.lora_config:
            raise SyncError(
                f"lora_config={config.lora_config!r}: portax writes whole weights, no adapters; leave it unset, and "
                "merge the adapters into the weights before a sync"
            )
        super().__init__(tokenizer=tokenizer, config=config)
        self.report: SyncReport | None = None
        self.weight_sync = tpu_inference.weight_sync(self._engine, trainer_config, **options)

    def update_params(self, updated_weights: Params, filter_types: Any = None) -> None:
        """Writes the trainer's weights into the engine, and sets `report`.

        Args:
            updated_weights: The state of the whole model: as for `converter.convert`.
            filter_types: The filter of the state; `(nnx.Param,)` keeps all weights.

        Raises:
            PlanError: As for `WeightSync`.
            SyncError: As for `WeightSync`, and `tpu_inference.updating`; or the filter leaves out weights.
        """
        _check_filter(filter_types)
        with self._no_steps(), tpu_inference.updating(self._engine):
            self.report = self.weight_sync(updated_weights)

    @property
    def _engine(self) -> Any:
        return self._driver if self.llm is None else self.llm

    def _no_steps(self) -> contextlib.AbstractContextManager:
        """Keeps Tunix's server mode from stepping the engine, and other threads from sending requests to it."""
        return contextlib.nullcontext() if self._driver is None else self._driver._engine_lock


class VllmRollout(vllm_rollout.VllmRollout):
    """Tunix's vLLM rollout over a `VllmSampler` of portax, for `ClusterConfig.rollout_engine`.

    Example:
        >>> engine = functools.partial(VllmRollout, config=maxtext_config, verify=True)
        >>> cluster = RLCluster(actor=model, cluster_config=ClusterConfig(rollout_engine=engine, ...), ...)
        >>> cluster.sync_weights()
    """

    def __init__(
        self,
        rollout_actor: Any,
        tokenizer: Any,
        mesh: jax.sharding.Mesh,
        rollout_config: Any,
        config: Any,
        **options: Any,
    ):
        """Starts an engine with random weights, and gives it the actor's.

        Args:
            rollout_actor: The trainer's model.
            tokenizer: As for Tunix's rollout.
            mesh: The rollout's devices.
            rollout_config: Tunix's `RolloutConfig`; the engine's longest sequence is its `kv_cache_size`.
            config: The trainer's model configuration: anything that `portax.read_config` reads.
            **options: Of `WeightSync`.

        Raises:
            ConfigError, LayoutError, PlanError, SyncError: As for `VllmSampler` and its `update_params`.
        """
        self._sampler = VllmSampler(tokenizer, vllm_config(rollout_config, mesh), config, **options)
        self._sampler.update_params(nnx.state(rollout_actor, ...))  # not all weights are an nnx.Param

    @property
    def sampler(self) -> VllmSampler:
        """The sampler, with its `weight_sync` and `report`."""
        return self._sampler


class MaxTextVllmRollout(VllmRollout):
    """The same, called as MaxText's `train_rl` calls its own class of this name, which Tunix 0.1.7 cannot make.

    An engine that is to run MaxText's own model (`maxtext_config` in vLLM's additional configuration, the rollout's or
    the trainer's) is started with fused experts, unless that says otherwise.

    Example:
        >>> train_rl.MaxTextVllmRollout = portax.integrations.tunix.MaxTextVllmRollout
    """

    def __init__(self, rollout_actor: Any, tokenizer: Any, mesh: Any, rollout_config: Any, maxtext_config: Any):
        rollout_config = _with_fused_experts(rollout_config, maxtext_config)
        super().__init__(rollout_actor, tokenizer, mesh, rollout_config, maxtext_config)


def _with_fused_experts(rollout_config: Any, maxtext_config: Any) -> Any:
    """Sets fused experts, as MaxText's own rollout does; without them its model computes wrong results."""
    given = getattr(rollout_config, "rollout_vllm_additional_config", None)
    given = given or getattr(maxtext_config, "vllm_additional_config", None) or {}
    given = json.loads(given) if isinstance(given, str) else given  # as MaxText's own configuration may have it
    if "maxtext_config" not in given:
        return rollout_config
    overrides = {"prefuse_moe_weights": True, **given["maxtext_config"]}
    return dataclasses.replace(rollout_config, rollout_vllm_additional_config={**given, "maxtext_config": overrides})


def vllm_config(rollout_config: Any, mesh: jax.sharding.Mesh) -> Any:
    """Tunix's `VllmConfig` as its own rollout makes it, without key mappings.

    Args:
        rollout_config: Tunix's `RolloutConfig`.
        mesh: The rollout's devices.
    """
    given = vars(rollout_config)
    fields = [field.name for field in dataclasses.fields(vllm_sampler.VllmConfig) if field.init]
    named = {name: given[key] for name in fields for key in (name, f"rollout_vllm_{name}") if key in given}
    passed = ("async_scheduling", "max_num_batched_tokens", "max_num_seqs", "hf_config_path", "logprobs_mode")
    engine_kwargs = {
        "model": rollout_config.rollout_vllm_model_version,
        "max_model_len": rollout_config.kv_cache_size,
        "max_logprobs": 1,
        **{name: given[f"rollout_vllm_{name}"] for name in passed},
        **rollout_config.rollout_vllm_kwargs,
    }
    return vllm_sampler.VllmConfig(mesh=mesh, engine_kwargs=engine_kwargs, **named)


def _check_filter(filter_types: Any) -> None:
    filters = filter_types if isinstance(filter_types, tuple | list) else (filter_types,)
    if any(kind in (None, nnx.Param) for kind in filters):
        return
    names = ", ".join(getattr(kind, "__name__", repr(kind)) for kind in filters)
    raise SyncError(
        f"update_params with filter_types ({names}): expected nnx.Param, which keeps all weights. Adapters alone "
        "(LoRA) are not written: merge them into the weights, and pass the state of the whole model"
    )
