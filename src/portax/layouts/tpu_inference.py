"""`TpuInference`: the flat `vllm_model.*` state of tpu-inference's torchax runner.

Every rule was read off the running engine (versions 0.20, 0.22 and 0.32; what lies between, in their code). In
tpu-inference 0.32 they stand in layers/common/process_weights/{linear,moe}_weights.py,
layers/vllm/custom_ops/linear.py and layers/vllm/quantization/unquantized.py.
"""

import dataclasses
import functools
import importlib.metadata
import re
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from portax import blocks, kernels
from portax.errors import LayoutError
from portax.layouts.base import Layout, Tensor, as_matrix, flat_columns, in_decoder

_MOE_BACKENDS = ("gmm_tp", "gmm_ep", "fused_moe")
_AXIS = "model"
_VOCAB_MULTIPLE = 64
_EXPERT_MULTIPLE = 128
_FUSED_MULTIPLE = 256
_OLDEST, _NEWEST = (0, 20), (0, 32)


# What moved between versions, and the first version that has it.
_LINEARS_IN_OUT = (0, 22)  # before: [out, in]
_KV_HEADS_REPLICATED = (0, 22)  # before: cut between the shards that share one
_SHARED_HEAD_IS_A_LEAF = (0, 28)  # a tied lm_head whose module vLLM shares; before: the embedding alone
_RENAMED = (  # version, start of the name since, and before
    ((0, 30), "experts.", "moe.experts."),
    ((0, 30), "router.per_expert_scale", "moe.per_expert_scale"),
)
_EXPERTS_ROUTED = (0, 23)  # experts.routed_experts.w13_weight; before: experts.w13_weight

_Cut: TypeAlias = tuple[str | None, ...]
_Experts: TypeAlias = tuple[Shaped[Array, "..."], Shaped[Array, "..."], _Cut, _Cut]  # w13, w2 and how each is cut

_ENGINE_OWNED = re.compile(
    r"\.attn\._[kqv]_scale$|\.attn\._prob_scale$|\.rotary_emb\.cos_sin_cache$|\.cos_sin_cache$|\.normalizer$"
    r"|\.root_size$|\.embed_scale_per_layer$|\.per_layer_input_scale$|\.per_layer_projection_scale$"
    r"|\.(vision_tower|visual|multi_modal_projector|embed_vision|audio_tower|embed_audio)\."
)


@dataclasses.dataclass(frozen=True)
class TpuInference(Layout):
    """What tpu-inference's torchax runner (`MODEL_IMPL_TYPE=vllm`) holds: one flat dict of `vllm_model.*` leaves.

    Attributes:
        version: tpu-inference's version, e.g. `0.32` or `0.32.0`.
        tp: Tensor-parallel size: the size of the engine mesh's `model` axis.
        moe_backend: Which kernel runs the experts: `gmm_tp` (the engine's default), `gmm_ep` (expert parallelism), or
            `fused_moe` (expert parallelism with `USE_MOE_EP_KERNEL=1`).
        dtype: What the engine stores weights in.
        allow_untested: Whether to use the newest known layout for a version newer than any that was checked.

    Raises:
        LayoutError: The version, tp or backend is unknown.

    Example:
        >>> portax.layouts.TpuInference(version="0.32", tp=4)
    """

    version: str
    tp: int
    moe_backend: str = "gmm_tp"
    dtype: Any = jnp.dtype(jnp.bfloat16)
    allow_untested: bool = False

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if not isinstance(self.tp, int) or isinstance(self.tp, bool) or self.tp < 1:
            raise LayoutError(f"tp={self.tp!r} is not a positive integer")
        if self.moe_backend not in _MOE_BACKENDS:
            raise LayoutError(f"moe_backend={self.moe_backend!r} is unknown; known: {', '.join(_MOE_BACKENDS)}")
        if self._release < _OLDEST or (self._release > _NEWEST and not self.allow_untested):
            raise LayoutError(_out_of_table(self.version, newer=self._release > _NEWEST))

    @classmethod
    def installed(cls, *, tp: int, **options: Any) -> "TpuInference":
        """The layout of the tpu-inference that is installed here.

        Args:
            tp: Tensor-parallel size.
            **options: Other attributes.

        Raises:
            LayoutError: tpu-inference is not installed, or its version is not in the table.
        """
        try:
            version = importlib.metadata.version("tpu-inference")
        except importlib.metadata.PackageNotFoundError:
            raise LayoutError(
                "tpu-inference is not installed here, so its version cannot be read; install it, or name the version "
                f'of the engine: TpuInference(version="{_text(_NEWEST)}", tp={tp})'
            ) from None
        return cls(version=version, tp=tp, **options)

    @functools.cached_property
    def _release(self) -> tuple[int, int]:
        match = re.match(r"(\d+)\.(\d+)(\.|\D|$)", self.version) if isinstance(self.version, str) else None
        if match is None:
            raise LayoutError(f"version={self.version!r} is not a version of tpu-inference, such as {_text(_NEWEST)!r}")
        return int(match[1]), int(match[2])

    @property
    def mesh_axes(self) -> dict[str, int]:
        """`{"model": tp}`."""
        return {_AXIS: self.tp}

    def path(self, tensor: Tensor, *, layer: int | str | None, wrapper: str) -> str:
        """`vllm_model.`, the wrapper, `model.` and the layer in front of the tensor's name."""
        for since, new, old in _RENAMED:
            if self._release < since and tensor.name.startswith(new):
                tensor = dataclasses.replace(tensor, name=old + tensor.name.removeprefix(new))
        place = f"model.{in_decoder(tensor, layer)}" if tensor.in_decoder else tensor.name
        return f"vllm_model.{wrapper}{place}"

    def owns(self, name: str) -> bool:
        """Attention scales, the rotary cache, constants, and whatever belongs to other modalities."""
        return _ENGINE_OWNED.search(name) is not None

    def linear(self, block: blocks.Linear) -> tuple[Tensor, ...]:
        """`[in, out]`, cut on the side that is parallel."""
        cut = {"column": (None, _AXIS), "row": (_AXIS, None), "replicated": (None, None)}[block.parallel]
        return (self._matrix(block.name, as_matrix(block), cut),)

    def merged_linear(self, block: blocks.MergedLinear) -> tuple[Tensor, ...]:
        """`[in, a0 b0 | a1 b1 | ...]`: every shard holds its slice of each part."""
        parts = [flat_columns(part) for group in block.parts for part in group]
        for part in parts:
            self._must_divide(f"{block.name}: a part of width", part.shape[1])
        return (self._matrix(block.name, kernels.interleave(parts, shards=self.tp), (None, _AXIS)),)

    def qkv(self, block: blocks.QKV) -> tuple[Tensor, ...]:
        """`[in, q0 k0 v0 | q1 k1 v1 | ...]` over all shards; see `kernels.pack_qkv`."""
        heads, (kv_heads, dim) = block.query.shape[1], block.key.shape[1:]
        self._must_divide(f"{block.name}: query heads =", heads)
        replicated = self._release >= _KV_HEADS_REPLICATED
        if replicated and kv_heads % self.tp and self.tp % kv_heads:
            raise LayoutError(f"{block.name}: KV heads = {kv_heads} and tp={self.tp} do not divide either way")
        if not replicated:
            self._must_divide(f"{block.name}: KV heads * head_dim =", kv_heads * dim)
        value = block.key if block.value is None else block.value
        packed = kernels.pack_qkv(block.query, block.key, value, shards=self.tp, replicate_kv=replicated)
        matrix = self._matrix(f"{block.name}.qkv_proj", packed, (None, _AXIS))
        if not block.bias:
            return (matrix,)
        bias = kernels.pack_qkv(*block.bias, shards=self.tp, replicate_kv=replicated)
        return matrix, Tensor(f"{block.name}.qkv_proj.bias", bias, self._spec(_AXIS))

    def fused_moe(self, block: blocks.FusedMoE) -> tuple[Tensor, ...]:
        """w13 and w2 as the backend's kernel wants them."""
        name = f"{block.name}.routed_experts" if self._release >= _EXPERTS_ROUTED else block.name
        w13, w2, cut13, cut2 = getattr(self, f"_{self.moe_backend}")(block)
        return (
            Tensor(f"{name}.w13_weight", w13, self._spec(*cut13)),
            Tensor(f"{name}.w2_weight", w2, self._spec(*cut2)),
        )

    def _gmm_tp(self, block: blocks.FusedMoE) -> _Experts:
        self._must_divide(f"{block.name}: MoE width", block.gate.shape[2])
        w13 = kernels.fuse_w13(block.gate, block.up, shards=self.tp, multiple=_EXPERT_MULTIPLE)
        return w13, block.down, (None, None, _AXIS), (None, _AXIS, None)

    def _gmm_ep(self, block: blocks.FusedMoE) -> _Experts:
        w13 = kernels.fuse_w13(block.gate, block.up, shards=1, multiple=_EXPERT_MULTIPLE)
        return w13, block.down, (_AXIS,), (_AXIS,)

    def _fused_moe(self, block: blocks.FusedMoE) -> _Experts:
        padded = [
            kernels.pad_axis(kernels.pad_axis(x, axis=1, multiple=_FUSED_MULTIPLE), axis=2, multiple=_FUSED_MULTIPLE)
            for x in (block.gate, block.up, block.down)
        ]
        return jnp.stack(padded[:2], axis=1), padded[2], (_AXIS,), (_AXIS,)

    def embedding(self, block: blocks.Embedding) -> tuple[Tensor, ...]:
        """`[vocab, embed]`, zero rows up to a multiple of 64."""
        return (Tensor(f"{block.name}.weight", self._rows(block.table), self._spec(_AXIS, None)),)

    def lm_head(self, block: blocks.LMHead) -> tuple[Tensor, ...]:
        """As the embedding, beside the decoder."""
        return (self._head(kernels.transpose(block.kernel), tied_to=None),)

    def tied_lm_head(self, block: blocks.TiedLMHead) -> tuple[Tensor, ...]:
        """A second array with the embedding's values; before 0.28 none where vLLM shares the module."""
        if block.shared_module and self._release < _SHARED_HEAD_IS_A_LEAF:
            return ()
        return (self._head(block.table, tied_to=f"{block.to}.weight"),)

    def _head(self, table: Shaped[Array, "vocab embed"], *, tied_to: str | None) -> Tensor:
        spec = self._spec(_AXIS, None)
        return Tensor("lm_head.weight", self._rows(table), spec, in_decoder=False, tied_to=tied_to)

    def _rows(self, table: Shaped[Array, "vocab embed"]) -> Shaped[Array, "padded_vocab embed"]:
        return kernels.pad_axis(table, axis=0, multiple=_VOCAB_MULTIPLE)

    def _matrix(self, name: str, kernel: Shaped[Array, "in out"], cut: _Cut) -> Tensor:
        if self._release < _LINEARS_IN_OUT:
            kernel, cut = kernels.transpose(kernel), cut[::-1]
        return Tensor(f"{name}.weight", kernel, self._spec(*cut))

    def _spec(self, *axes: str | None) -> PartitionSpec:
        return PartitionSpec() if self.tp == 1 else PartitionSpec(*axes)

    def _must_divide(self, what: str, size: int) -> None:
        if size % self.tp:
            raise LayoutError(f"{what} {size} is not divisible by tp={self.tp}")


def _text(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"


def _out_of_table(version: str, *, newer: bool) -> str:
    known = f"tpu-inference {version} is not among the known layouts, {_text(_OLDEST)} to {_text(_NEWEST)}"
    if not newer:
        return f"{known}; older engines hold weights in other ways: upgrade the engine"
    return (
        f"{known}; it may hold weights differently. Pin the engine (pip install 'tpu-inference=={_text(_NEWEST)}.*'), "
        "upgrade portax, or pass allow_untested=True to use the newest known layout"
    )
