"""Quantised arrays: those that a quantising engine holds instead of bfloat16 ones, before a layout arranges them.

Every matrix is `[in, out]`, stacked for experts, with bfloat16 as raw bits; scales come as `[blocks, out]`. Quantised
weights come as their bytes where they have eight bits, so that arranging them moves bytes.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Shaped

from portax.errors import QuantizationError
from portax.layouts.quantization import Quantization, must_be_whole_tiles
from portax.weights import bits, blocks, kernels
from portax.weights.quantize import DTYPES, quantize
from portax.weights.recipes import RECIPES, TILE, dequantize

Matrix: TypeAlias = Shaped[Array, "... _ _"]
Part: TypeAlias = tuple[Matrix, Float32[Array, "... _ _"]]
"""Weights and scales."""


def linear_parts(quantization: Quantization, name: str, parts: Sequence[Matrix], copies: Sequence[int]) -> list[Part]:
    """Returns the quantised parts of one linear.

    Args:
        quantization: The engine's settings.
        name: The module, for errors.
        parts: Parts that the engine fuses; a checkpoint has each as a tensor of its own.
        copies: Number of copies of each.

    Raises:
        QuantizationError: A block or tile does not divide a size.
    """
    variable, block = quantization.linear_block
    inputs = parts[0].shape[0]
    if block is not None and inputs % block:
        raise QuantizationError(f"{name}: {variable}={block} does not divide its {inputs} inputs")
    counts = [part.shape[1] * times * (inputs // (block or inputs)) for part, times in zip(parts, copies, strict=True)]
    dtype, mark = quantization.linear_dtype, quantization.refuses_values
    if not quantization.is_of_quantised_checkpoint:
        wide = quantization.is_wide(sum(counts))
        return [_quantised(part, dtype, 0, block, wide=wide, mark=mark) for part in parts]
    if quantization.holds_checkpoint_bits:
        return [_as_loaded(quantization, name, part) for part in parts]
    return [
        _quantised(_reloaded(quantization, name, part), dtype, 0, block, wide=wide, mark=mark)
        for part, wide in zip(parts, map(quantization.is_wide, counts), strict=True)
    ]


def linear_dtype(quantization: Quantization) -> Any:
    """Returns the dtype of a quantised linear."""
    if quantization.holds_checkpoint_bits:
        return DTYPES[_recipe_dtype(quantization)]
    return DTYPES[quantization.linear_dtype]


def linear_steps(quantization: Quantization) -> tuple[str, ...]:
    """Returns the steps at which a quantised linear loses precision, after its cast to bfloat16."""
    if not quantization.is_of_quantised_checkpoint:
        return (f"bfloat16 -> {quantization.linear_dtype}",)
    recipe = _recipe_step(quantization)
    if quantization.holds_checkpoint_bits:
        return (recipe,)
    return recipe, "dequantised float32 -> bfloat16", f"bfloat16 -> {quantization.linear_dtype}"


@dataclasses.dataclass(frozen=True)
class Experts:
    """Quantised routed experts.

    Attributes:
        weights: The three projections; padded where blocks want it.
        scales: Those of gate, up and down: `[experts, blocks, out]` each.
        dtype: Of the weights.
        lossy: The steps that lose precision, after the cast to bfloat16.
    """

    weights: blocks.FusedMoE
    scales: tuple[Matrix, ...]
    dtype: Any
    lossy: tuple[str, ...]


def experts(quantization: Quantization, block: blocks.FusedMoE, *, shards: int) -> Experts:
    """Returns the quantised routed experts of one layer.

    Args:
        quantization: The engine's settings.
        block: The experts, as raw bfloat16.
        shards: Number of parts into which the engine cuts the width of an expert.

    Raises:
        QuantizationError: A tile does not divide a size, or a block was not run with it.
    """
    dtype = quantization.experts_dtype
    if dtype is None:
        raise QuantizationError(f"{block.name}: these settings quantise no experts")
    if quantization.is_of_quantised_checkpoint and RECIPES[quantization.checkpoint].tiled:
        must_be_whole_tiles(block.name, width=block.gate.shape[2], inputs=block.gate.shape[1])
    if quantization.disable_weight_requantization:
        parts = [_as_loaded(quantization, block.name, x) for x in (block.gate, block.up, block.down)]
        return _experts(block, parts, DTYPES[dtype], (_recipe_step(quantization),))
    if quantization.is_of_quantised_checkpoint:
        gate, up, down = (_dequantised(quantization, x) for x in (block.gate, block.up, block.down))
        lossy: tuple[str, ...] = (_recipe_step(quantization), f"dequantised float32 -> {dtype}")
    else:
        gate, up, down = (bits.from_bits(x) for x in (block.gate, block.up, block.down))
        lossy = (f"bfloat16 -> {dtype}",)
    if (percentile := quantization.moe_requantize_clip_percentile) is not None:
        lossy = (*lossy, f"clipped to percentile {percentile:g}")
        gate, up = _clipped((gate, up), percentile)
        (down,) = _clipped((down,), percentile)
    inner, outer = _expert_blocks(quantization, block, shards=shards)
    gate, up = (_padded(x, inputs=inner, outputs=outer) for x in (gate, up))
    down = _padded(down, inputs=outer, outputs=inner)
    wide = quantization.scale_form == "wide"  # what XLA on CPU does was narrow in every run
    sizes = ((gate, inner), (up, inner), (down, outer))
    mark = quantization.refuses_values
    parts = [_quantised(x, dtype, 1, size, wide=wide, mark=mark) for x, size in sizes]
    return _experts(block, parts, DTYPES[dtype], lossy)


def _expert_blocks(quantization: Quantization, block: blocks.FusedMoE, *, shards: int) -> tuple[int, int]:
    """Returns the number of inputs that share a scale, for gate and up, and for down."""
    _, inputs, width = block.gate.shape
    size = quantization.moe_requantize_block_size
    if size is None:
        return inputs, width
    outer = min(size, width // shards)
    if width % outer or (shards > 1 and width // outer > 1 and (width // outer) % shards):
        raise QuantizationError(
            f"{block.name}: MOE_REQUANTIZE_BLOCK_SIZE={size} makes {width / outer:g} blocks of its width {width}, "
            f"which tp={shards} does not divide: the engine stops while it loads"
        )
    return size, outer


def _experts(block: blocks.FusedMoE, parts: Sequence[Part], dtype: Any, lossy: tuple[str, ...]) -> Experts:
    (gate, up, down), scales = zip(*parts, strict=True)
    weights = blocks.FusedMoE(block.name, gate, up, down, block.hub)
    return Experts(weights, scales, dtype, lossy)


def _padded(x: Matrix, *, inputs: int, outputs: int) -> Matrix:
    return kernels.pad_axis(kernels.pad_axis(x, axis=1, multiple=inputs), axis=2, multiple=outputs)


def _quantised(x: Matrix, dtype: str, axis: int, block: int | None, *, wide: bool, mark: bool) -> Part:
    weights, scale = quantize(bits.from_bits(x), dtype=DTYPES[dtype], axis=axis, block=block, wide=wide, mark=mark)
    return as_bytes(weights), scale


def _as_loaded(quantization: Quantization, name: str, x: Matrix) -> Part:
    """Returns the weights as the checkpoint holds them, with a scale for each output, also where a tile shares one."""
    recipe = RECIPES[quantization.checkpoint]
    if recipe.tiled:
        must_be_whole_tiles(name, inputs=x.shape[-2], outputs=x.shape[-1])
    weights, scale = recipe.make(bits.from_bits(x))
    return as_bytes(weights), scale if not recipe.tiled else jnp.repeat(scale, TILE, -1)


def _dequantised(quantization: Quantization, x: Matrix) -> Float32[Array, "... _ _"]:
    recipe = RECIPES[quantization.checkpoint]
    return dequantize(*recipe.make(bits.from_bits(x)), tiled=recipe.tiled)


def _reloaded(quantization: Quantization, name: str, x: Matrix) -> Matrix:
    """Returns the weights that the engine quantises again: the checkpoint's, dequantised, as bfloat16."""
    must_be_whole_tiles(name, inputs=x.shape[0], outputs=x.shape[1])
    return bits.to_bits(_dequantised(quantization, x).astype(jnp.bfloat16))


def _recipe_step(quantization: Quantization) -> str:
    return f"bfloat16 -> {_recipe_dtype(quantization)} (recipe {quantization.checkpoint})"


def _recipe_dtype(quantization: Quantization) -> str:
    return RECIPES[quantization.checkpoint].dtype


def _clipped(parts: Sequence[Float32[Array, "experts in out"]], percentile: float) -> list[Float32[Array, "_ _ _"]]:
    """Every expert's weights within a percentile of their magnitudes, as `numpy.percentile` finds it in float32."""
    flat = jnp.concatenate([abs(part).reshape(part.shape[0], -1) for part in parts], 1)
    place = np.float32(flat.shape[1] - 1) * (np.float32(percentile) / np.float32(100))
    below = int(np.floor(place))
    fraction = np.float32(place - np.float32(below))
    ordered = jnp.sort(flat, axis=1)
    low, high = ordered[:, below], ordered[:, min(below + 1, flat.shape[1] - 1)]
    limit = _between(low, high, fraction)[:, None, None]
    return [jnp.where(part > limit, limit, jnp.where(part < -limit, -limit, part)) for part in parts]


def _between(
    low: Float32[Array, " experts"], high: Float32[Array, " experts"], fraction: np.float32
) -> Float32[Array, " experts"]:
    """`low + (high - low) * fraction` as numpy does it; the product is rounded, and never part of a fused operation."""
    difference = high - low
    if fraction >= np.float32(0.5):
        return high - _rounded(difference * (np.float32(1) - fraction))
    return low + _rounded(difference * fraction)


def _rounded(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The same numbers, of which a compiler knows only that they are not negative."""
    raw = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(raw ^ (raw >> 31), jnp.float32)


def as_bytes(weights: Matrix) -> Matrix:
    """Returns floats of eight bits as bytes; anything else unchanged."""
    return lax.bitcast_convert_type(weights, jnp.uint8) if weights.dtype.name.startswith("float8") else weights


def from_bytes(weights: Matrix, dtype: Any) -> Matrix:
    """The inverse of `as_bytes`."""
    return lax.bitcast_convert_type(weights, dtype) if weights.dtype == jnp.uint8 else weights


def selects(patterns: Sequence[str], module: str) -> bool:
    """Tells whether the engine quantises a linear of a bf16 checkpoint: by its name, or the names of all fused parts.

    Args:
        patterns: `Quantization.patterns`.
        module: Full name, e.g. `model.layers.0.self_attn.qkv_proj`.

    Raises:
        QuantizationError: Some but not all of the parts are selected.
    """

    def hit(name: str) -> bool:
        return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)

    head, _, last = module.rpartition(".")
    parts = [hit(f"{head}.{part}") for part in _FUSED.get(last, ())]
    if hit(module) or (parts and all(parts)):
        return True
    if any(parts):
        raise QuantizationError(
            f"BF16_LINEAR_REQUANTIZE_PATTERNS selects some but not all parts of {module}: {', '.join(_FUSED[last])}"
        )
    return False


_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
