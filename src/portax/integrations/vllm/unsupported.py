"""Settings of an engine that were not run with portax, and that a weight update might get wrong in silence."""

from typing import Any

from portax.errors import Problem


def unsupported(vllm_config: Any) -> list[Problem]:
    """Returns a problem for each setting of an engine that is refused.

    Args:
        vllm_config: vLLM's whole configuration.
    """
    parallel = vllm_config.parallel_config
    found = {
        "quantization": vllm_config.model_config.quantization,
        "LoRA": vllm_config.lora_config and "adapters",
        "speculative decoding": vllm_config.speculative_config and "a draft model",
        "pipeline_parallel_size": parallel.pipeline_parallel_size if parallel.pipeline_parallel_size > 1 else None,
        "enable_eplb": parallel.enable_eplb or None,
    }
    return [
        Problem(
            f"the engine's {name}",
            str(value),
            "none, which is all that was run",
            "the engine was started with it; what a weight update does to it is not known",
        )
        for name, value in found.items()
        if value
    ]
