"""`FlaxNnx`: the nested `nnx.State` of tpu-inference's native JAX models.

Every rule was read off the running engine (0.32.0, MODEL_IMPL_TYPE=auto). There they stand in
models/jax/{qwen2,qwen3,llama3,gemma4}.py, models/jax/utils/weight_utils.py and layers/jax/quantization/unquantized.py.
"""

import dataclasses
import re
from typing import Any, NoReturn

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from portax.errors import LayoutError, QuantizationError
from portax.layouts import _quantising
from portax.layouts._tpu import AXIS, TpuEngine
from portax.layouts.base import OTHER_MODALITIES, Tensor, as_matrix, flat_columns, in_decoder
from portax.layouts.native_model import NativeModel
from portax.layouts.quantization import Quantization
from portax.weights import blocks, kernels

_HEAD_MULTIPLE, _HEAD_UNPADDED = 128, 64
_ENGINE_OWNED = re.compile(rf"^rng\.|\.{OTHER_MODALITIES}")


@dataclasses.dataclass(frozen=True)
class FlaxNnx(TpuEngine):
    """The state of tpu-inference's native JAX models (`MODEL_IMPL_TYPE=auto` or `flax_nnx`): a nested `nnx.State`.

    The engine picks them by itself for dense Qwen3, Qwen2.5, Llama and Gemma4. Names are the paths of the state, joined
    by dots. Kernels keep their heads: `[in, heads, head_dim]`.

    Attributes:
        version: tpu-inference's version, e.g. `0.32` or `0.32.0`.
        tp: Tensor-parallel size.
        moe_backend: The kernel for the experts: `gmm_tp` (the engine's default) or `gmm_ep` (expert parallelism).
        dtype: The dtype that the engine stores weights in.
        allow_untested: True uses the newest known layout for a version newer than any that was checked.
        model: The form of the engine's model class; converters fill it in.
        quantization: The engine's settings of quantisation; None for none.

    Raises:
        LayoutError: The version, tp or backend is unknown, or the engine was not run quantised in this way.

    Example:
        >>> portax.layouts.FlaxNnx(version="0.32", tp=4).mesh_axes
        {'model': 4}
    """

    oldest, newest = (0, 32), (0, 32)
    moe_backends = ("gmm_tp", "gmm_ep")

    moe_backend: str = "gmm_tp"
    dtype: Any = jnp.dtype(jnp.bfloat16)
    allow_untested: bool = False
    model: NativeModel | None = dataclasses.field(default=None, repr=False)
    quantization: Quantization | None = None

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        self._check(moe_backend=self.moe_backend, allow_untested=self.allow_untested)
        if self.quantization is not None:
            self._check_quantization(self.quantization)

    def _check_quantization(self, quantization: Quantization) -> None:
        if quantization.patterns:
            raise QuantizationError(
                "BF16_LINEAR_REQUANTIZE_PATTERNS: the engine's native JAX models (flax_nnx) ignore it: "
                "unset it, or use MODEL_IMPL_TYPE=vllm and TpuInference"
            )
        if self.dtype != jnp.bfloat16:
            raise QuantizationError(f"quantised engines were run with dtype bfloat16, and this is {self.dtype}")
        plain = Quantization(
            quantization.checkpoint,
            quantization.scale_form,
            requantize_weight_dtype=quantization.requantize_weight_dtype,
        )
        if quantization.checkpoint.startswith("ct-") or (
            quantization.is_of_quantised_checkpoint and quantization != plain
        ):
            raise QuantizationError(
                f"a native JAX model (flax_nnx) was not run with {quantization}: of checkpoints, fp8 in blocks alone, "
                "and of their settings, REQUANTIZE_WEIGHT_DTYPE"
            )

    @property
    def definition(self) -> str | None:
        """Words for what an exact result is: as if the engine had loaded a certain checkpoint."""
        return None if self.quantization is None else self.quantization.definition

    def for_architecture(self, architecture: str | None, native: NativeModel | None = None) -> "FlaxNnx":
        """Returns the layout of one model class.

        Raises:
            LayoutError: The engine has no native JAX model of that class, or none that was run.
        """
        model = native or self.model
        if model is None or architecture not in (None, model.architecture):
            self._without_model(architecture)
        if self.quantization is not None and not self._was_run_quantised(model):
            raise QuantizationError(
                f"{model.architecture}: native JAX models (flax_nnx) of this class were not run with "
                f"{self.quantization}"
            )
        return dataclasses.replace(self, model=model)

    def _was_run_quantised(self, model: NativeModel) -> bool:
        blocks_ = self.quantization is not None and self.quantization.is_of_quantised_checkpoint
        return model.block_checkpoints if blocks_ else model.quantises_experts

    def _without_model(self, architecture: str | None) -> NoReturn:
        if architecture is None:
            raise LayoutError(
                "the engine's native JAX models differ in how they hold weights: the converter has to describe its "
                "model class (`native_model`), or pass FlaxNnx(..., model=portax.layouts.NativeModel(...))"
            )
        raise LayoutError(
            f"{architecture} is not among the native JAX models (flax_nnx) that are covered: tpu-inference runs it on "
            f'torchax, by itself or with MODEL_IMPL_TYPE=vllm. Use TpuInference(version="{self.version}", tp={self.tp})'
        )

    @property
    def _model(self) -> NativeModel:
        return self.model or self._without_model(None)

    @property
    def mesh_axes(self) -> dict[str, int]:
        """`{"model": tp}`."""
        return {AXIS: self.tp}

    def path(self, tensor: Tensor, *, layer: int | str | None, module_prefix: str) -> str:
        """`model.`, the module prefix and the layer in front of the tensor's name."""
        return f"model.{module_prefix}{in_decoder(tensor, layer)}" if tensor.in_decoder else tensor.name

    def is_engine_owned(self, name: str) -> bool:
        """Tells leaves that no trainer writes: states of random number generators, and other modalities."""
        return _ENGINE_OWNED.search(name) is not None

    def linear(self, block: blocks.Linear) -> tuple[Tensor, ...]:
        """As the trainer has it; heads and head_dim stay apart."""
        kernel, cut = block.kernel, {"column": (None, AXIS), "row": (AXIS,), "replicated": ()}[block.parallel]
        if kernel.ndim == 3 and block.parallel == "column":
            raise LayoutError(
                f"{block.name}: a layer without keys and values of its own (Gemma4 E2B and E4B); the engine's native "
                "JAX model has them in every layer",
                expected="keys and values in every layer",
                cause="a family that the native model does not run: use MODEL_IMPL_TYPE=vllm and TpuInference",
            )
        if kernel.ndim == 3:
            kernel = self._wide(block.name, kernel, axis=1)
        if self._quantises_linears:
            return self._quantised(block.name, as_matrix(dataclasses.replace(block, kernel=kernel)), cut)
        return (Tensor(f"{block.name}.{self._model.kernel}", kernel, self._spec(*cut)),)

    @property
    def _settings(self) -> Quantization:
        if self.quantization is None:
            raise QuantizationError("this engine quantises nothing")
        return self.quantization

    @property
    def _quantises_linears(self) -> bool:
        return self.quantization is not None and self.quantization.is_of_quantised_checkpoint

    def _quantised(self, name: str, matrix: Shaped[Array, "in out"], cut: tuple[str | None, ...]) -> tuple[Tensor, ...]:
        """A projection of a block checkpoint, whose heads are not apart, and its scales, one for each output."""
        [(weights, scales)] = _quantising.linear_parts(self._settings, name, [matrix], (1,))
        weights = _quantising.from_bytes(weights, _quantising.linear_dtype(self._settings))
        lossy = _quantising.linear_steps(self._settings)
        weight = f"{name}.{self._model.kernel}"
        return (
            Tensor(weight, weights, self._spec(*cut), lossy=lossy),
            Tensor(
                f"{weight}_scale_inv",
                scales[0],
                self._spec(*cut[1:]),
                lossy=lossy,
                refuses_values=self._settings.refuses_values,
            ),
        )

    def merged_linear(self, block: blocks.MergedLinear) -> tuple[Tensor, ...]:
        """Gate and up apart, `[in, out]`; in Gemma4 `[in, a0 b0 | a1 b1 | ...]`, every shard its slice of each."""
        if not self._model.merges_gate_up:
            return tuple(
                tensor
                for name, group in zip(block.hub, block.parts, strict=True)
                for tensor in self._columns(name, kernels.interleave([flat_columns(part) for part in group], shards=1))
            )
        parts = [flat_columns(part) for group in block.parts for part in group]
        for part in parts:
            self._must_divide(f"{block.name}: a part of width", part.shape[1])
        return self._columns(block.name, kernels.interleave(parts, shards=self.tp))

    def bare_linear(self, block: blocks.BareLinear) -> tuple[Tensor, ...]:
        """`[in, out]`, replicated."""
        return (Tensor(f"{block.name}.{self._model.kernel}", block.kernel),)

    def param(self, block: blocks.Param) -> tuple[Tensor, ...]:
        """The hub's values, replicated."""
        return (Tensor(re.sub(r"\.weight$", f".{self._model.norm}", block.name), block.value),)

    def qkv(self, block: blocks.QKV) -> tuple[Tensor, ...]:
        """`[in, heads, head_dim]` each; keys that serve as values are held once."""
        self._must_divide(f"{block.name}: query heads =", block.query.shape[1])
        kv_cut = self._kv_cut(block)
        projections = {"q_proj": (block.query, (AXIS,)), "k_proj": (block.key, kv_cut), "v_proj": (block.value, kv_cut)}
        tensors: list[Tensor] = []
        for (name, (kernel, cut)), bias in zip(projections.items(), block.bias or (None,) * 3, strict=True):
            at = f"{block.name}.{name}"
            if kernel is not None and self._quantises_linears:
                tensors += self._quantised(at, flat_columns(self._heads(at, kernel)), (None, AXIS))
            elif kernel is not None:
                tensors.append(Tensor(f"{at}.{self._model.kernel}", self._heads(at, kernel), self._spec(None, *cut)))
            if bias is not None:
                tensors.append(Tensor(f"{at}.bias", self._heads(at, bias), self._spec(*cut)))
        return tuple(tensors)

    def _kv_cut(self, block: blocks.QKV) -> tuple[str | None, ...]:
        count = block.key.shape[1]
        if count % self.tp == 0:
            return (AXIS,)
        if self._model.cuts_wide_kv:
            return (None, AXIS)
        if self._model.pads_heads and self.tp % count == 0:
            return (AXIS,)
        why = "do not divide either way" if self._model.pads_heads else "the engine's own loader refuses that"
        raise LayoutError(f"{block.name}: KV heads = {count} and tp={self.tp}: {why}; use MODEL_IMPL_TYPE=vllm")

    def _heads(self, name: str, kernel: Shaped[Array, "*in heads dim"]) -> Shaped[Array, "*in padded_heads padded_dim"]:
        kernel = self._wide(name, kernel, axis=kernel.ndim - 1)
        if self._model.pads_heads and kernel.shape[-2] < self.tp:
            return jnp.repeat(kernel, self.tp // kernel.shape[-2], axis=-2)
        return kernel

    def _wide(self, name: str, kernel: Shaped[Array, "..."], *, axis: int) -> Shaped[Array, "..."]:
        """Pads head_dim."""
        width = kernel.shape[axis]
        if width == _HEAD_UNPADDED or width % _HEAD_MULTIPLE == 0:
            return kernel
        if not self._model.pads_heads:
            raise LayoutError(
                f"{name}: head_dim = {width} is neither {_HEAD_UNPADDED} nor a multiple of {_HEAD_MULTIPLE}, and the "
                f"engine's own loader refuses that for {self._model.architecture}",
                expected=f"head_dim {_HEAD_UNPADDED}, or a multiple of {_HEAD_MULTIPLE}",
                cause="a model that the native JAX code does not run: use MODEL_IMPL_TYPE=vllm and TpuInference",
            )
        return kernels.pad_axis(kernel, axis=axis, multiple=_HEAD_MULTIPLE)

    def fused_moe(self, block: blocks.FusedMoE) -> tuple[Tensor, ...]:
        """Gate and up fused as the backend's kernel wants them, and down."""
        shards = self.tp if self.moe_backend == "gmm_tp" else 1
        cut13, cut2 = ((None, None, AXIS), (None, AXIS)) if self.moe_backend == "gmm_tp" else ((AXIS,), (AXIS,))
        if self.quantization is not None:
            return self._quantised_experts(block, shards=shards, cut13=cut13, cut2=cut2)
        return (
            Tensor(f"{block.name}.kernel_gating_upproj_EDF", self._fused_w13(block, shards=shards), self._spec(*cut13)),
            Tensor(f"{block.name}.kernel_down_proj_EFD", block.down, self._spec(*cut2)),
        )

    def _quantised_experts(
        self,
        block: blocks.FusedMoE,
        *,
        shards: int,
        cut13: tuple[str | None, ...],
        cut2: tuple[str | None, ...],
    ) -> tuple[Tensor, ...]:
        held = _quantising.experts(self._settings, block, shards=shards)
        w13, w2 = self._fused_w13(held.weights, shards=shards), held.weights.down
        gate, up, scale = held.scales
        s13, s2 = kernels.fuse_w13(gate, up, shards=shards)[:, :, None], scale[:, :, None]
        scale13 = (None, None, None, AXIS) if self.moe_backend == "gmm_tp" else cut13
        scale2 = () if self.moe_backend == "gmm_tp" and s2.shape[1] == 1 else cut2
        refuses = self._settings.refuses_values
        gating, down = f"{block.name}.kernel_gating_upproj_EDF", f"{block.name}.kernel_down_proj_EFD"
        return tuple(
            Tensor(name, array, self._spec(*cut), lossy=held.lossy, refuses_values=refuses and name.endswith("_scale"))
            for name, array, cut in (
                (gating, _quantising.from_bytes(w13, held.dtype), cut13),
                (f"{gating}_weight_scale", s13, scale13),
                (down, _quantising.from_bytes(w2, held.dtype), cut2),
                (f"{down}_weight_scale", s2, scale2),
            )
        )

    def embedding(self, block: blocks.Embedding) -> tuple[Tensor, ...]:
        """`[vocab, embed]`; of Qwen3 with zero rows up to a multiple of tp."""
        table = kernels.pad_axis(block.table, axis=0, multiple=self._vocab_multiple)
        return (Tensor(self._model.embedding, table, self._spec(AXIS)),)

    def lm_head(self, block: blocks.LMHead) -> tuple[Tensor, ...]:
        """`[embed, vocab]`."""
        if self._model.head is None:
            raise LayoutError(
                f"a native {self._model.architecture} whose output projection is not tied to its embedding was not "
                "run, or does not start (Qwen2.5 at 0.32.0)",
                expected="a tied model (logits_via_embedding=True)",
                cause="an untied model: use MODEL_IMPL_TYPE=vllm and TpuInference",
            )
        kernel = kernels.pad_axis(block.kernel, axis=1, multiple=self._vocab_multiple)
        cut = (None, AXIS) if self._model.pads_heads else ()
        return (Tensor(self._model.head, kernel, self._spec(*cut), in_decoder=False),)

    def tied_lm_head(self, block: blocks.TiedLMHead) -> tuple[Tensor, ...]:
        """Nothing: the embedding is the head."""
        if not self._model.tied:
            raise LayoutError(
                f"a native {self._model.architecture} whose embedding is its output projection, too, was not run",
                expected="an output projection of its own (logits_via_embedding=False)",
                cause="a tied model: use MODEL_IMPL_TYPE=vllm and TpuInference",
            )
        return ()

    @property
    def _vocab_multiple(self) -> int:
        return self.tp if self._model.pads_vocab else 1

    def _columns(self, name: str, kernel: Shaped[Array, "in out"]) -> tuple[Tensor, ...]:
        if self._quantises_linears:
            return self._quantised(name, kernel, (None, AXIS))
        return (Tensor(f"{name}.{self._model.kernel}", kernel, self._spec(None, AXIS)),)

    def _must_divide(self, what: str, size: int) -> None:
        if size % self.tp:
            raise LayoutError(f"{what} {size} is not divisible by tp={self.tp}")
