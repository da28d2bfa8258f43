"""What a weight is.

A converter's hooks return blocks; a layout turns blocks into the arrays that an engine holds. The vocabulary is that
of vLLM's layer classes. Kernels keep the trainer's axes, so a block says *query, heads and head_dim apart*, never
*transposed*. Names are those of the Hugging Face hub, relative to the layer (or, for globals, to the model).

Blocks are frozen dataclasses and registered pytrees: arrays are children, everything else is static. Sequences of
arrays are ordered tuples, never dicts, whose leaves JAX would re-order by key.
"""

import dataclasses
from typing import Literal, TypeAlias, TypeVar, dataclass_transform

import jax
from jaxtyping import Array, Shaped

_T = TypeVar("_T")


def _static(**options):
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(_static, dataclasses.field))
def _block(cls: type[_T]) -> type[_T]:
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_block
class Linear:
    """A matrix product.

    Attributes:
        name: Module name, e.g. `self_attn.o_proj`.
        kernel: `[in, *out]` for a column-parallel product, `[*in, out]` for a row-parallel one, `[in, out]` if
            replicated; any float dtype.
        parallel: Which side tensor parallelism cuts: `column` the output, `row` the input.
    """

    name: str = _static()
    kernel: Shaped[Array, "..."]
    parallel: Literal["column", "row", "replicated"] = _static()


@_block
class MergedLinear:
    """Column-parallel products of one input that an engine may hold as one matrix.

    Attributes:
        name: Module name of the merged matrix, e.g. `mlp.gate_up_proj`.
        hub: Module name on the hub of each group of `parts`, e.g. `("mlp.gate_proj", "mlp.up_proj")`.
        parts: For each name in `hub`, the `[in, *out]` kernels that it concatenates, in order.
    """

    name: str = _static()
    hub: tuple[str, ...] = _static()
    parts: tuple[tuple[Shaped[Array, "in ..."], ...], ...]


@_block
class BareLinear:
    """A matrix product outside the engine's parallel layers, such as a router: held as the hub does, replicated.

    Attributes:
        name: Module name, e.g. `router.proj`.
        kernel: Any float dtype.
    """

    name: str = _static()
    kernel: Shaped[Array, "in out"]


@_block
class GroupedLinear:
    """Column-parallel products of one input that the trainer keeps as one matrix, side by side within each group.

    ```
    2 groups, widths of a and b:   [a0 b0 | a1 b1]   of which an engine makes   a = [a0 a1], b = [b0 b1]
    ```

    Attributes:
        name: Module name of the merged matrix, e.g. `linear_attn.in_proj_qkvz`.
        kernel: The groups one after the other.
        groups: How many there are, e.g. the key heads of a gated delta net.
        widths: Width, within one group, of each product.
        hub: Module name on the hub, and how many of the products it concatenates, in order.
    """

    name: str = _static()
    kernel: Shaped[Array, "in _"]
    groups: int = _static()
    widths: tuple[int, ...] = _static()
    hub: tuple[tuple[str, int], ...] = _static()


@_block
class DepthwiseConv:
    """A causal convolution of each channel by itself, replicated.

    Attributes:
        name: Module name, e.g. `linear_attn.conv1d`.
        kernel: Any float dtype.
    """

    name: str = _static()
    kernel: Shaped[Array, "taps 1 channels"]


@_block
class QKV:
    """The three attention projections of one layer.

    Attributes:
        name: Attention module, e.g. `self_attn`.
        query: Per-head kernels; `dim` may be a multiple of head_dim where a gate rides along.
        key: One kernel per KV head.
        value: As `key`; None where the layer uses its keys as values.
        bias: What is added to queries, keys and values: `[heads, dim]` each.
    """

    name: str = _static()
    query: Shaped[Array, "in heads query_dim"]
    key: Shaped[Array, "in kv_heads dim"]
    value: Shaped[Array, "in kv_heads dim"] | None
    bias: tuple[Shaped[Array, "_ _"], ...] = ()


@dataclasses.dataclass(frozen=True)
class ExpertNames:
    """What the hub calls the matrices of an expert: each by itself, or all experts' stacked.

    Attributes:
        gate: Kernel of the activated branch.
        up: Kernel of the linear branch.
        down: Kernel of the way back.
        gate_up: Both branches side by side, where experts are stacked.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str = "gate_up_proj"


EXPERT_NAMES = ExpertNames()
"""What most of the hub's mixtures of experts call them."""


@_block
class FusedMoE:
    """The routed experts of one layer.

    Attributes:
        name: Experts module, e.g. `mlp.experts`.
        gate: Kernel of the activated branch.
        up: Kernel of the linear branch.
        down: Kernel of the way back.
        hub: Whether the hub stores `each` expert as tensors of its own or all of them `stacked`.
        hub_names: What the hub calls the matrices.
    """

    name: str = _static()
    gate: Shaped[Array, "experts in width"]
    up: Shaped[Array, "experts in width"]
    down: Shaped[Array, "experts width in"]
    hub: Literal["each", "stacked"] = _static()
    hub_names: ExpertNames = _static(default=EXPERT_NAMES)


@_block
class Embedding:
    """A token embedding.

    Attributes:
        name: Module name, e.g. `embed_tokens`.
        table: One row per token.
    """

    name: str = _static()
    table: Shaped[Array, "vocab embed"]


@_block
class LMHead:
    """The output projection of a model that does not tie it to the embedding; stands outside the decoder."""

    kernel: Shaped[Array, "embed vocab"]


@_block
class TiedLMHead:
    """The output projection of a model that uses its embedding table for it.

    Attributes:
        table: The embedding table.
        to: Module name of the embedding it is tied to.
        shared_module: Whether vLLM's model shares the embedding *module* (Qwen3 does) or only its parameter.
    """

    table: Shaped[Array, "vocab embed"]
    to: str = _static()
    shared_module: bool = _static()


@_block
class Param:
    """A parameter that every engine holds as the hub does, replicated: norms, scales, bare routers.

    Attributes:
        name: Full name of the parameter, e.g. `input_layernorm.weight`.
        value: The values, in the hub's axis order.
        float32: Whether it stays float32 whatever the engine's dtype.
    """

    name: str = _static()
    value: Shaped[Array, "..."]
    float32: bool = _static(default=False)


@_block
class TrainerParam:
    """A parameter for an engine that runs the trainer's own model: under the trainer's name, with the trainer's axes.

    Attributes:
        name: The trainer's path, joined by dots, e.g. `self_attention.key.kernel`.
        axes: What MaxText's `logical_axis_rules` call each axis: `vocab`, `heads`, `kv_heads`, `mlp`, `mlp_moe`, `exp`;
            empty for one that no mesh axis cuts; None as a whole where nobody knows.
        value: The values of one layer.
    """

    name: str = _static()
    axes: tuple[str, ...] | None = _static()
    value: Shaped[Array, "..."]


Block: TypeAlias = (
    Linear
    | MergedLinear
    | GroupedLinear
    | BareLinear
    | DepthwiseConv
    | QKV
    | FusedMoE
    | Embedding
    | LMHead
    | TiedLMHead
    | Param
    | TrainerParam
)

Blocks: TypeAlias = tuple[Block, ...]
"""Everything that one hook returns."""
