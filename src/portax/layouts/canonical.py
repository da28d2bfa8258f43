"""`Canonical`: vLLM's own parameters at TP=1, for engines that lay weights out themselves."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from portax.layouts.base import Layout, Tensor, as_matrix, flat_columns, in_decoder, renamed
from portax.weights import blocks, kernels

_VOCAB_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Canonical(Layout):
    """vLLM's parameters at TP=1: `[out, in]` linears, `qkv = [q | k | v]`, `w13 = [E, 2F, D]`, `w2 = [E, D, F]`.

    Attributes:
        dtype: The dtype to store weights in; None keeps the trainer's.
        names_of_class: Names that differ from the hub's; converters fill them in.

    Source: vLLM 0.32, model_executor/layers: linear.py, vocab_parallel_embedding.py,
    fused_moe/unquantized_fused_moe_method.py; of experts whose columns alternate, models/gpt_oss.py.

    Example:
        >>> portax.converter_for(config, layout=portax.layouts.Canonical()).convert(params)["model.norm.weight"].shape
        (64,)
    """

    dtype: Any = None
    names_of_class: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self):
        if self.dtype is not None:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    def with_names(self, names: tuple[tuple[str, str], ...]) -> "Canonical":
        """Returns the layout with a model class's own names."""
        return dataclasses.replace(self, names_of_class=names)

    def path(self, tensor: Tensor, *, layer: int | str | None, module_prefix: str) -> str:
        """The module prefix, `model.` and the layer in front of the tensor's name."""
        tensor = renamed(tensor, self.names_of_class)
        return (
            f"{module_prefix}model.{in_decoder(tensor, layer)}"
            if tensor.in_decoder
            else f"{module_prefix}{tensor.name}"
        )

    def linear(self, block: blocks.Linear) -> tuple[Tensor, ...]:
        """`[out, in]`."""
        weight = Tensor(f"{block.name}.weight", kernels.transpose(as_matrix(block)))
        return (weight,) if block.bias is None else (weight, Tensor(f"{block.name}.bias", block.bias))

    def merged_linear(self, block: blocks.MergedLinear) -> tuple[Tensor, ...]:
        """The parts one below the other, `[out_a + out_b, in]`."""
        parts = [flat_columns(part) for group in block.parts for part in group]
        return (Tensor(f"{block.name}.weight", kernels.transpose(kernels.interleave(parts, shards=1))),)

    def qkv(self, block: blocks.QKV) -> tuple[Tensor, ...]:
        """`[q | k | v]` rows, heads in order."""
        value = block.key if block.value is None else block.value
        packed = kernels.pack_qkv(block.query, block.key, value, shards=1, replicate_kv=True)
        matrix = Tensor(f"{block.name}.qkv_proj.weight", kernels.transpose(packed))
        if not block.bias:
            return (matrix,)
        return matrix, Tensor(f"{block.name}.qkv_proj.bias", jnp.concatenate([x.reshape(-1) for x in block.bias]))

    def fused_moe(self, block: blocks.FusedMoE) -> tuple[Tensor, ...]:
        """`w13 = [E, 2F, D]`, gate above up or row by row, and `w2 = [E, D, F]`; biases likewise."""
        join = kernels.alternate if block.hub == "alternating" else _side_by_side
        name = f"{block.name}.routed_experts"
        matrices = (
            Tensor(f"{name}.w13_weight", join(block.gate, block.up).swapaxes(1, 2)),
            Tensor(f"{name}.w2_weight", block.down.swapaxes(1, 2)),
        )
        if not block.bias:
            return matrices
        gate, up, down = block.bias
        return *matrices, Tensor(f"{name}.w13_bias", join(gate, up)), Tensor(f"{name}.w2_bias", down)

    def embedding(self, block: blocks.Embedding) -> tuple[Tensor, ...]:
        """`[vocab, embed]`, zero rows up to a multiple of 64."""
        return (Tensor(f"{block.name}.weight", kernels.pad_axis(block.table, axis=0, multiple=_VOCAB_MULTIPLE)),)

    def lm_head(self, block: blocks.LMHead) -> tuple[Tensor, ...]:
        """As the embedding, beside the decoder."""
        table = kernels.pad_axis(kernels.transpose(block.kernel), axis=0, multiple=_VOCAB_MULTIPLE)
        return (Tensor("lm_head.weight", table, in_decoder=False),)

    def tied_lm_head(self, block: blocks.TiedLMHead) -> tuple[Tensor, ...]:
        """Holds nothing: the embedding is the head."""
        return ()


def _side_by_side(gate: Shaped[Array, "*batch _"], up: Shaped[Array, "*batch _"]) -> Shaped[Array, "*batch _"]:
    return jnp.concatenate([gate, up], axis=-1)
