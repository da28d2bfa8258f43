"""`TpuInference`: the flat `vllm_model.*` state of tpu-inference's torchax runner.

Every rule was read off the running engine (versions 0.20, 0.22 and 0.32; what lies between, in their code). In
tpu-inference 0.32 they stand in layers/common/process_weights/{linear,moe}_weights.py,
layers/vllm/custom_ops/linear.py, layers/vllm/quantization/{configs,unquantized}.py and layers/common/sharding.py.
"""

import dataclasses
import functools
import re
from typing import Any, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from portax.errors import LayoutError
from portax.layouts._latent_torchax import LatentTorchax
from portax.layouts._tpu import AXIS, Axes, must_be_positive, release_text
from portax.layouts.base import OTHER_MODALITIES, Tensor, as_matrix, flat_columns, in_decoder, renamed
from portax.weights import bits, blocks, kernels

_LINEAR_AXES = ("model", "expert", "dcp")
_TP_AXES = ("attn_dp", "attn_dp_expert", "expert", "model", "dcp", "pcp")
_VOCAB_MULTIPLE = 64
_FUSED_MULTIPLE = 256

# What moved between versions, and the first version that has it.
_LINEARS_IN_OUT = (0, 22)  # before: [out, in]
_KV_HEADS_REPLICATED = (0, 22)  # before: cut between the shards that share one
_SHARED_HEAD_IS_A_LEAF = (0, 28)  # a tied lm_head whose module vLLM shares; before: the embedding alone
_RENAMED = (  # version, start of the name since, and before
    ((0, 30), "experts.", "moe.experts."),
    ((0, 30), "router.per_expert_scale", "moe.per_expert_scale"),
)
_EXPERTS_ROUTED = (0, 23)  # experts.routed_experts.w13_weight; before: experts.w13_weight
_EXPERT_BIASES = (0, 32)  # the first whose experts with biases were run
_ATTENTION_DP = (0, 32)  # the first whose attention data parallelism was run

_Cut: TypeAlias = tuple[Axes | None, ...]
_Experts: TypeAlias = tuple[Shaped[Array, "..."], Shaped[Array, "..."], _Cut, _Cut]  # w13, w2 and how each is cut

_ENGINE_OWNED = re.compile(
    r"[._]attn\._[kqv]_scale$|[._]attn\._prob_scale$|\.rotary_emb\.cos_sin_cache$|\.cos_sin_cache$|\.normalizer$"
    r"|\.rotary_emb\.(full|sliding)_attention_(original_)?inv_freq$"
    r"|\.root_size$|\.embed_scale_per_layer$|\.per_layer_input_scale$|\.per_layer_projection_scale$"
    rf"|\.{OTHER_MODALITIES}"
)


@dataclasses.dataclass(frozen=True)
class TpuInference(LatentTorchax):
    """The state of tpu-inference's torchax runner (`MODEL_IMPL_TYPE=vllm`): one flat dict of `vllm_model.*` leaves.

    Attributes:
        version: tpu-inference's version, e.g. `0.32` or `0.32.0`.
        tp: Tensor-parallel size, as the engine is asked for it.
        moe_backend: The kernel that runs the experts: `gmm_tp` (the engine's default), `gmm_ep` (expert parallelism),
            or `fused_moe` (expert parallelism with `USE_MOE_EP_KERNEL=1`).
        attention_dp: Attention data-parallel size, for an engine with `NEW_MODEL_DESIGN=1`, whose mesh has seven axes:
            linears are laid out for `tp // attention_dp` shards, experts and vocabulary for `tp`. None: a mesh of two
            axes, `data` and `model`.
        dtype: The dtype that the engine stores weights in.
        allow_untested: True uses the newest known layout for a version newer than any that was checked.
        quantization: The engine's settings of quantisation; None for none.
        names_of_class: Names that differ from the hub's; converters fill them in.
        quantised_linears: The quantised linears of a layer, if not all are; converters fill it in.
        kv_cache_dtype: The engine's `--kv-cache-dtype`, where it has latent attention (MLA); run with `fp8`.
        kv_scale_form: The rounding of scales of latent attention by the engine's compiler; see `Quantization`.

    Raises:
        LayoutError: The version, tp or backend is unknown, attention_dp is not for that version or tp, or the engine
            was not run quantised in this way.

    Example:
        >>> portax.layouts.TpuInference(version="0.32", tp=4).mesh_axes
        {'model': 4}
    """

    oldest, newest = (0, 20), (0, 32)
    moe_backends = ("gmm_tp", "gmm_ep", "fused_moe")

    moe_backend: str = "gmm_tp"
    attention_dp: int | None = None
    dtype: Any = jnp.dtype(jnp.bfloat16)
    allow_untested: bool = False
    names_of_class: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        self._check(moe_backend=self.moe_backend, allow_untested=self.allow_untested)
        if self.attention_dp is not None:
            self._check_attention_dp(self.attention_dp)
        self._check_quantization(dtype=self.dtype, attention_dp=self.attention_dp)

    def _check_attention_dp(self, size: int) -> None:
        must_be_positive("attention_dp", size)
        if self._release < _ATTENTION_DP:
            since = f"tpu-inference {release_text(_ATTENTION_DP)}"
            raise LayoutError(
                f"attention_dp={size} is covered since {since}, and this is {self.version}; older ones were not run "
                "with it: upgrade the engine, or start it with NEW_MODEL_DESIGN unset"
            )
        if self.tp % size:
            raise LayoutError(
                f"attention_dp={size} does not divide tp={self.tp}: pass the tensor-parallel size that the engine was "
                "asked for, which it splits into attention_dp times the shards of a linear"
            )

    @property
    def mesh_axes(self) -> dict[str, int]:
        """`{"model": tp}`; with attention data parallelism every axis of the engine's mesh but `data`."""
        if self.attention_dp is None:
            return {AXIS: self.tp}
        return dict.fromkeys(_TP_AXES, 1) | {"attn_dp": self.attention_dp, AXIS: self._linear_tp}

    @property
    def _linear_tp(self) -> int:
        """Shards of a linear; attention data parallelism repeats each of them."""
        return self.tp // (self.attention_dp or 1)

    @property
    def _linear_axes(self) -> Axes:
        return AXIS if self.attention_dp is None else _LINEAR_AXES

    @property
    def _tp_axes(self) -> Axes:
        return AXIS if self.attention_dp is None else _TP_AXES

    def with_names(self, names: tuple[tuple[str, str], ...]) -> "TpuInference":
        """Returns the layout with a model class's own names."""
        return dataclasses.replace(self, names_of_class=names)

    def path(self, tensor: Tensor, *, layer: int | str | None, module_prefix: str) -> str:
        """`vllm_model.`, the module prefix, `model.` and the layer in front of the tensor's name."""
        tensor = renamed(tensor, self.names_of_class)
        for since, new, old in _RENAMED:
            if self._release < since and tensor.name.startswith(new):
                tensor = dataclasses.replace(tensor, name=old + tensor.name.removeprefix(new))
        place = f"model.{in_decoder(tensor, layer)}" if tensor.in_decoder else tensor.name
        return f"vllm_model.{module_prefix}{place}"

    def is_engine_owned(self, name: str) -> bool:
        """Tells leaves that no trainer writes: attention scales, the rotary cache, constants, other modalities."""
        return _ENGINE_OWNED.search(name) is not None

    def linear(self, block: blocks.Linear) -> tuple[Tensor, ...]:
        """`[in, out]`, cut on the side that is parallel."""
        axes = self._linear_axes
        cut = {"column": (None, axes), "row": (axes, None), "replicated": (None, None)}[block.parallel]
        held = self._linear(block.name, [as_matrix(block)], lambda parts: parts[0], cut)
        return held if block.bias is None else (*held, Tensor(f"{block.name}.bias", block.bias, self._spec(cut[1])))

    def merged_linear(self, block: blocks.MergedLinear) -> tuple[Tensor, ...]:
        """`[in, a0 b0 | a1 b1 | ...]`: every shard holds its slice of each part."""
        parts = [flat_columns(part) for group in block.parts for part in group]
        for part in parts:
            self._linear_must_divide(f"{block.name}: a part of width", part.shape[1])
        merge = functools.partial(kernels.interleave, shards=self._linear_tp)
        return self._linear(block.name, parts, merge, (None, self._linear_axes))

    def qkv(self, block: blocks.QKV) -> tuple[Tensor, ...]:
        """`[in, q0 k0 v0 | q1 k1 v1 | ...]` over all shards; see `kernels.pack_qkv`."""
        self._check_heads(block)
        pack = functools.partial(
            kernels.pack_qkv, shards=self._linear_tp, replicate_kv=self._release >= _KV_HEADS_REPLICATED
        )
        value = block.key if block.value is None else block.value
        copies = max(self._linear_tp // block.key.shape[1], 1)
        held = self._linear(
            f"{block.name}.qkv_proj",
            [block.query, block.key, value],
            lambda parts: pack(*parts),
            (None, self._linear_axes),
            copies=(1, copies, copies),
        )
        if not block.bias:
            return held
        return *held, Tensor(f"{block.name}.qkv_proj.bias", pack(*block.bias), self._spec(self._linear_axes))

    def _check_heads(self, block: blocks.QKV) -> None:
        heads, (kv_heads, dim) = block.query.shape[1], block.key.shape[1:]
        self._linear_must_divide(f"{block.name}: query heads =", heads)
        if self._release < _KV_HEADS_REPLICATED:
            self._linear_must_divide(f"{block.name}: KV heads * head_dim =", kv_heads * dim)
        elif kv_heads % self._linear_tp and self._linear_tp % kv_heads:
            raise LayoutError(f"{block.name}: KV heads = {kv_heads} and {self._linear_text} do not divide either way")

    def latent_kv(self, block: blocks.LatentKV) -> tuple[Tensor, ...]:
        """`W_UK_T` and `W_UV`, in the dtype of the KV cache, with their scales."""
        return self._latent_kv(block, attention_dp=self.attention_dp, dtype=self.dtype, axes=self._linear_axes)

    def param(self, block: blocks.Param) -> tuple[Tensor, ...]:
        """As the hub does, under every name that it has in the engine."""
        return tuple(Tensor(name, block.value) for name in (block.name, *block.again))

    def fused_moe(self, block: blocks.FusedMoE) -> tuple[Tensor, ...]:
        """w13 and w2 as the backend's kernel wants them."""
        name = f"{block.name}.routed_experts" if self._release >= _EXPERTS_ROUTED else block.name
        if self.quantization is not None and self.quantization.experts_dtype is not None:
            return self._quantised_experts(name, block, backend=self.moe_backend, axes=self._tp_axes)
        w13, w2, cut13, cut2 = getattr(self, f"_{self.moe_backend}")(block)
        return (
            Tensor(f"{name}.w13_weight", w13, self._spec(*cut13)),
            Tensor(f"{name}.w2_weight", w2, self._spec(*cut2)),
            *(self._expert_biases(name, block) if block.bias else ()),
        )

    def _expert_biases(self, name: str, block: blocks.FusedMoE) -> tuple[Tensor, ...]:
        """The biases as float32 numbers that were bfloat16 ones, `[experts, 1, out]`; w13's in the order of w13."""
        if self.moe_backend == "fused_moe" or self.quantization is not None or self._release < _EXPERT_BIASES:
            since = f"tpu-inference {release_text(_EXPERT_BIASES)}"
            raise LayoutError(
                f"{block.name}: experts with biases were run with gmm_tp and gmm_ep, unquantised, since {since}",
                expected=f"{since}, moe_backend='gmm_tp' or 'gmm_ep', and quantization=None",
                cause="an engine that was not run with gpt-oss, and may hold these biases in another way or drop them",
            )
        gate, up, down = (bits.widened(bias)[:, None] for bias in block.bias)
        split = self.moe_backend == "gmm_tp"
        w13 = kernels.fuse_w13(gate, up, shards=self.tp if split else 1)
        cut13, cut2 = ((None, None, self._tp_axes), (None, None, None)) if split else ((self._tp_axes,),) * 2
        biases = (("w13_bias", w13, cut13), ("w2_bias", down, cut2))
        return tuple(Tensor(f"{name}.{leaf}", x, self._spec(*cut), rounded_to=self.dtype) for leaf, x, cut in biases)

    def _gmm_tp(self, block: blocks.FusedMoE) -> _Experts:
        w13 = self._fused_w13(block, shards=self.tp)
        return w13, block.down, (None, None, self._tp_axes), (None, self._tp_axes, None)

    def _gmm_ep(self, block: blocks.FusedMoE) -> _Experts:
        w13 = self._fused_w13(block, shards=1)
        return w13, block.down, (self._tp_axes,), (self._tp_axes,)

    def _fused_moe(self, block: blocks.FusedMoE) -> _Experts:
        padded = [
            kernels.pad_axis(kernels.pad_axis(x, axis=1, multiple=_FUSED_MULTIPLE), axis=2, multiple=_FUSED_MULTIPLE)
            for x in (block.gate, block.up, block.down)
        ]
        return jnp.stack(padded[:2], axis=1), padded[2], (self._tp_axes,), (self._tp_axes,)

    def embedding(self, block: blocks.Embedding) -> tuple[Tensor, ...]:
        """`[vocab, embed]`, zero rows up to a multiple of 64."""
        return (Tensor(f"{block.name}.weight", self._rows(block.table), self._spec(self._tp_axes, None)),)

    def lm_head(self, block: blocks.LMHead) -> tuple[Tensor, ...]:
        """As the embedding, beside the decoder."""
        return (self._head(kernels.transpose(block.kernel), tied_to=None),)

    def tied_lm_head(self, block: blocks.TiedLMHead) -> tuple[Tensor, ...]:
        """A second array with the embedding's values; before 0.28 none where vLLM shares the module."""
        if block.shared_module and self._release < _SHARED_HEAD_IS_A_LEAF:
            return ()
        return (self._head(block.table, tied_to=f"{block.to}.weight"),)

    def _head(self, table: Shaped[Array, "vocab embed"], *, tied_to: str | None) -> Tensor:
        spec = self._spec(self._tp_axes, None)
        return Tensor("lm_head.weight", self._rows(table), spec, in_decoder=False, tied_to=tied_to)

    def _rows(self, table: Shaped[Array, "vocab embed"]) -> Shaped[Array, "padded_vocab embed"]:
        return kernels.pad_axis(table, axis=0, multiple=_VOCAB_MULTIPLE)

    def _matrix(self, name: str, kernel: Shaped[Array, "in out"], cut: _Cut) -> Tensor:
        if self._release < _LINEARS_IN_OUT:
            kernel, cut = kernels.transpose(kernel), cut[::-1]
        return Tensor(f"{name}.weight", kernel, self._spec(*cut))

    @property
    def _linear_text(self) -> str:
        return f"tp={self.tp}" if self.attention_dp is None else f"tp / attention_dp={self._linear_tp}"

    def _linear_must_divide(self, what: str, size: int) -> None:
        if size % self._linear_tp:
            raise LayoutError(f"{what} {size} is not divisible by {self._linear_text}")
