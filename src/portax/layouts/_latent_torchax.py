"""`LatentTorchax`: the leaves of latent attention (MLA), which the torchax runner quantises to its KV cache's dtype."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from portax.errors import LayoutError
from portax.layouts._quantised_torchax import QuantisedTorchax
from portax.layouts._tpu import Axes
from portax.layouts.base import Tensor
from portax.layouts.quantization import SCALE_FORMS, is_wide
from portax.weights import bits, blocks
from portax.weights.quantize import DTYPES, quantize

_CACHES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}
_MODULE = "mla_attn.mla_attn"


@dataclasses.dataclass(frozen=True)
class LatentTorchax(QuantisedTorchax):
    """The part of `TpuInference` that holds latent attention.

    Attributes:
        kv_cache_dtype: The engine's `--kv-cache-dtype`, to which it quantises the weights that make keys and values of
            a latent vector; None for models that have none. It was run with `fp8`.
        kv_scale_form: The compiler's treatment of their scales, `narrow`, `wide` or `xla_cpu`, as in `Quantization`.
    """

    kv_cache_dtype: str | None = dataclasses.field(default=None, kw_only=True)
    kv_scale_form: str | None = dataclasses.field(default=None, kw_only=True)

    def _latent_kv(
        self, block: blocks.LatentKV, *, attention_dp: int | None, dtype: Any, axes: Axes
    ) -> tuple[Tensor, ...]:
        """`W_UK_T [heads, key, latent]` and `W_UV [heads, latent, value]` in eight bits, each with its scales.

        Source: tpu-inference 0.32, layers/vllm/custom_ops/mla_attention.py (process_weights_after_loading).
        """
        self._check_latent(block, attention_dp=attention_dp, dtype=dtype)
        to_heads = jnp.moveaxis(block.kernel, 0, 2)
        key, value = to_heads[:, : block.key_dim], to_heads[:, block.key_dim :].swapaxes(1, 2)
        (key, key_scale), (value, value_scale) = self._cached(key), self._cached(value)
        name = f"{block.name.rpartition('.')[0]}.{_MODULE}"
        lossy = (f"bfloat16 -> {_CACHES[str(self.kv_cache_dtype)]}",)
        return tuple(
            Tensor(f"{name}.{leaf}", x, self._spec(axes), lossy=lossy, refuses_values=leaf.endswith("_scale"))
            for leaf, x in (
                ("W_UK_T", key),
                ("W_UK_T_scale", key_scale),
                ("W_UV", value),
                ("W_UV_scale", value_scale.reshape(1, len(value), -1)),
            )
        )

    def _cached(self, x: Shaped[Array, "heads _ _"]) -> tuple[Shaped[Array, "heads _ _"], Shaped[Array, "heads 1 _"]]:
        dtype = DTYPES[_CACHES[str(self.kv_cache_dtype)]]
        wide = is_wide(str(self.kv_scale_form), x.shape[0] * x.shape[2])
        return quantize(bits.from_bits(x), dtype=dtype, axis=1, wide=wide, mark=True)

    def _check_latent(self, block: blocks.LatentKV, *, attention_dp: int | None, dtype: Any) -> None:
        engine = f"{block.name}: an engine of latent attention (MLA)"
        if block.sparse:
            raise LayoutError(
                f"{block.name}: tpu-inference {self.version} does not load DeepSeek V3.2 (use_indexer): its indexer's "
                "buffer wants a device that torch does not have. Export the model, and serve it elsewhere"
            )
        if attention_dp != self.tp:
            raise LayoutError(
                f"{engine} has attention_dp={self.tp}, as many as tp, and the layout has attention_dp={attention_dp}: "
                "it starts with NEW_MODEL_DESIGN=1 and enable_dp_attention alone, and stops while it loads if its "
                "heads are split"
            )
        if self.kv_cache_dtype not in _CACHES:
            cause = (
                "with 'auto' the engine quantises to no dtype at all: it loads, holds weights half of which are "
                "infinite and scales of zero, and computes nonsense"
                if self.kv_cache_dtype == "auto"
                else "any other dtype gives other weights, and none of them was run"
            )
            raise LayoutError(
                f"{engine} was run with --kv-cache-dtype fp8, and the layout has kv_cache_dtype="
                f"{self.kv_cache_dtype!r}: {cause}. Start the engine with fp8, and pass kv_cache_dtype='fp8'"
            )
        if self.kv_scale_form not in SCALE_FORMS:
            raise LayoutError(
                f"{engine} rounds scales as its compiler does: pass kv_scale_form, one of {', '.join(SCALE_FORMS)}"
            )
        if dtype != jnp.bfloat16:
            raise LayoutError(f"{engine} was run with dtype bfloat16, and this is {dtype}")
