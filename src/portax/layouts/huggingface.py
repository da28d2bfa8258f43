"""`HuggingFace`: the hub's tensors, which transformers and every other engine load."""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp

from portax.errors import LayoutError
from portax.layouts.base import OTHER_MODALITIES, Layout, Tensor, as_matrix, flat_columns, in_decoder
from portax.weights import blocks, kernels

_BESIDE = re.compile(rf"(^|\.){OTHER_MODALITIES}|^mtp\.|\.rotary_emb\.inv_freq$")


@dataclasses.dataclass(frozen=True)
class HuggingFace(Layout):
    """The tensors of a checkpoint on the Hugging Face hub: `[out, in]` linears, every projection a tensor of its own.

    Attributes:
        dtype: The dtype to store weights in; None keeps the trainer's.

    Source: transformers 5.23, models/qwen3 and models/qwen3_moe.

    Example:
        >>> weights = portax.converter_for(config, layout=portax.layouts.HuggingFace()).convert(params)
        >>> weights["model.layers.0.self_attn.q_proj.weight"].shape
        (64, 64)
    """

    dtype: Any = None

    def __post_init__(self):
        if self.dtype is not None:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    def path(self, tensor: Tensor, *, layer: int | str | None, module_prefix: str) -> str:
        """`model.`, the module prefix and the layer in front of the tensor's name; the head stands alone."""
        return f"model.{module_prefix}{in_decoder(tensor, layer)}" if tensor.in_decoder else tensor.name

    def is_engine_owned(self, name: str) -> bool:
        """Tells whether a tensor is none of the language model's: another modality, or prediction of further tokens."""
        return _BESIDE.search(name) is not None

    def linear(self, block: blocks.Linear) -> tuple[Tensor, ...]:
        """`[out, in]`."""
        weight = Tensor(f"{block.name}.weight", kernels.transpose(as_matrix(block)))
        return (weight,) if block.bias is None else (weight, Tensor(f"{block.name}.bias", block.bias))

    def merged_linear(self, block: blocks.MergedLinear) -> tuple[Tensor, ...]:
        """Each group of parts under its own name, `[out, in]`."""
        merged = [kernels.interleave([flat_columns(part) for part in group], shards=1) for group in block.parts]
        return tuple(
            Tensor(f"{name}.weight", kernels.transpose(matrix)) for name, matrix in zip(block.hub, merged, strict=True)
        )

    def qkv(self, block: blocks.QKV) -> tuple[Tensor, ...]:
        """`q_proj`, `k_proj` and, unless the keys serve as values, `v_proj`."""
        projections = {"q_proj": block.query, "k_proj": block.key, "v_proj": block.value}
        return (
            *(
                Tensor(f"{block.name}.{name}.weight", kernels.transpose(flat_columns(kernel)))
                for name, kernel in projections.items()
                if kernel is not None
            ),
            *(
                Tensor(f"{block.name}.{name}.bias", bias.reshape(-1))
                for name, bias in zip(projections, block.bias, strict=False)
            ),
        )

    def fused_moe(self, block: blocks.FusedMoE) -> tuple[Tensor, ...]:
        """Each expert's three projections, or all experts stacked as `gate_up_proj` and `down_proj`."""
        names = block.hub_names
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
        return tuple(
            Tensor(f"{block.name}.{expert}.{name}.weight", kernels.transpose(kernel[expert]))
            for expert in range(block.gate.shape[0])
            for name, kernel in projections.items()
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
