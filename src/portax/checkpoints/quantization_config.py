"""The `quantization_config` of a hub's `config.json`: how loaders know what is quantised, and how."""

from typing import Any

from portax.layouts import HuggingFace, Layout
from portax.planning.plan import Plan
from portax.weights.recipes import RECIPES, TILE

_EMBEDDING, _HEAD = "embed_tokens", "lm_head"


def quantization_config(layout: Layout, plan: Plan) -> dict[str, Any] | None:
    """Returns the entry that transformers, vLLM and tpu-inference read; None where nothing is quantised.

    Args:
        layout: The layout that made the tensors.
        plan: The tensors.
    """
    if not isinstance(layout, HuggingFace) or layout.quantization is None:
        return None
    recipe = RECIPES[layout.quantization]
    if recipe.tiled:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [TILE, TILE],
            "modules_to_not_convert": kept(plan, recipe.scale),
        }
    kind = "int" if recipe.dtype.startswith("int") else "float"
    numbers = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": kept(plan, recipe.scale),
    }


def kept(plan: Plan, scale: str) -> list[str]:
    """Names of the linears that are not quantised: matrices without scales, but for the embedding.

    Args:
        plan: The tensors.
        scale: The name of the scales of a `weight`.
    """
    names = {entry.name for entry in plan.entries}
    matrices = [
        entry.name.removesuffix(".weight")
        for entry in plan.entries
        if entry.name.endswith(".weight") and len(entry.shape) == 2
    ]
    found = [name for name in matrices if f"{name}.{scale}" not in names and not name.endswith(_EMBEDDING)]
    return found if _HEAD in found else [_HEAD, *found]  # a tied one is a linear all the same
