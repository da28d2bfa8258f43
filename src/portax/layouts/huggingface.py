"""`HuggingFace`: the hub's tensors, which transformers and every other engine load."""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from portax.errors import LayoutError, QuantizationError
from portax.layouts import _quantising
from portax.layouts.base import OTHER_MODALITIES, Layout, Tensor, as_matrix, flat_columns, in_decoder
from portax.layouts.quantization import must_be_whole_tiles
from portax.weights import bits, blocks, kernels
from portax.weights.quantize import DTYPES
from portax.weights.recipes import RECIPES, Recipe

_QUANTISED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_KEPT = ("gate",)  # the router, which no recipe quantises
_BESIDE = re.compile(rf"(^|\.){OTHER_MODALITIES}|^mtp\.|\.rotary_emb\.inv_freq$")


@dataclasses.dataclass(frozen=True)
class HuggingFace(Layout):
    """The tensors of a checkpoint on the Hugging Face hub: `[out, in]` linears, every projection a tensor of its own.

    Attributes:
        dtype: The dtype to store weights in; None keeps the trainer's, or, quantised, bfloat16.
        quantization: The recipe that quantises the projections of attention, MLP and experts, each with its scales
            beside it; it quantises the weights' cast to bfloat16. `fp8-block` (DeepGEMM's, as vLLM carries it) or
            `fp8-block-hf` (transformers'): tiles of 128 x 128, `weight_scale_inv`; `ct-fp8` or `ct-int8`
            (compressed-tensors): per output, `weight_scale`. None quantises nothing.

    Raises:
        QuantizationError: The recipe is unknown, or `dtype` beside it is not bfloat16.

    Source: transformers 5.23, models/qwen3 and models/qwen3_moe; recipes as in `weights.recipes`.

    Example:
        >>> weights = portax.converter_for(config, layout=portax.layouts.HuggingFace()).convert(params)
        >>> weights["model.layers.0.self_attn.q_proj.weight"].shape
        (64, 64)
    """

    dtype: Any = None
    quantization: str | None = None

    def __post_init__(self):
        if self.quantization is not None:
            if self.quantization not in RECIPES:
                known = ", ".join(RECIPES)
                raise QuantizationError(f"quantization={self.quantization!r} is no known recipe; known: {known}")
            if jnp.dtype(self.dtype or jnp.bfloat16) != jnp.bfloat16:
                asked = jnp.dtype(self.dtype)
                raise QuantizationError(f"{self.quantization} quantises bfloat16 values, and dtype is {asked}")
            object.__setattr__(self, "dtype", jnp.bfloat16)
        if self.dtype is not None:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    @property
    def definition(self) -> str | None:
        """As the recipe makes it of the bfloat16 checkpoint."""
        recipe = self._recipe
        if recipe is None:
            return None
        return f"what recipe {self.quantization} makes of the bfloat16 checkpoint ({recipe.description})"

    @property
    def _recipe(self) -> Recipe | None:
        return None if self.quantization is None else RECIPES[self.quantization]

    def path(self, tensor: Tensor, *, layer: int | str | None, module_prefix: str) -> str:
        """`model.`, the module prefix and the layer in front of the tensor's name; the head stands alone."""
        return f"model.{module_prefix}{in_decoder(tensor, layer)}" if tensor.in_decoder else tensor.name

    def is_engine_owned(self, name: str) -> bool:
        """Tells whether a tensor is none of the language model's: another modality, or prediction of further tokens."""
        return _BESIDE.search(name) is not None

    def linear(self, block: blocks.Linear) -> tuple[Tensor, ...]:
        """`[out, in]`."""
        return self._weights(block.name, as_matrix(block), block.bias)

    def bare_linear(self, block: blocks.BareLinear) -> tuple[Tensor, ...]:
        """`[out, in]`."""
        return self._weights(block.name, block.kernel)

    def merged_linear(self, block: blocks.MergedLinear) -> tuple[Tensor, ...]:
        """Each group of parts under its own name, `[out, in]`."""
        merged = [kernels.interleave([flat_columns(part) for part in group], shards=1) for group in block.parts]
        return tuple(
            tensor for name, matrix in zip(block.hub, merged, strict=True) for tensor in self._weights(name, matrix)
        )

    def qkv(self, block: blocks.QKV) -> tuple[Tensor, ...]:
        """`q_proj`, `k_proj` and, unless the keys serve as values, `v_proj`."""
        projections = {"q_proj": block.query, "k_proj": block.key, "v_proj": block.value}
        return (
            *(
                tensor
                for name, kernel in projections.items()
                if kernel is not None
                for tensor in self._weights(f"{block.name}.{name}", flat_columns(kernel))
            ),
            *(
                Tensor(f"{block.name}.{name}.bias", bias.reshape(-1))
                for name, bias in zip(projections, block.bias, strict=False)
            ),
        )

    def fused_moe(self, block: blocks.FusedMoE) -> tuple[Tensor, ...]:
        """Each expert's three projections, or all experts stacked as `gate_up_proj` and `down_proj`."""
        names = block.hub_names
        if block.hub != "each" and self.quantization is not None:
            raise QuantizationError(f"{block.name}: checkpoints with stacked experts were not made quantised")
        if block.hub == "alternating":
            return _alternating_experts(block)
        _must_have_no_bias(block)
        if block.hub == "stacked":
            gate_up = jnp.concatenate([block.gate, block.up], axis=2)
            return (
                Tensor(f"{block.name}.{names.gate_up}", gate_up.swapaxes(1, 2)),
                Tensor(f"{block.name}.{names.down}", block.down.swapaxes(1, 2)),
            )
        projections = {names.gate: block.gate, names.up: block.up, names.down: block.down}
        held = {name: self._held(f"{block.name}.{name}", kernel) for name, kernel in projections.items()}
        return tuple(
            tensor
            for expert in range(block.gate.shape[0])
            for name, (weights, scales) in held.items()
            for tensor in self._tensors(
                f"{block.name}.{expert}.{name}", weights[expert], None if scales is None else scales[expert]
            )
        )

    def embedding(self, block: blocks.Embedding) -> tuple[Tensor, ...]:
        """`[vocab, embed]`."""
        return (Tensor(f"{block.name}.weight", block.table),)

    def lm_head(self, block: blocks.LMHead) -> tuple[Tensor, ...]:
        """`[vocab, embed]`."""
        return (Tensor("lm_head.weight", kernels.transpose(block.kernel), in_decoder=False),)

    def tied_lm_head(self, block: blocks.TiedLMHead) -> tuple[Tensor, ...]:
        """Nothing: the hub's config says that they are tied."""
        return ()

    def _weights(
        self, name: str, kernel: Shaped[Array, "in out"], bias: Shaped[Array, " out"] | None = None
    ) -> tuple[Tensor, ...]:
        """Returns a weight `[out, in]`, its scales if it is quantised, and its bias if it has one."""
        biases = () if bias is None else (Tensor(f"{name}.bias", bias),)
        last = name.rpartition(".")[2]
        if self.quantization is None or last in _KEPT:
            return (Tensor(f"{name}.weight", kernels.transpose(kernel)), *biases)
        if last not in _QUANTISED:
            raise QuantizationError(f"{name}: checkpoints of models with this linear were not made quantised")
        return (*self._tensors(name, *self._held(name, kernel)), *biases)

    def _held(
        self, name: str, kernel: Shaped[Array, "... in out"]
    ) -> tuple[Shaped[Array, "... in out"], Shaped[Array, "... _ _"] | None]:
        """A kernel as the checkpoint has it, but for the order of its axes, and its scales if it is quantised."""
        recipe = self._recipe
        if recipe is None:
            return kernel, None
        if recipe.tiled:
            must_be_whole_tiles(name, inputs=kernel.shape[-2], outputs=kernel.shape[-1])
        weights, scales = recipe.make(bits.from_bits(kernel))
        return _quantising.as_bytes(weights), scales

    def _tensors(
        self, name: str, weights: Shaped[Array, "in out"], scales: Shaped[Array, "_ _"] | None
    ) -> tuple[Tensor, ...]:
        recipe = self._recipe
        if recipe is None or scales is None:
            return (Tensor(f"{name}.weight", kernels.transpose(weights)),)
        scales = kernels.transpose(scales)
        scales = scales if recipe.tiled else bits.to_bits(scales.astype(jnp.bfloat16))  # whose values they are
        lossy = (f"bfloat16 -> {recipe.dtype} (recipe {self.quantization})",)
        weights = _quantising.from_bytes(kernels.transpose(weights), DTYPES[recipe.dtype])
        return (
            Tensor(f"{name}.weight", weights, lossy=lossy),
            Tensor(f"{name}.{recipe.scale}", scales, lossy=lossy, refuses_values=True),
        )


def _alternating_experts(block: blocks.FusedMoE) -> tuple[Tensor, ...]:
    names = block.hub_names
    gate_up = kernels.alternate(block.gate, block.up)
    matrices = Tensor(f"{block.name}.{names.gate_up}", gate_up), Tensor(f"{block.name}.{names.down}", block.down)
    if not block.bias:
        return matrices
    gate, up, down = block.bias
    return (
        *matrices,
        Tensor(f"{block.name}.{names.gate_up}_bias", kernels.alternate(gate, up)),
        Tensor(f"{block.name}.{names.down}_bias", down),
    )


def _must_have_no_bias(block: blocks.FusedMoE) -> None:
    if block.bias:
        raise LayoutError(f"{block.name}: on the hub, experts with biases alternate, and this form is {block.hub!r}")
