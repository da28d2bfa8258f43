"""Blocks: each says what a group of weights is, whichever engine will hold it.

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
        kernel: `[in, *out]` for a column-parallel product, `[*in, out]` for a row-parallel one, `[in, out]` for a
            replicated one; any float dtype.
        parallel: The side that tensor parallelism cuts: `column` for the output, `row` for the input.
        bias: Vector that is added to the output; None without.

    Example:
        >>> block = blocks.Linear("self_attn.o_proj", jnp.ones((4, 16, 64)), "row")  # heads, head_dim, embed
        >>> [(tensor.name, tensor.array.shape, tensor.spec) for tensor in layout.lower(block)]
        [('self_attn.o_proj.weight', (64, 64), P('model', None))]
    """

    name: str = _static()
    kernel: Shaped[Array, "..."]
    parallel: Literal["column", "row", "replicated"] = _static()
    bias: Shaped[Array, " out"] | None = None


@_block
class MergedLinear:
    """Column-parallel products of one input that an engine may hold as one matrix.

    Attributes:
        name: Module name of the merged matrix, e.g. `mlp.gate_up_proj`.
        hub: Module name on the hub of each group of `parts`, e.g. `("mlp.gate_proj", "mlp.up_proj")`.
        parts: For each name in `hub`, the `[in, *out]` kernels that it concatenates, in order.

    Example:
        >>> gate, up = jnp.ones((64, 128)), jnp.ones((64, 128))
        >>> block = blocks.MergedLinear("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), ((gate,), (up,)))
        >>> [tensor.array.shape for tensor in layout.lower(block)]
        [(64, 256)]
    """

    name: str = _static()
    hub: tuple[str, ...] = _static()
    parts: tuple[tuple[Shaped[Array, "in ..."], ...], ...]


@_block
class BareLinear:
    """A matrix product outside the engine's parallel layers, such as a router; replicated, with the hub's axes.

    Attributes:
        name: Module name, e.g. `router.proj`.
        kernel: Any float dtype.

    Example:
        >>> block = blocks.BareLinear("router.proj", jnp.ones((64, 8)))
        >>> [tensor.array.shape for tensor in layout.lower(block)]
        [(8, 64)]
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
        groups: Number of groups, e.g. the key heads of a gated delta net.
        widths: Width of each product within one group.
        hub: Module names on the hub, each with the number of products that it concatenates, in order.

    Example:
        >>> products = (("mixer.a", 1), ("mixer.b", 1))
        >>> block = blocks.GroupedLinear("mixer.in_proj", jnp.ones((64, 48)), 2, (16, 8), products)
        >>> [tensor.array.shape for tensor in portax.layouts.HuggingFace().lower(block)]
        [(32, 64), (16, 64)]
    """

    name: str = _static()
    kernel: Shaped[Array, "in _"]
    groups: int = _static()
    widths: tuple[int, ...] = _static()
    hub: tuple[tuple[str, int], ...] = _static()


@_block
class DepthwiseConv:
    """A causal convolution of each channel by itself; replicated.

    Attributes:
        name: Module name, e.g. `linear_attn.conv1d`.
        kernel: Any float dtype.

    Example:
        >>> block = blocks.DepthwiseConv("linear_attn.conv1d", jnp.ones((4, 1, 64)))
        >>> [tensor.array.shape for tensor in layout.lower(block)]
        [(64, 1, 4)]
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
        bias: Biases of queries, keys and values, `[heads, dim]` each; empty without.

    Example:
        >>> key = value = jnp.ones((64, 2, 16))
        >>> block = blocks.QKV("self_attn", jnp.ones((64, 4, 16)), key, value)
        >>> [(tensor.name, tensor.array.shape) for tensor in layout.lower(block)]
        [('self_attn.qkv_proj.weight', (64, 128))]
    """

    name: str = _static()
    query: Shaped[Array, "in heads query_dim"]
    key: Shaped[Array, "in kv_heads dim"]
    value: Shaped[Array, "in kv_heads dim"] | None
    bias: tuple[Shaped[Array, "_ _"], ...] = ()


@_block
class LatentKV:
    """Makes keys and values of what multi-head latent attention (MLA) caches: for each head, keys and then values.

    Attributes:
        name: Module name on the hub, e.g. `self_attn.kv_b_proj`.
        kernel: For each head, the part of its keys that does not rotate, and its values.
        key_dim: Width of that part of the keys.
        sparse: True if an indexer selects the tokens that are attended to.

    Example:
        >>> block = blocks.LatentKV("self_attn.kv_b_proj", jnp.ones((32, 4, 16 + 24)), key_dim=16)
        >>> [tensor.array.shape for tensor in portax.layouts.HuggingFace().lower(block)]
        [(160, 32)]
    """

    name: str = _static()
    kernel: Shaped[Array, "latent heads key_and_value"]
    key_dim: int = _static()
    sparse: bool = _static(default=False)


@dataclasses.dataclass(frozen=True)
class ExpertNames:
    """The hub's names for the matrices of an expert, or of all experts stacked.

    Attributes:
        gate: Kernel of the activated branch.
        up: Kernel of the linear branch.
        down: Kernel of the way back.
        gate_up: Both branches side by side, where experts are stacked.

    Example:
        >>> blocks.ExpertNames(gate="w1", up="w3", down="w2").up
        'w3'
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str = "gate_up_proj"


EXPERT_NAMES = ExpertNames()
"""The names in most of the hub's mixtures of experts."""


@_block
class FusedMoE:
    """The routed experts of one layer.

    Attributes:
        name: Experts module, e.g. `mlp.experts`.
        gate: Kernel of the activated branch.
        up: Kernel of the linear branch.
        down: Kernel of the way back.
        hub: The hub's form: `each` expert has tensors of its own; all are `stacked`, `[out, in]`; or they are
            `alternating`: stacked, `[in, out]`, and every column of gate is followed by its column of up.
        hub_names: The hub's names of the matrices.
        bias: Vectors that are added behind gate, up and down, `[experts, out]` each; empty without.

    Example:
        >>> gate = up = jnp.ones((8, 64, 256))
        >>> block = blocks.FusedMoE("mlp.experts", gate, up, jnp.ones((8, 256, 64)), hub="each")
        >>> [tensor.name for tensor in layout.lower(block)]
        ['mlp.experts.routed_experts.w13_weight', 'mlp.experts.routed_experts.w2_weight']
    """

    name: str = _static()
    gate: Shaped[Array, "experts in width"]
    up: Shaped[Array, "experts in width"]
    down: Shaped[Array, "experts width in"]
    hub: Literal["each", "stacked", "alternating"] = _static()
    hub_names: ExpertNames = _static(default=EXPERT_NAMES)
    bias: tuple[Shaped[Array, "experts _"], ...] = ()


@_block
class Embedding:
    """A token embedding.

    Attributes:
        name: Module name, e.g. `embed_tokens`.
        table: One row per token.

    Example:
        >>> [tensor.array.shape for tensor in layout.lower(blocks.Embedding("embed_tokens", jnp.ones((250, 64))))]
        [(256, 64)]
    """

    name: str = _static()
    table: Shaped[Array, "vocab embed"]


@_block
class LMHead:
    """The output projection of a model that does not tie it to the embedding; stands outside the decoder.

    Example:
        >>> [tensor.name for tensor in layout.lower(blocks.LMHead(jnp.ones((64, 256))))]
        ['lm_head.weight']
    """

    kernel: Shaped[Array, "embed vocab"]


@_block
class TiedLMHead:
    """The output projection of a model that uses its embedding table for it.

    Attributes:
        table: The embedding table.
        to: Module name of the embedding it is tied to.
        shared_module: True if vLLM's model shares the embedding *module* (as Qwen3 does), False if only its parameter.

    Example:
        >>> block = blocks.TiedLMHead(jnp.ones((256, 64)), to="embed_tokens", shared_module=True)
        >>> [tensor.tied_to for tensor in layout.lower(block)]
        ['embed_tokens.weight']
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
        float32: True if it stays float32 whatever the engine's dtype.
        again: Full names under which other modules of a loaded engine hold the same values as leaves of their own.

    Example:
        >>> [tensor.array.dtype for tensor in layout.lower(blocks.Param("norm.weight", jnp.ones(64)))]
        [dtype(bfloat16)]
    """

    name: str = _static()
    value: Shaped[Array, "..."]
    float32: bool = _static(default=False)
    again: tuple[str, ...] = _static(default=())


@_block
class TrainerParam:
    """A parameter for an engine that runs the trainer's own model: under the trainer's name, with the trainer's axes.

    Attributes:
        name: The trainer's path, joined by dots, e.g. `self_attention.key.kernel`.
        axes: The name of each axis in MaxText's `logical_axis_rules`: `vocab`, `heads`, `kv_heads`, `mlp`, `mlp_moe`,
            `exp`; empty for an axis that no mesh axis cuts; None as a whole if unknown.
        value: The values of one layer.

    Example:
        >>> block = blocks.TrainerParam("self_attention.key.kernel", ("", "kv_heads", ""), jnp.ones((64, 2, 16)))
        >>> [tensor.spec for tensor in portax.layouts.MaxTextVllm(version="0.2.5", tp=2).lower(block)]
        [P(None, 'model')]
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
    | LatentKV
    | FusedMoE
    | Embedding
    | LMHead
    | TiedLMHead
    | Param
    | TrainerParam
)

Blocks: TypeAlias = tuple[Block, ...]
"""Everything that one hook returns."""
