"""`Layout`: turns the blocks that a converter returns into the arrays that one kind of engine holds."""

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from portax.errors import LayoutError
from portax.layouts.native_model import NativeModel
from portax.weights import bits, blocks, kernels
from portax.weights.parts import in_hub_layer

_Block = TypeVar("_Block", bound=blocks.Block)

OTHER_MODALITIES = r"(visual|vision_tower|multi_modal_projector|embed_vision|audio_tower|embed_audio)\."
"""Regular expression for modules beside a language model, in an engine and in a hub checkpoint."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["array"],
    meta_fields=["name", "spec", "in_decoder", "tied_to", "lossy", "rounded_to", "refuses_values"],
)
@dataclasses.dataclass(frozen=True)
class Tensor:
    """One leaf of an engine's state.

    Attributes:
        name: Name relative to the layer, or to the decoder for weights outside the layers.
        array: The values, in the engine's axis order and dtype (or their shape, in a plan).
        spec: Its partitioning in the engine.
        in_decoder: False for the output projection, which stands beside the decoder.
        tied_to: Name of the leaf whose values it repeats, if the model ties them.
        lossy: The steps that lose precision after the cast to the layout's dtype, such as quantisation.
        rounded_to: The dtype that its values were cast to before they were widened to its own; None if they were not.
        refuses_values: True for scales that have to be finite; see `Quantization.refuses_values`.

    Example:
        >>> Tensor("self_attn.o_proj.weight", jnp.ones((64, 64)), jax.P("model", None)).in_decoder
        True
    """

    name: str
    array: Any
    spec: PartitionSpec = PartitionSpec()
    in_decoder: bool = True
    tied_to: str | None = None
    lossy: tuple[str, ...] = ()
    rounded_to: Any = None
    refuses_values: bool = False


class Layout(abc.ABC):
    """The way one kind of engine holds weights. Subclasses are frozen dataclasses: equal layouts share programs.

    A layout answers for every kind of block with the arrays that the engine holds for it. Blocks reach it already in
    the engine's dtype, and bfloat16 as raw bits, so all it can do is move, pad and repeat; it knows no model.

    Example:
        >>> [tensor.name for tensor in layout.lower(blocks.Param("input_layernorm.weight", jnp.ones(64)))]
        ['input_layernorm.weight']
        >>> layout.mesh_axes
        {'model': 2}
    """

    names: ClassVar[Literal["hub", "trainer"]] = "hub"
    """The side whose names and axes the engine keeps; with `trainer`, all blocks are `TrainerParam`s or experts."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype | None:
        """The dtype that the engine stores weights in; None for the trainer's."""

    @property
    def mesh_axes(self) -> Mapping[str, int]:
        """Mesh axes that the layout's specs name, and the size each must have."""
        return {}

    @abc.abstractmethod
    def path(self, tensor: Tensor, *, layer: int | str | None, module_prefix: str) -> str:
        """Returns the engine's full name of a tensor.

        Args:
            tensor: The tensor; only its name and place are read.
            layer: Number of the layer; None outside the layers.
            module_prefix: The module around the language model in the engine's class, e.g. `language_model.`.
        """

    def full_name(self, tensor: Tensor, *, layer: int | None, unscanned: str, module_prefix: str) -> str:
        """Returns the engine's full name of a tensor, given the trainer's name of the layer; by default its `path`.

        Args:
            tensor: As for `path`.
            layer: As for `path`.
            unscanned: Path of the layer in a trainer's tree that is not scanned, e.g. `decoder/layers_3`; empty outside
                the layers.
            module_prefix: As for `path`.
        """
        del unscanned
        name, layer = in_hub_layer(tensor.name, layer)
        return self.path(dataclasses.replace(tensor, name=name), layer=layer, module_prefix=module_prefix)

    def for_architecture(self, architecture: str | None, native: NativeModel | None = None) -> "Layout":
        """Returns the layout for one model class, for an engine with several; by default this one.

        Args:
            architecture: The hub's name of the class, as in `architectures` of a `config.json`; None if unknown.
            native: The form of the engine's native JAX model of that class; None if none was run.

        Raises:
            LayoutError: The engine does not hold models of this class in this way.
        """
        return self

    def with_names(self, names: tuple[tuple[str, str], ...]) -> "Layout":
        """Returns the layout for a model class with names of its own; by default this one, which has the hub's.

        Args:
            names: Pairs of the start of a name within a layer: the hub's and the class's, `("self_attn.", "attn.")`.
        """
        del names
        return self

    @property
    def definition(self) -> str | None:
        """Words for what an exact result is, if not the trainer's values cast to `dtype`."""
        return None

    def layer_types(self, layer: int, module_prefix: str) -> frozenset[str]:
        """Returns names that set a layer apart in the engine, but not in the trainer; by default none.

        Args:
            layer: Number of the layer.
            module_prefix: The module around the language model in the engine's class.
        """
        del layer, module_prefix
        return frozenset()

    def for_layer(self, types: frozenset[str]) -> "Layout":
        """Returns the layout for layers of these types, which include those of `layer_types`; by default this one."""
        del types
        return self

    def is_engine_owned(self, name: str) -> bool:
        """Tells whether the engine fills the leaf of this name itself, so that no trainer ever writes it."""
        return False

    def cause_of_stranger(self, name: str) -> str | None:
        """Tells why an engine may hold a leaf of this name that nothing writes; None if the name does not say."""
        return None

    def lower(self, block: blocks.Block) -> tuple[Tensor, ...]:
        """Makes the arrays that the engine holds for one block, in its dtype.

        Args:
            block: The block, in the trainer's dtype.

        Raises:
            LayoutError: The engine cannot hold it: a size is not divisible by the topology.
        """
        return tuple(
            dataclasses.replace(tensor, array=bits.from_bits(tensor.array)) for tensor in self.pack(self.cast(block))
        )

    def cast(self, block: _Block) -> _Block:
        """Casts the arrays of a block to the dtype that the engine stores it in; bfloat16 as its bits."""
        float32 = isinstance(block, blocks.Param) and block.float32 and self.dtype is not None
        dtypes = [jnp.bfloat16 if leaf.dtype == jnp.uint16 else leaf.dtype for leaf in jax.tree.leaves(block)]
        dtype = jnp.dtype(jnp.float32) if float32 else self.dtype or jnp.result_type(*dtypes)
        return jax.tree.map(functools.partial(_stored, dtype=dtype), block)

    def pack(self, block: blocks.Block) -> tuple[Tensor, ...]:
        """Moves, pads and repeats the arrays of one block, whatever their dtype.

        Raises:
            LayoutError: As `lower`.
        """
        match block:
            case blocks.Linear():
                return self.linear(block)
            case blocks.MergedLinear():
                return self.merged_linear(block)
            case blocks.GroupedLinear():
                return self.merged_linear(_ungrouped(block))
            case blocks.BareLinear():
                return self.bare_linear(block)
            case blocks.DepthwiseConv():
                return (Tensor(f"{block.name}.weight", kernels.reverse_axes(block.kernel)),)
            case blocks.QKV():
                return self.qkv(block)
            case blocks.LatentKV():
                return self.latent_kv(block)
            case blocks.FusedMoE():
                return self.fused_moe(block)
            case blocks.Embedding():
                return self.embedding(block)
            case blocks.LMHead():
                return self.lm_head(block)
            case blocks.TiedLMHead():
                return self.tied_lm_head(block)
            case blocks.Param():
                return self.param(block)
            case blocks.TrainerParam():
                return self.trainer_param(block)
            case _:
                raise self.unknown(block)

    def unknown(self, block: object) -> LayoutError:
        """Returns the error for something that is no block, or none that this layout knows."""
        kind, layout = type(block), type(self).__name__
        return LayoutError(
            f"a {kind.__module__}.{kind.__qualname__}, which {layout} does not know",
            expected="a block of portax.weights.blocks, or one that the layout's pack() answers for",
            cause="a hook returned something else than blocks, or the layout is older than the converter",
        )

    def bare_linear(self, block: blocks.BareLinear) -> tuple[Tensor, ...]:
        """Holds a matrix product outside the engine's parallel layers; by default as the hub does, `[out, in]`."""
        return (Tensor(f"{block.name}.weight", kernels.transpose(block.kernel)),)

    def latent_kv(self, block: blocks.LatentKV) -> tuple[Tensor, ...]:
        """Holds the keys and values of latent attention; by default as the hub does, `[out, in]`."""
        return (Tensor(f"{block.name}.weight", kernels.transpose(flat_columns(block.kernel))),)

    def param(self, block: blocks.Param) -> tuple[Tensor, ...]:
        """Holds a parameter that is replicated; by default as the hub does."""
        return (Tensor(block.name, block.value),)

    def trainer_param(self, block: blocks.TrainerParam) -> tuple[Tensor, ...]:
        """Holds a parameter of the trainer's own model; by default refuses it.

        Raises:
            LayoutError: This engine runs another model than the trainer's, under other names.
        """
        raise LayoutError(
            f"{block.name}: {type(self).__name__} holds weights under the hub's names, which need the converter of a "
            "model family; only an engine that runs the trainer's own model takes any tree: MaxTextVllm",
            expected="blocks that a model family names as the hub does",
            cause="a converter by structure alone for an engine that runs another model than the trainer's",
        )

    @abc.abstractmethod
    def linear(self, block: blocks.Linear) -> tuple[Tensor, ...]:
        """Holds a matrix product."""

    @abc.abstractmethod
    def merged_linear(self, block: blocks.MergedLinear) -> tuple[Tensor, ...]:
        """Holds column-parallel products of one input."""

    @abc.abstractmethod
    def qkv(self, block: blocks.QKV) -> tuple[Tensor, ...]:
        """Holds attention projections."""

    @abc.abstractmethod
    def fused_moe(self, block: blocks.FusedMoE) -> tuple[Tensor, ...]:
        """Holds routed experts."""

    @abc.abstractmethod
    def embedding(self, block: blocks.Embedding) -> tuple[Tensor, ...]:
        """Holds a token embedding."""

    @abc.abstractmethod
    def lm_head(self, block: blocks.LMHead) -> tuple[Tensor, ...]:
        """Holds an output projection of its own."""

    @abc.abstractmethod
    def tied_lm_head(self, block: blocks.TiedLMHead) -> tuple[Tensor, ...]:
        """Holds an output projection that is the embedding."""


def _stored(leaf: Shaped[Array, "..."], dtype: jnp.dtype) -> Shaped[Array, "..."]:
    """Returns a leaf in the engine's dtype, bfloat16 raw."""
    if leaf.dtype == jnp.uint16 and dtype == jnp.bfloat16:
        return leaf
    return bits.to_bits(bits.from_bits(leaf).astype(dtype))


def _ungrouped(block: blocks.GroupedLinear) -> blocks.MergedLinear:
    parts = iter(kernels.ungroup(block.kernel, groups=block.groups, widths=block.widths))
    merged = tuple(tuple(itertools.islice(parts, count)) for _, count in block.hub)
    return blocks.MergedLinear(block.name, tuple(name for name, _ in block.hub), merged)


def renamed(tensor: Tensor, names: tuple[tuple[str, str], ...]) -> Tensor:
    """The tensor under its name in a model class; see `Layout.with_names`."""
    for hub, own in names:
        if tensor.name.startswith(hub):
            return dataclasses.replace(tensor, name=own + tensor.name.removeprefix(hub))
    return tensor


def in_decoder(tensor: Tensor, layer: int | str | None) -> str:
    """Returns the name of a tensor below the decoder: `layers.3.self_attn.o_proj.weight`, `norm.weight`."""
    return tensor.name if layer is None else f"layers.{layer}.{tensor.name}"


def as_matrix(block: blocks.Linear) -> Shaped[Array, "in out"]:
    """Returns the kernel of a linear as a matrix, with heads, or other axes of one side, flattened."""
    kernel = block.kernel
    rows = math.prod(kernel.shape[:-1]) if block.parallel == "row" else kernel.shape[0]
    return kernel.reshape(rows, -1)


def flat_columns(kernel: Shaped[Array, "in ..."]) -> Shaped[Array, "in out"]:
    """Returns a column-parallel kernel as a matrix."""
    return kernel.reshape(kernel.shape[0], -1)
