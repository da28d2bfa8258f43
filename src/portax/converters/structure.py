"""A trainer's layer by structure alone: its leaves under their own names, experts as one block."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import jax.numpy as jnp

from portax.config.model_config import ModelConfig
from portax.errors import Problem
from portax.layouts import Layout
from portax.planning.trace import Hooks
from portax.trainer.layer_params import LayerParams
from portax.weights import blocks
from portax.weights.blocks import Blocks

_Axes: TypeAlias = tuple[str, ...]

_VECTORS = r"(.*/)?(scale|A_log|dt_bias|layer_scalar|pre_forward_scale_2|wq_[ab]/bias|wkv_[ab]/bias|gate/bias|out/bias)"
_RULES: tuple[tuple[str, _Axes], ...] = (  # the path, and what MaxText calls the axes; the number of axes must fit, too
    (r"token_embedder/embedding", ("vocab", "")),
    (r"decoder/logits_dense/kernel", ("", "vocab")),
    (r"(.*/)?embed_tokens_per_layer", ("vocab", "")),
    (r"(.*/)?per_layer_(input_gate|model_projection)/kernel", ("", "mlp")),
    (r"(.*/)?per_layer_projection/kernel", ("mlp", "")),
    (r"(.*/)?query/kernel", ("", "heads", "")),
    (r"(.*/)?(key|value)/kernel", ("", "kv_heads", "")),
    (r"(.*/)?query/bias", ("heads", "")),
    (r"(.*/)?(key|value)/bias", ("kv_heads", "")),
    (r"(.*/)?out/kernel", ("heads", "", "")),
    (r"(.*/)?out/kernel", ("mlp", "")),
    (r"(.*/)?(wq_b|wkv_b)/kernel", ("", "heads", "")),
    (r"(.*/)?(wq_a|wkv_a)/kernel", ("", "")),
    (r"(.*/)?(in_proj_qkvz|in_proj_ba)/kernel", ("", "heads")),
    (r"(.*/)?out_proj/kernel", ("heads", "")),
    (r"(.*/)?conv1d/kernel", ("", "", "")),
    (r"(.*/)?wi(_[01])?/kernel", ("", "mlp")),
    (r"(.*/)?wo/kernel", ("mlp", "")),
    (r"(.*/)?(gate|shared_expert_gate)/kernel", ("", "")),
    (r"(.*/)?per_expert_scale", ("exp",)),
    (r"(.*/)?w[io](_[01])?_bias", ("exp", "activation_mlp")),
    (_VECTORS, ("",)),
)
_EXPERT_KERNEL = re.compile(r"(?P<module>(.*/)?)(?P<kernel>wi|wi_0|wi_1|wo)")


@dataclasses.dataclass
class TrainerNames:
    """The hooks of a model family, for an engine that keeps the trainer's names: they check, structure does the rest.

    Attributes:
        config: The model's configuration.
        layout: The engine's layout.
        family: The hooks that know what the leaves are; leaves that they do not read are left over.
    """

    config: ModelConfig
    layout: Layout
    family: Hooks

    def global_weights(self, model: LayerParams) -> Blocks:
        """Returns the leaves that the family reads outside the layers."""
        self.family.global_weights(model)
        return named_blocks(model, model.expected)

    def layer_blocks(self, layer: LayerParams) -> Blocks:
        """Returns the leaves that the family reads of one layer."""
        self.family.layer_blocks(layer)
        return named_blocks(layer, layer.expected)

    def is_engine_owned(self, name: str) -> bool:
        """Tells whether the engine fills the leaf of this name itself, as the family and its layout say."""
        return self.family.is_engine_owned(name)


def named_blocks(params: LayerParams, paths: Iterable[str]) -> Blocks:
    """The leaves of a layer, or of the model outside its layers, under their own names.

    Args:
        params: The leaves.
        paths: Paths of leaves; those that the tree lacks are passed over.
    """
    experts: dict[str, dict[str, str]] = collections.defaultdict(dict)
    others = []
    for path in [path for path in paths if path in params]:
        match = _EXPERT_KERNEL.fullmatch(path)
        if match:
            experts[match["module"]][match["kernel"]] = path
        else:
            others.append(path)
    found = [block for path in others for block in _named(params, path)]
    return (*found, *(block for module, kernels in experts.items() for block in _experts(params, module, kernels)))


def _named(params: LayerParams, path: str) -> Iterator[blocks.Block]:
    value = params.take(path)
    if value.ndim == 3 and path.endswith("wi/kernel"):  # a dense MLP that the trainer has fused
        parts = jnp.split(value, value.shape[1], axis=1)
        names = [path.replace("wi/kernel", f"wi_{i}/kernel") for i in range(len(parts))]
        kernels = dict(zip(names, (jnp.squeeze(part, 1) for part in parts), strict=True))
    else:
        kernels = {path: value}
    for name, kernel in kernels.items():
        yield blocks.TrainerParam(name.replace("/", "."), axes_of(name, kernel.ndim), kernel)


def _experts(params: LayerParams, module: str, kernels: dict[str, str]) -> Iterator[blocks.Block]:
    fused = "wi" in kernels
    if missing := {"wi", "wo"} - {*kernels} if fused else {"wi_0", "wi_1", "wo"} - {*kernels}:
        _say_missing(params, [module + kernel for kernel in sorted(missing)])
        yield from (blocks.TrainerParam(path, (), params.take(path)) for path in kernels.values())
        return
    if fused:
        gate, up = jnp.split(params.take(kernels["wi"]), 2, axis=-1)
    else:
        gate, up = params.take(kernels["wi_0"]), params.take(kernels["wi_1"])
    name = module.rstrip("/").replace("/", ".")
    yield blocks.FusedMoE(name, gate, up, params.take(kernels["wo"]), hub="stacked")


def _say_missing(params: LayerParams, paths: list[str]) -> None:
    """Records what is missing, unless a family's hooks have done so."""
    known = {problem.leaf for problem in params.problems}
    cause = "the tree was filtered, or the experts are of a form that MaxText 0.2.5 has not"
    expected = "the experts' kernels: wi_0, wi_1 and wo, or wi and wo"
    params.problems += [Problem(path, "nothing", expected, cause) for path in paths if path not in known]


def axes_of(path: str, dimensions: int) -> _Axes | None:
    """Returns MaxText's names for the axes of a leaf that is not scanned; None if no rule covers it.

    Args:
        path: Path relative to the layer, or below the root.
        dimensions: Its number of axes.
    """
    for pattern, axes in _RULES:
        if len(axes) == dimensions and re.fullmatch(pattern, path):
            return axes
    return None


def is_known(path: str, dimensions: int) -> bool:
    """Tells whether a rule covers the partitioning of a leaf.

    Args:
        path: As for `axes_of`.
        dimensions: As for `axes_of`.
    """
    return axes_of(path, dimensions) is not None or _EXPERT_KERNEL.fullmatch(path) is not None
