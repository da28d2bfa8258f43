"""A live vLLM engine on tpu-inference's torchax runner: what it holds, and how to write into it.

Everything is read off the engine; nothing is asked twice. Measured on vllm-tpu and tpu-inference 0.32.0.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from portax.errors import LayoutError, SyncError
from portax.layouts import TpuInference
from portax.models import converter_for
from portax.sync import WeightSync


def model_runner(engine: Any) -> Any:
    """The runner that holds the weights.

    Args:
        engine: A `vllm.LLM`, or what else has its `llm_engine`; or the runner itself.

    Raises:
        SyncError: The engine's core runs in another process, where its arrays cannot be reached.
    """
    if hasattr(engine, "state_leaves"):
        return engine
    executor = engine.llm_engine.model_executor
    if executor is None:
        raise SyncError(
            "the engine's core runs in another process: start it with VLLM_ENABLE_V1_MULTIPROCESSING=0, or make the "
            "WeightSync in that process"
        )
    return executor.driver_worker.model_runner


def engine_state(engine: Any) -> dict[str, Any]:
    """The engine's live leaves by name; writing into this mapping is seen by the next step.

    Args:
        engine: As for `model_runner`.

    Raises:
        LayoutError: The engine runs tpu-inference's native JAX model, whose leaves have other names.
    """
    runner = model_runner(engine)
    if type(runner.state) is not dict:
        raise LayoutError(
            "the engine runs tpu-inference's native JAX model (flax_nnx), whose layout is not covered: start it with "
            "MODEL_IMPL_TYPE=vllm"
        )
    return runner.state


def layout(engine: Any) -> TpuInference:
    """How the engine holds weights: version, tensor-parallel size, attention data parallelism, MoE backend and dtype.

    Args:
        engine: As for `model_runner`.

    Raises:
        LayoutError: It is quantised, or its mesh cuts weights along axes that are not covered.
    """
    runner = model_runner(engine)
    config = runner.vllm_config.model_config
    if config.quantization is not None:
        raise LayoutError(f"the engine is quantised ({config.quantization}); only unquantised weights are written")
    tp, attention_dp = _parallel_sizes(runner.mesh.shape)
    modules = runner.model.model.modules()
    found = [getattr(getattr(module, "quant_method", None), "moe_backend", None) for module in modules]
    backends = {backend.name.lower() for backend in found if backend is not None}
    if len(backends) > 1:
        raise LayoutError(f"the engine's experts run on several backends: {', '.join(sorted(backends))}")
    dtype = jnp.dtype(str(config.dtype).removeprefix("torch."))
    moe_backend = next(iter(backends), "gmm_tp")
    return TpuInference.installed(tp=tp, attention_dp=attention_dp, moe_backend=moe_backend, dtype=dtype)


def _parallel_sizes(mesh: Mapping[str, int]) -> tuple[int, int | None]:
    """Tensor-parallel size as the engine was asked for it, of which `model` is attention's part, and attention_dp."""
    known = ("data", "attn_dp", "model")
    if others := [f"{axis}={size}" for axis, size in mesh.items() if axis not in known and size > 1]:
        raise LayoutError(
            f"the engine's mesh has {', '.join(others)}, and weights that are cut along other axes than attn_dp and "
            "model are not covered: start the engine without expert_parallelism in its sharding strategy and without "
            "context parallelism"
        )
    attention_dp = mesh.get("attn_dp")
    return mesh["model"] * (attention_dp or 1), attention_dp


def wrapper(engine: Any) -> str:
    """What the engine's model class wraps its language model in, e.g. `language_model.`.

    Args:
        engine: As for `model_runner`.

    Raises:
        LayoutError: No leaf is a token embedding.
    """
    names = [re.fullmatch(r"vllm_model\.(.*)model\.embed_tokens\.weight", name) for name in engine_state(engine)]
    found = [match[1] for match in names if match]
    if not found:
        raise LayoutError(
            "the engine's state has no leaf vllm_model.*model.embed_tokens.weight: is it a language model?"
        )
    return found[0]


def weight_sync(engine: Any, config: Any, **options: Any) -> WeightSync:
    """A `WeightSync` into the engine.

    Args:
        engine: As for `model_runner`.
        config: The trainer's configuration.
        **options: Of `WeightSync`.

    Raises:
        ConfigError, LayoutError, PlanError: As for `converter_for` and `WeightSync`.

    Example:
        >>> sync = weight_sync(llm, maxtext_config)
        >>> with updating(llm):
        ...     sync(params)
    """
    converter = converter_for(config, layout=layout(engine), wrapper=wrapper(engine))
    return WeightSync(converter, lambda: engine_state(engine), **options)  # the runner may rebind its state


@contextlib.contextmanager
def updating(llm: Any) -> Iterator[None]:
    """Puts the engine in order around a sync: no stale prefixes before it, a KV cache after it, also after an error.

    Args:
        llm: The `vllm.LLM`, or what else has its `llm_engine`; no request may be in flight.

    Raises:
        SyncError: The prefix cache could not be reset, because requests are in flight.
    """
    core = llm.llm_engine
    if not core.reset_prefix_cache():
        raise SyncError("the prefix cache could not be reset: wait until no request is in flight, then sync")
    core.collective_rpc("start_weight_update")
    try:
        yield
    finally:
        model_runner(llm).refresh_state_leaves()
        core.collective_rpc("finish_weight_update")
