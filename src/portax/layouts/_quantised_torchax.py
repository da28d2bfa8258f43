"""`QuantisedTorchax`: the leaves of the torchax runner that are quantised, and their scales."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from portax.errors import QuantizationError
from portax.layouts import _quantising
from portax.layouts._tpu import Axes, TpuEngine, release_text
from portax.layouts.base import Tensor, flat_columns
from portax.layouts.quantization import Quantization
from portax.weights import blocks, kernels
from portax.weights.recipes import RECIPES, TILE

_SINCE = (0, 32)
_OF_CHECKPOINTS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_ROUTER = "mlp.gate"  # quantised online, never in a checkpoint
_LINEARS = (*_OF_CHECKPOINTS, _ROUTER)
_TYPE = "quantised"  # what is special about a layer: all of its linears, or those named after this


@dataclasses.dataclass(frozen=True)
class QuantisedTorchax(TpuEngine):
    """The part of `TpuInference` that holds quantised weights, as `quantization` says.

    Attributes:
        quantization: The engine's settings of quantisation; None for none.
        quantised_linears: The quantised linears of a layer, if not all are; converters fill it in.
    """

    quantization: Quantization | None = dataclasses.field(default=None, kw_only=True)
    quantised_linears: frozenset[str] | None = dataclasses.field(default=None, kw_only=True, repr=False)

    @property
    def _settings(self) -> Quantization:
        if self.quantization is None:
            raise QuantizationError("this engine quantises nothing")
        return self.quantization

    @property
    def definition(self) -> str | None:
        """Words for what an exact result is: as if the engine had loaded a certain checkpoint."""
        return None if self.quantization is None else self.quantization.definition

    def layer_types(self, layer: int, module_prefix: str) -> frozenset[str]:
        """Returns the linears of a layer that the patterns select."""
        if self.quantization is None or not self.quantization.patterns:
            return frozenset()
        at = self.path(Tensor("", None), layer=layer, module_prefix=module_prefix).removeprefix("vllm_model.")
        found = [name for name in _LINEARS if _quantising.selects(self.quantization.patterns, at + name)]
        return frozenset({_TYPE} if len(found) == len(_LINEARS) else {f"{_TYPE} {name}" for name in found})

    def for_layer(self, types: frozenset[str]) -> "QuantisedTorchax":
        """The layout of layers of which the same linears are quantised."""
        if self.quantization is None or not self.quantization.patterns or _TYPE in types:
            return self
        names = {kind.removeprefix(f"{_TYPE} ") for kind in types if kind.startswith(f"{_TYPE} ")}
        return dataclasses.replace(self, quantised_linears=frozenset(names))

    def _check_quantization(self, *, dtype: Any, attention_dp: int | None) -> None:
        """Raises a `QuantizationError` where a quantised engine was not run like this."""
        if self.quantization is None:
            return
        if self._release < _SINCE:
            raise QuantizationError(
                f"quantised engines were run since tpu-inference {release_text(_SINCE)}, and this is {self.version}: "
                "upgrade the engine"
            )
        if attention_dp is not None:
            raise QuantizationError("quantised engines were not run with attention data parallelism")
        if dtype != jnp.bfloat16:
            raise QuantizationError(f"quantised engines were run with dtype bfloat16, and this is {dtype}")

    def bare_linear(self, block: blocks.BareLinear) -> tuple[Tensor, ...]:
        """As without quantisation; which of these the engine quantises was not run."""
        if self.quantization is not None:
            raise QuantizationError(f"{block.name}: models with this matrix were not run quantised")
        return super().bare_linear(block)

    def _linear(
        self,
        name: str,
        parts: Sequence[Shaped[Array, "in ..."]],
        pack: Callable[[Sequence[Shaped[Array, "..."]]], Shaped[Array, "in out"]],
        cut: tuple[Axes | None, ...],
        copies: Sequence[int] | None = None,
    ) -> tuple[Tensor, ...]:
        """A linear that the engine makes of some parts: one matrix, and the scales if it is quantised.

        Args:
            name: The module.
            parts: The parts that are packed, with heads and head_dim on one axis or two.
            pack: Puts them together along their last axes.
            cut: The axes that cut the matrix.
            copies: Number of copies of each part; None for one each.
        """
        if not self._quantises(name):
            return (self._matrix(name, pack(parts), cut),)
        quantization = self._settings
        matrices = [flat_columns(part) for part in parts]
        held = _quantising.linear_parts(quantization, name, matrices, copies or (1,) * len(parts))
        weights, scales = (
            pack([array.reshape(-1, *part.shape[1:]) for array, part in zip(arrays, parts, strict=True)])
            for arrays in zip(*held, strict=True)
        )
        lossy = _quantising.linear_steps(quantization)
        dtype = _quantising.linear_dtype(quantization)
        weight = self._matrix(name, _quantising.from_bytes(weights, dtype), cut)
        scales, spec = self._linear_scales(name, scales, parts[0].shape[0], cut)
        return (
            dataclasses.replace(weight, lossy=lossy),
            Tensor(f"{weight.name}_scale", scales, spec, lossy=lossy, refuses_values=quantization.refuses_values),
        )

    def _matrix(self, name: str, kernel: Shaped[Array, "in out"], cut: tuple[Axes | None, ...]) -> Tensor:
        raise NotImplementedError

    def _quantises(self, name: str) -> bool:
        quantization = self.quantization
        if quantization is None or not (quantization.is_of_quantised_checkpoint or quantization.patterns):
            return False
        if name not in _LINEARS:
            raise QuantizationError(
                f"{name}: models with this linear were not run quantised; those run have {_LINEARS}"
            )
        if quantization.is_of_quantised_checkpoint:
            return name != _ROUTER
        return self.quantised_linears is None or name in self.quantised_linears

    def _linear_scales(
        self, name: str, scales: Shaped[Array, "blocks out"], inputs: int, cut: tuple[Axes | None, ...]
    ) -> tuple[Shaped[Array, "..."], PartitionSpec]:
        """Scales as the engine holds them: by output, by block and output, or by tile."""
        quantization = self._settings
        variable, block = quantization.linear_block
        rows, columns = cut
        blocks_, outputs = scales.shape
        if quantization.disable_weight_requantization:
            if (columns and outputs // TILE % self.tp) or (rows and blocks_ % self.tp):
                raise QuantizationError(
                    f"{name}: DISABLE_WEIGHT_REQUANTIZATION=1 holds {blocks_} x {outputs // TILE} scales, which "
                    f"tp={self.tp} does not divide: the engine stops while it loads"
                )
            return scales[:, ::TILE], self._spec(*cut)
        if block is None:
            return scales.reshape(outputs), self._spec(columns)
        if rows and blocks_ > 1 and blocks_ % self.tp:
            raise QuantizationError(
                f"{name}: {variable}={block} makes {blocks_} blocks of its {inputs} inputs, which tp={self.tp} does "
                "not divide: the engine stops while it loads"
            )
        return scales[None, :, None], self._spec(None, rows if blocks_ > 1 else None, None, columns)

    def _quantised_experts(self, name: str, block: blocks.FusedMoE, *, backend: str, axes: Axes) -> tuple[Tensor, ...]:
        """w13 and w2 as the backend's kernel wants them, each with its scales."""
        quantization = self._settings
        self._check_experts(block, backend)
        held = _quantising.experts(quantization, block, shards=self.tp if backend == "gmm_tp" else 1)
        w13, w2, cut13, cut2 = getattr(self, f"_{backend}")(held.weights)
        s13, s2, scale_cut13, scale_cut2 = self._expert_scales(held.scales, backend, axes)
        suffix, refuses = RECIPES[quantization.checkpoint].scale, quantization.refuses_values
        return tuple(
            Tensor(
                f"{name}.{leaf}",
                array,
                self._spec(*cut),
                lossy=held.lossy,
                refuses_values=refuses and leaf.endswith(suffix),
            )
            for leaf, array, cut in (
                ("w13_weight", _quantising.from_bytes(w13, held.dtype), cut13),
                (f"w13_{suffix}", s13, scale_cut13),
                ("w2_weight", _quantising.from_bytes(w2, held.dtype), cut2),
                (f"w2_{suffix}", s2, scale_cut2),
            )
        )

    def _expert_scales(self, scales: tuple[Shaped[Array, "_ _ _"], ...], backend: str, axes: Axes) -> tuple[Any, ...]:
        gate, up, down = scales
        down = down[:, :, None]
        if backend == "fused_moe":
            return jnp.stack([gate, up], 1)[:, :, :, None], down, (axes,), (axes,)
        fused = kernels.fuse_w13(gate, up, shards=self.tp if backend == "gmm_tp" else 1)[:, :, None]
        if backend == "gmm_ep":
            return fused, down, (axes,), (axes,)
        return fused, down, (None, None, None, axes), (None, axes) if down.shape[1] > 1 else ()

    def _check_experts(self, block: blocks.FusedMoE, backend: str) -> None:
        quantization = self._settings
        _, inputs, width = block.gate.shape
        if not quantization.is_of_quantised_checkpoint:
            raise QuantizationError(
                f"{block.name}: MOE_REQUANTIZE_WEIGHT_DTYPE with a bf16 checkpoint: torchax holds no scales of these "
                "experts, so the engine loads and computes wrong; unset it, or load a quantised checkpoint"
            )
        if quantization.checkpoint == "ct-int8":
            raise QuantizationError(
                f"{block.name}: the engine refuses compressed-tensors int8 experts (Unsupported FusedMoe scheme)"
            )
        if backend == "fused_moe" and (inputs % 256 or width % 256):
            raise QuantizationError(
                f"{block.name}: the kernel fused_moe pads {inputs} x {width} to multiples of 256, and that was not run "
                "quantised"
            )
        if backend == "gmm_tp" and quantization.disable_weight_requantization:
            raise QuantizationError(
                f"{block.name}: DISABLE_WEIGHT_REQUANTIZATION=1 was run with expert parallelism alone; with gmm_tp the "
                f"engine stops unless width / tp = {width} / {self.tp} is a multiple of {TILE}"
            )
