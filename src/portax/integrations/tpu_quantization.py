"""The quantisation of a live tpu-inference engine, as far as the engine tells it.

Measured on tpu-inference 0.32.0. An engine does not tell the recipe of its checkpoint, nor how a TPU
rounds scales: name both.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from portax.errors import MissingPackageError, QuantizationError
from portax.layouts import Quantization

_ONE_BYTE = ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int8", "int4")
_WEIGHTS = (".weight", ".w13_weight", ".w2_weight", ".kernel_gating_upproj_EDF", ".kernel_down_proj_EFD")


def quantization(
    runner: Any, leaves: Mapping[str, Any], *, native: bool, recipe: str | None, scale_form: str | None
) -> Quantization | None:
    """Returns the engine's settings of quantisation; None if it quantises nothing.

    Args:
        runner: The engine's runner.
        leaves: Its leaves, by name.
        native: True for a native JAX model.
        recipe: The recipe of its fp8 checkpoint, which it does not tell.
        scale_form: The rounding of scales by its compiler; None, on CPU, for XLA's there.

    Raises:
        QuantizationError: No engine was run in this way, it computes wrong results, or it does not tell enough.
    """
    quantised = [name for name, leaf in leaves.items() if str(leaf.dtype) in _ONE_BYTE]
    method = runner.vllm_config.model_config.quantization
    if not quantised:
        if method is not None:
            raise QuantizationError(f"the engine is quantised ({method}), and holds no leaf of eight bits or fewer")
        return None
    _refuse_lost_scales(quantised, leaves)
    found = Quantization.of_environment(
        _environment(native=native),
        checkpoint=_checkpoint(runner.vllm_config.model_config, recipe),
        scale_form=scale_form or scale_form_of(runner),
    )
    if found is None:
        raise QuantizationError(
            f"the engine holds {quantised[0]} as {leaves[quantised[0]].dtype}, and neither its checkpoint nor its "
            "environment says why; was the environment changed after it had loaded its weights?"
        )
    return found


def _refuse_lost_scales(quantised: list[str], leaves: Mapping[str, Any]) -> None:
    for name in quantised:
        companions = (f"{name}{end}" for end in ("_scale", "_scale_inv", "_weight_scale"))
        if name.endswith(_WEIGHTS) and not any(companion in leaves for companion in companions):
            raise QuantizationError(
                f"the engine holds {name} as {leaves[name].dtype} and no scales for it: it computes wrong. On torchax "
                "that comes of MOE_REQUANTIZE_WEIGHT_DTYPE with a bfloat16 checkpoint: unset it"
            )


def _checkpoint(config: Any, recipe: str | None) -> str:
    if config.quantization is None:
        if recipe is not None:
            raise QuantizationError(f"recipe={recipe!r}, and the engine loaded a checkpoint that is not quantised")
        return "bf16"
    if config.quantization == "compressed-tensors":
        return _compressed_tensors(config.hf_config.quantization_config)
    if config.quantization != "fp8":
        raise QuantizationError(f"the engine is quantised ({config.quantization}), which was not run")
    blocks = _field(config.hf_config.quantization_config, "weight_block_size")
    if blocks is None or list(blocks) != [128, 128]:
        raise QuantizationError(f"the engine loaded an fp8 checkpoint with weight_block_size={blocks}, not [128, 128]")
    if recipe is None or not recipe.startswith("fp8-block"):
        raise QuantizationError(
            f"recipe={recipe!r}: the engine loaded an fp8 checkpoint in blocks and does not tell who made it: pass "
            "recipe='fp8-block' (DeepGEMM's, as vLLM carries it) or recipe='fp8-block-hf' (transformers')"
        )
    return recipe


def _compressed_tensors(config: Any) -> str:
    groups = list(dict(_field(config, "config_groups") or {}).values())
    weights = _field(groups[0], "weights") if len(groups) == 1 else None
    told = {name: _field(weights, name) for name in ("num_bits", "type", "strategy", "symmetric")}
    kinds = {"int": "ct-int8", "float": "ct-fp8"}
    if told["type"] not in kinds or told != told | {"num_bits": 8, "strategy": "channel", "symmetric": True}:
        raise QuantizationError(f"the engine loaded a compressed-tensors checkpoint of a kind that was not run: {told}")
    return kinds[told["type"]]


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _environment(*, native: bool) -> dict[str, str]:
    """Returns the settings in the environment of the engine's process; a native JAX model ignores those of linears."""
    try:
        told = importlib.import_module("tpu_inference.envs")
    except ImportError:
        raise MissingPackageError(
            "tpu-inference is not installed here: make the WeightSync in the engine's process"
        ) from None
    values = {name: getattr(told, name, None) for name in Quantization.variables()}
    return {
        name: _as_variable(value)
        for name, value in values.items()
        if value not in (None, "", False, []) and not (native and name.startswith("BF16_LINEAR_"))
    }


def _as_variable(value: Any) -> str:
    """Returns the text of an environment variable, which the engine tells as it has read it."""
    return "1" if value is True else ",".join(value) if isinstance(value, list) else str(value)


def scale_form_of(runner: Any) -> str:
    """Returns the rounding of scales by the engine's compiler, where it was seen: on CPU.

    Args:
        runner: The engine's runner.

    Raises:
        QuantizationError: The engine is on other devices.
    """
    platforms = {device.platform for device in runner.mesh.devices.flat}
    if platforms != {"cpu"}:
        raise QuantizationError(
            f"scale_form=None on {', '.join(sorted(platforms))}: whether scales are rounded to bfloat16 there was not "
            "seen. Pass scale_form='narrow' or 'wide', and before the first sync compare with what the engine loaded "
            "itself: sync.verify(parameters_of_its_checkpoint)"
        )
    return "xla_cpu"
