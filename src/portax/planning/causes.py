"""Likely causes of problems with a trainer's leaves, found by names and shapes: one rule a line."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable
from typing import TypeAlias

from portax.config.model_config import ModelConfig
from portax.trainer.layer_params import Axes

OTHER_MODEL = "the config describes another model (tied or untied, dense or MoE), or the tree holds adapters"
_QUANTISED = "weights quantised by qwix: hand over the weights as they were before; its scales are no part of this"
_PIPELINE = (
    "pipeline stages: a stack of stacks, which is not read. Hand over the layers in one stack, as MaxText does without "
    "pipeline parallelism (ici_pipeline_parallelism=1)"
)
_AXIS = "layers are stacked on axis"
_ENCODER = "an encoder for images or sound, which is no part of this conversion: leave it out with leave=({!r},)"


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A leaf with a problem, and its surroundings.

    Attributes:
        path: Its path below the root, e.g. `decoder/layers/mlp/wo/kernel`.
        found: Its shape; None if it is missing.
        expected: Its axes, as a hook asks for it; None if no hook does.
        types: The types of its layer, from the config.
        config: The model's configuration.
        tree: Paths of all leaves, below the root.
        left: Whole paths of the leaves that were left out.
    """

    path: str
    found: tuple[int, ...] | None
    expected: Axes | None
    types: frozenset[str]
    config: ModelConfig
    tree: Collection[str]
    left: Collection[str]


Rule: TypeAlias = Callable[[Suspect], str | None]

_UNUSED = {
    r"(^|/)(mtp_block|mtp_layer)": (
        "a block that predicts further tokens (MTP), which trains and does not serve: leave it out with "
        "leave=('*/mtp_block/*',)"
    ),
    r"(^|/|_)lora_[ab](/|$)": "LoRA adapters: merge them into the weights they adapt, or leave them out with "
    "leave=('*lora_[ab]*',)",
    r"(^|/)(kernel|wi|wi_0|wi_1|wo)_scale$": (  # MaxText's fp8 models
        "the trainer holds its weights in fp8, and this is a scale of theirs: such trees are not converted; dequantise "
        "them, or train from bfloat16"
    ),
    r"/array/(qvalue|scale|zero_point)$|/(qvalue|qtensor)(/|$)": _QUANTISED,
    r"(^|/)pipeline_module/": _PIPELINE,
    r"^decoder/logits_dense/": "the config says that the output projection is tied to the embedding "
    "(logits_via_embedding), and the tree has one of its own",
}
_MODALITY = re.compile(r"(^|.*/)([a-z_]*(vision|visual|audio|multi_modal|image)[a-z_]*)(/|$)", re.IGNORECASE)


def likely_cause(suspect: Suspect) -> str | None:
    """Returns the most likely cause of a problem with a leaf; None if no rule applies.

    Args:
        suspect: The leaf and its surroundings.
    """
    rules = (_unused,) if suspect.expected is None else _MISSING if suspect.found is None else _SHAPES
    return next((cause for rule in rules if (cause := rule(suspect)) is not None), None)


def of_depth(others: Iterable[str]) -> str:
    """Returns the most likely cause of a number of layers that differs from the config's.

    Args:
        others: Causes of the problems with its leaves.
    """
    stacks = [cause for cause in others if cause == _PIPELINE or cause.startswith(_AXIS)]
    return stacks[0] if stacks else "the config is of another depth, or layers were lost on the way"


def _unused(suspect: Suspect) -> str | None:
    if modality := _MODALITY.match(suspect.path):
        return _ENCODER.format(f"*{modality[2]}/*")
    return next((cause for pattern, cause in _UNUSED.items() if re.search(pattern, suspect.path)), OTHER_MODEL)


def _left_out(suspect: Suspect) -> str | None:
    left = any(path == suspect.path or path.endswith(f"/{suspect.path}") for path in suspect.left)
    return "leave= leaves out what the engine needs" if left else None


def _quantised(suspect: Suspect) -> str | None:
    return _QUANTISED if any(path.startswith(f"{suspect.path}/") for path in suspect.tree) else None


def _tied(suspect: Suspect) -> str | None:
    if suspect.path != "decoder/logits_dense/kernel":
        return None
    return (
        "the model ties its output projection to the embedding, and the config says that it does not "
        "(logits_via_embedding)"
    )


def _router_bias(suspect: Suspect) -> str | None:
    if not suspect.path.endswith("/gate/bias"):
        return None
    return (
        "MaxText keeps this bias in a MoEBiasVar, which is no nnx.Param: hand over nnx.state(model), or "
        "nnx.state(model, (nnx.Param, MoEBiasVar))"
    )


def _latent_queries(suspect: Suspect) -> str | None:
    """Finds queries of latent attention (MLA) that are, or are not, projected by way of a smaller width."""
    forms = {"query/kernel": "wq_a/kernel", "wq_a/kernel": "query/kernel", "wq_b/kernel": "query/kernel"}
    for missing, other in forms.items():
        if suspect.path.endswith(f"self_attention/{missing}") and suspect.path[: -len(missing)] + other in suspect.tree:
            size = getattr(suspect.config, "q_lora_rank", None)
            return f"the config says q_lora_rank={size}, and the tree has {other}: one of them is of another model"
    return None


def _dense_first(suspect: Suspect) -> str | None:
    """Finds a layer of which the config says that it is dense, and the tree that it is not, or the reverse."""
    kind = next((kind for kind in ("dense", "moe") if kind in suspect.types), None)
    stack = re.match(r"decoder/(dense|moe)_layers", suspect.path)
    if kind is None or stack is None or stack[1] == kind:
        return None
    said = getattr(suspect.config, "first_num_dense_layers", None)
    return f"the config says first_num_dense_layers={said}, and the tree has another number of dense layers"


def _wide_mlp(suspect: Suspect) -> str | None:
    if "kv_shared" not in suspect.types or suspect.config.use_double_wide_mlp or "/mlp/" not in suspect.path:
        return None
    wide = suspect.found is not None and 2 * suspect.config.mlp_dim in suspect.found
    return "the config lost use_double_wide_mlp, which is true for Gemma4 E2B" if wide else None


def _stages(suspect: Suspect) -> str | None:
    if suspect.found is None or suspect.expected is None or len(suspect.found) != len(suspect.expected) + 1:
        return None
    return _PIPELINE if _scanned(suspect.expected) else None


def _scan_axis(suspect: Suspect) -> str | None:
    """Finds layers that are stacked on another axis than the config says."""
    if suspect.found is None or suspect.expected is None or [*_scanned(suspect.expected)] == []:
        return None
    own = tuple(size for name, size in suspect.expected if name != "layers")
    at = suspect.config.param_scan_axis
    others = [i for i in range(len(suspect.found)) if i != at and suspect.found[:i] + suspect.found[i + 1 :] == own]
    if not others or suspect.found[:at] + suspect.found[at + 1 :] == own:
        return None
    return f"{_AXIS} {others[0]}, and the config says param_scan_axis={at}"


def _lost_layers(suspect: Suspect) -> str | None:
    if (only := _only_axis(suspect)) is None or only[0] != "layers":
        return None
    return f"this stack holds {only[2]} layers and the others {only[1]}: a checkpoint was cut, or trees were merged"


def _padded(suspect: Suspect) -> str | None:
    if (only := _only_axis(suspect)) is None or only[2] <= only[1]:
        return None
    if "moe_mlp_dim" not in only[0] and only[0] != "num_experts":
        return None
    said = "say so in the config (padded_base_moe_mlp_dim), or " if "moe_mlp_dim" in only[0] else ""
    return (
        f"experts that were padded for a kernel or a mesh, from {only[0]}={only[1]} to {only[2]}: {said}hand them over "
        "without the padding; or the config is of a smaller model"
    )


def _only_axis(suspect: Suspect) -> tuple[str, int, int] | None:
    """Returns name, expected and found size of the only axis that differs; None if several do or none does."""
    if suspect.found is None or suspect.expected is None or len(suspect.found) != len(suspect.expected):
        return None
    differ = [
        (name, size, has) for (name, size), has in zip(suspect.expected, suspect.found, strict=True) if size != has
    ]
    return differ[0] if len(differ) == 1 else None


def _scanned(axes: Axes) -> list[int]:
    return [size for name, size in axes if name == "layers"]


_MISSING: tuple[Rule, ...] = (_left_out, _quantised, _tied, _latent_queries, _dense_first, _router_bias)
_SHAPES: tuple[Rule, ...] = (_wide_mlp, _stages, _scan_axis, _lost_layers, _padded)
