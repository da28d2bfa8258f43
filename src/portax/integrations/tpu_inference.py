"""A live vLLM engine on tpu-inference, with a torchax, native or MaxText model: its leaves, its layout, its syncs.

Everything is read off the engine. Measured on vllm-tpu and tpu-inference 0.32.0.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from portax._text.names import fold
from portax.converters import converter_for
from portax.errors import LayoutError, QuantizationError, SyncError
from portax.integrations import maxtext_vllm
from portax.integrations.tpu_quantization import quantization, scale_form_of
from portax.layouts import FlaxNnx, MaxTextVllm, TpuInference
from portax.sync.engine_state import EngineState
from portax.sync.weight_sync import WeightSync

_LATENT = re.compile(r"\.W_U(K_T|V)(_scale)?$")  # quantised to the KV cache's dtype, and to no other setting's
_EMBEDDINGS = {  # by whether the model is a native JAX one: the token embedding's name, and how to tell of it
    False: (r"vllm_model\.(.*)model\.embed_tokens\.weight", "vllm_model.*model.embed_tokens.weight"),
    True: (r"model\.(.*)embed(?:_tokens\.weight|\.embedding)", "model.*embed_tokens.weight"),
}


def model_runner(engine: Any) -> Any:
    """Returns the runner that holds the weights.

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


def engine_state(engine: Any) -> Mapping[str, Any]:
    """Returns the engine's live leaves: a dict by name, or the nested `nnx.State` of a native JAX model.

    For MaxText's own model it is the variables by name, without the engine's own.

    The engine's next step sees leaves that are written into a dict. Leaves written into an `nnx.State` need a call of
    the runner's `refresh_state_leaves()` first.

    Args:
        engine: As for `model_runner`.

    Raises:
        SyncError: The draft model of speculative decoding holds some of the same arrays, or the engine computes with
            copies of weights that are not among its leaves (the sinks of gpt-oss).
    """
    runner = model_runner(engine)
    _refuse_shared_draft(runner)
    _refuse_copied_sinks(runner)
    return maxtext_vllm.trainer_state(runner.state) if maxtext_vllm.is_maxtext(runner) else runner.state


def _refuse_shared_draft(runner: Any) -> None:
    """Refuses a draft that shares the target's embedding: it would keep a deleted array, or old weights."""
    draft = getattr(runner, "drafter", None)
    held = [getattr(draft, name, None) for name in ("state", "state_leaves")]
    theirs = {id(leaf) for leaf in jax.tree.leaves(held) if isinstance(leaf, jax.Array)}
    if not theirs:
        return
    if shared := [name for name, leaf in EngineState(runner.state).leaves().items() if id(leaf) in theirs]:
        raise SyncError(
            f"the engine's draft ({type(draft).__name__}) holds the very array of {', '.join(fold(shared))}: a sync "
            "writes into it or replaces it, and does not update the draft. Start the engine without "
            "speculative_config, or with a draft that has weights of its own"
        )


def _refuse_copied_sinks(runner: Any) -> None:
    """Refuses attention that computes with a copy of its sinks: writing the leaf would change nothing.

    Source: tpu-inference 0.32, layers/vllm/backends/flash_attn.py (process_weights_after_loading). The copy is no leaf,
    and a constant of the compiled step, so that a sync cannot replace it either.
    """
    names = [name for name in EngineState(runner.state).leaves() if name.endswith(".sinks")]
    if not names or _native(runner):
        return
    modules = runner.model.model.modules()
    if any(getattr(getattr(module, "impl", None), "sinks", None) is not None for module in modules):
        raise SyncError(
            f"the engine computes with a float32 copy of {', '.join(fold(names))} that its attention made while it "
            "loaded, and that is compiled into its step: after a sync it would go on with the old sinks, without an "
            "error. tpu-inference 0.32 cannot be given new ones: restart the engine from an export instead"
        )


def layout(
    engine: Any, *, experts: str = "per_shard", recipe: str | None = None, scale_form: str | None = None
) -> TpuInference | FlaxNnx | MaxTextVllm:
    """Returns the engine's layout: implementation, version, parallel sizes, MoE backend, dtype and quantisation.

    Args:
        engine: As for `model_runner`.
        experts: The order of experts in MaxText's own model; see `MaxTextVllm`. Other models have only one.
        recipe: The recipe of the fp8 block checkpoint that the engine loaded, which it does not tell: `fp8-block` or
            `fp8-block-hf`; see `Quantization`.
        scale_form: The rounding of scales by the engine's compiler; see `Quantization`. None for an engine on CPU.

    Raises:
        LayoutError: The engine quantises in a way that was not run or is wrong, or its mesh cuts weights along unknown
            axes.
    """
    runner = model_runner(engine)
    config = runner.vllm_config.model_config
    if maxtext_vllm.is_maxtext(runner):
        if config.quantization is not None:
            raise QuantizationError(f"the engine is quantised ({config.quantization}): MaxText's own model was not run")
        return maxtext_vllm.layout(runner, experts=experts)
    if experts != "per_shard":
        raise LayoutError(f"experts={experts!r} is for an engine that runs MaxText's own model")
    tp, attention_dp = _parallel_sizes(runner.mesh.shape)
    backends = {backend.name.lower() for backend in _moe_backends(runner) if backend is not None}
    if len(backends) > 1:
        raise LayoutError(f"the engine's experts run on several backends: {', '.join(sorted(backends))}")
    dtype = jnp.dtype(str(config.dtype).removeprefix("torch."))
    options: dict[str, Any] = {"tp": tp, "moe_backend": next(iter(backends), "gmm_tp"), "dtype": dtype}
    leaves = EngineState(runner.state).leaves()
    others = {name: leaf for name, leaf in leaves.items() if not _LATENT.search(name)}
    options["quantization"] = quantization(runner, others, native=_native(runner), recipe=recipe, scale_form=scale_form)
    if len(others) < len(leaves) and not _native(runner):
        options["kv_cache_dtype"] = str(runner.vllm_config.cache_config.cache_dtype)
        options["kv_scale_form"] = scale_form or scale_form_of(runner)
    if not _native(runner):
        return TpuInference.installed(attention_dp=attention_dp, **options)
    if attention_dp is not None:
        raise LayoutError(
            "the engine runs its native JAX model (flax_nnx) on the mesh of NEW_MODEL_DESIGN=1, which was not run: "
            "start it without that, or with MODEL_IMPL_TYPE=vllm"
        )
    return FlaxNnx.installed(**options)


def _native(runner: Any) -> bool:
    """Tells whether the model is a native JAX one; torchax has a plain dict."""
    return type(runner.state) is not dict


def _moe_backends(runner: Any) -> Iterable[Any]:
    """Returns the expert backend that each module of the model states; None if it has none."""
    if not _native(runner):
        modules = runner.model.model.modules()
        return [getattr(getattr(module, "quant_method", None), "moe_backend", None) for module in modules]
    from flax import nnx  # the engine's own dependency, not ours

    return [getattr(module, "moe_backend", None) for _, module in nnx.iter_modules(runner.model)]


def _parallel_sizes(mesh: Mapping[str, int]) -> tuple[int, int | None]:
    """Returns the tensor-parallel size that the engine was asked for, of which `model` is a part, and attention_dp."""
    known = ("data", "attn_dp", "model")
    if others := [f"{axis}={size}" for axis, size in mesh.items() if axis not in known and size > 1]:
        raise LayoutError(
            f"the engine's mesh has {', '.join(others)}, and weights that are cut along other axes than attn_dp and "
            "model are not covered: start the engine without expert_parallelism in its sharding strategy and without "
            "context parallelism"
        )
    attention_dp = mesh.get("attn_dp")
    return mesh["model"] * (attention_dp or 1), attention_dp


def module_prefix(engine: Any) -> str:
    """Returns the module around the language model in the engine's model class, e.g. `language_model.`.

    Args:
        engine: As for `model_runner`.

    Raises:
        LayoutError: No leaf is a token embedding.
    """
    if maxtext_vllm.is_maxtext(model_runner(engine)):
        return ""
    pattern, told = _EMBEDDINGS[_native(model_runner(engine))]
    names = [re.fullmatch(pattern, name) for name in EngineState(model_runner(engine).state).leaves()]
    found = [match[1] for match in names if match]
    if not found:
        raise LayoutError(f"the engine's state has no leaf {told}: is it a language model?")
    return found[0]


def weight_sync(
    engine: Any,
    config: Any,
    *,
    experts: str | None = None,
    recipe: str | None = None,
    scale_form: str | None = None,
    **options: Any,
) -> WeightSync:
    """Makes a `WeightSync` into the engine.

    Args:
        engine: As for `model_runner`.
        config: The trainer's configuration.
        experts: As for `layout`; None for its default.
        recipe: As for `layout`.
        scale_form: As for `layout`.
        **options: Of `WeightSync`.

    Raises:
        ConfigError, LayoutError, PlanError: As for `converter_for` and `WeightSync`.
        SyncError: As for `engine_state`; also from every later sync.

    Example:
        >>> sync = weight_sync(llm, maxtext_config)
        >>> with updating(llm):
        ...     sync(params)
    """
    told = {} if experts is None else {"experts": experts}
    held = layout(engine, recipe=recipe, scale_form=scale_form, **told)
    converter = converter_for(config, layout=held, module_prefix=module_prefix(engine))
    return WeightSync(converter, lambda: engine_state(engine), **options)  # the runner may rebind its state


@contextlib.contextmanager
def updating(llm: Any) -> Iterator[None]:
    """Prepares the engine for a sync, by dropping stale prefixes, and restores its KV cache afterwards.

    The cache is restored also after an error. The engine's workers do it, so the core may be in this process or in
    another one.

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
        try:
            core.collective_rpc("refresh_model_state_leaves")
        finally:
            core.collective_rpc("finish_weight_update")
