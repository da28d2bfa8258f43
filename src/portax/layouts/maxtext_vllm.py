"""`MaxTextVllm`: MaxText's own model inside vLLM-on-TPU (`MaxTextForCausalLM`), under the trainer's names.

Every rule was read off the running engine (MaxText 0.2.5 in tpu-inference 0.32.0). In MaxText they stand in
integration/vllm/maxtext_vllm_adapter/adapter.py, integration/vllm/convert_utils.py, layers/moe.py and the
logical_axis_rules of configs/inference/vllm.yml.
"""

import dataclasses
import functools
import re
from typing import Any, ClassVar, Literal, NoReturn

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from portax.errors import LayoutError
from portax.layouts._tpu import installed_version, must_be_positive
from portax.layouts.base import Layout, Tensor
from portax.layouts.native_model import NativeModel
from portax.weights import blocks, kernels

_KNOWN = ("0.2.5",)
_EXPERTS = ("per_shard", "whole", "as_loaded")
_EXPERT_MULTIPLE = 256  # two vector registers' minor dimensions, of which a grouped matrix product takes one each
_CUTS = {  # the mesh axes over which each logical axis is cut, in this order
    "vocab": ("model", "expert"),
    "heads": ("model", "expert"),
    "kv_heads": ("model", "expert"),
    "mlp": ("attn_dp", "model", "expert"),
    "mlp_moe": ("attn_dp", "model"),
    "exp": ("attn_dp_expert", "expert"),
}
_STACK = re.compile(r"model\.decoder\.(layers|dense_layers|moe_layers|scanned_blocks|layers_remainder)\.")
_ROUTER_BIAS = (
    "the trainer's tree has not got it: MaxText keeps this bias in a MoEBiasVar, which is no nnx.Param: hand over "
    "nnx.state(model), or nnx.state(model, (nnx.Param, MoEBiasVar))"
)
_ENGINE_OWNED = re.compile(r"(^|\.)rngs\.|\.cache\.|\.MlaKVCache_\d+\.")


@dataclasses.dataclass(frozen=True)
class MaxTextVllm(Layout):
    """The state of MaxText's own model inside vLLM-on-TPU: an `nnx.State` of the trainer's leaves, layer by layer.

    Names are `model.` and the trainer's path, joined by dots, of layers that are not scanned. KV heads are repeated
    where there are fewer than shards; the gate and up kernels of experts are one leaf, and their width is padded. The
    mesh is that of NEW_MODEL_DESIGN=1, of seven axes.

    Attributes:
        version: MaxText's version, e.g. `0.2.5`.
        tp: vLLM's `tensor_parallel_size`; the mesh axis `model` is `tp / attention_dp`.
        attention_dp: Attention data-parallel size.
        expert_parallel: `expert_parallelism` of the engine's sharding strategy; there are `tp * expert_parallel`
            devices.
        prefused: True if gate and up are one leaf (`prefuse_moe_weights`).
        dtype: The dtype that the engine stores weights in.
        experts: The order of gate and up in the fused leaf. `per_shard`: each shard's slices side by side, as the
            engine's own loader does it; refused if the engine then serves a wrong model. `whole`: all of gate, then all
            of up, for experts that are split over another axis, for which the loader is wrong. `as_loaded`: as the
            loader does it, also if the engine then serves a wrong model; only for comparison.
        specs: Name patterns (regular expressions) and partitionings of leaves that no rule knows.
        allow_untested: True treats a version that was not checked like the known one.

    Raises:
        LayoutError: The version is unknown, or a size is not possible.

    Example:
        >>> portax.layouts.MaxTextVllm(version="0.2.5", tp=4).mesh_axes["model"]
        4
    """

    names: ClassVar[Literal["hub", "trainer"]] = "trainer"

    version: str
    tp: int
    attention_dp: int = 1
    expert_parallel: int = 1
    prefused: bool = True
    dtype: Any = jnp.dtype(jnp.bfloat16)
    experts: str = "per_shard"
    specs: tuple[tuple[str, PartitionSpec], ...] = ()
    allow_untested: bool = False

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        for what in ("tp", "attention_dp", "expert_parallel"):
            must_be_positive(what, getattr(self, what))
        if self.tp % self.attention_dp:
            raise LayoutError(f"attention_dp={self.attention_dp} does not divide tp={self.tp}, which it is a part of")
        if self.experts not in _EXPERTS:
            raise LayoutError(f"experts={self.experts!r} is unknown; known: {', '.join(_EXPERTS)}")
        if self.version not in _KNOWN and not self.allow_untested:
            raise LayoutError(
                f"MaxText {self.version!r} is not among the versions that were seen in vLLM, {', '.join(_KNOWN)}; it "
                f"may hold weights differently. Pin it (pip install 'maxtext=={_KNOWN[-1]}'), upgrade portax, or "
                "pass allow_untested=True to use the newest known layout"
            )

    @classmethod
    def installed(cls, *, tp: int, **options: Any) -> "MaxTextVllm":
        """The layout of the MaxText that is installed here.

        Args:
            tp: vLLM's `tensor_parallel_size`.
            **options: Other attributes.

        Raises:
            LayoutError: MaxText is not installed, or its version is unknown.
        """
        example = f'MaxTextVllm(version="{_KNOWN[-1]}", tp={tp})'
        return cls(version=installed_version("maxtext", example), tp=tp, **options)

    @property
    def mesh_axes(self) -> dict[str, int]:
        """The axes that cut weights; `model` is `tp / attention_dp`."""
        with_attention = self.attention_dp > 1
        return {
            "attn_dp": self.attention_dp,
            "attn_dp_expert": self.expert_parallel if with_attention else 1,
            "expert": 1 if with_attention else self.expert_parallel,
            "model": self.tp // self.attention_dp,
        }

    def for_architecture(self, architecture: str | None, native: NativeModel | None = None) -> "MaxTextVllm":
        """The same for all.

        Raises:
            LayoutError: MaxText cannot boot that model in vLLM.
        """
        if architecture == "GptOssForCausalLM":
            raise LayoutError(_NO_EXPERT_BIASES)
        return self

    def path(self, tensor: Tensor, *, layer: int | str | None, module_prefix: str) -> str:
        """The name in a model whose layers are all of one kind."""
        del module_prefix
        return f"model.{tensor.name}" if layer is None else f"model.decoder.layers_{layer}.{tensor.name}"

    def full_name(self, tensor: Tensor, *, layer: int | None, unscanned: str, module_prefix: str) -> str:
        """`model.` and the path that a trainer has that does not scan its layers."""
        del layer, module_prefix
        return ".".join(["model", *filter(None, unscanned.split("/")), tensor.name])

    def is_engine_owned(self, name: str) -> bool:
        """The state of random number generators, and MaxText's own caches, which vLLM does not use."""
        return _ENGINE_OWNED.search(name) is not None

    def cause_of_stranger(self, name: str) -> str | None:
        """As a scanned model's stacks tell, or a router bias that a filter left behind."""
        if _STACK.match(name):
            return (
                "the engine's model is scanned, and MaxText's adapter unrolls it: start the engine with "
                "scan_layers=False in maxtext_config, or without scan_layers"
            )
        return _ROUTER_BIAS if name.endswith(".gate.bias") else None

    def trainer_param(self, block: blocks.TrainerParam) -> tuple[Tensor, ...]:
        """As the trainer has it; KV heads repeated."""
        value = block.value
        if block.axes is None:
            return (Tensor(block.name, value, self._given_spec(block.name, value)),)
        if "activation_mlp" in block.axes:
            raise LayoutError(f"{block.name}: {_NO_EXPERT_BIASES}", expected="no biases of experts", cause="gpt-oss")
        if "kv_heads" in block.axes:
            value = self._repeated(block.name, value, block.axes.index("kv_heads"))
        return (Tensor(block.name, value, self._spec(*block.axes)),)

    def fused_moe(self, block: blocks.FusedMoE) -> tuple[Tensor, ...]:
        """`wi` (or `wi_0` and `wi_1`) and `wo`, each shard's slice of the width padded at its own end."""
        chunks = self._chunks(block)
        padded = self.padded_width(block.gate.shape[2])
        column, row = self._spec("exp", "", "mlp_moe"), self._spec("exp", "mlp_moe", "")
        padding = functools.partial(_pad_chunks, chunks=chunks, padded=padded)
        out = Tensor(f"{block.name}.wo", padding(block.down, axis=1), row)
        if not self.prefused:
            parts = {"wi_0": block.gate, "wi_1": block.up}
            return (*(Tensor(f"{block.name}.{name}", padding(x, axis=2), column) for name, x in parts.items()), out)
        fused = kernels.interleave([block.gate, block.up], shards=chunks, multiple=padded // chunks)
        return Tensor(f"{block.name}.wi", fused, column), out

    def padded_width(self, width: int) -> int:
        """The width that MaxText's adapter pads experts to, as `padded_base_moe_mlp_dim`.

        Args:
            width: Their true width, `moe_intermediate_size` of the hub's config.
        """
        if width // self._width_shards % _EXPERT_MULTIPLE == 0:
            return width
        return kernels.round_up(width, self._width_shards * _EXPERT_MULTIPLE)

    def _chunks(self, block: blocks.FusedMoE) -> int:
        """Returns the number of slices of the width, each of which is padded.

        Raises:
            LayoutError: It cannot be cut so, or the engine would serve a wrong model.
        """
        width = block.gate.shape[2]
        if width % self._width_shards:
            raise LayoutError(
                f"{block.name}: MoE width {width} is not divisible by attn_dp * model={self._width_shards}"
            )
        split = self.expert_parallel > 1
        if self._width_shards == 1:
            return 1
        if self.experts == "whole":
            if not split or not self.prefused:
                raise LayoutError(
                    f"{block.name}: experts='whole' is for experts that expert_parallel > 1 splits and prefused=True; "
                    "here the engine cuts every expert's width and takes each shard's slices of gate and up: use "
                    "experts='per_shard'"
                )
            return 1
        if self.experts == "per_shard":
            self._refuse_wrong_model(block.name, split=split)
        return self._width_shards

    def _refuse_wrong_model(self, name: str, *, split: bool) -> None:
        sizes = f"attn_dp * model={self._width_shards}"
        comparison = "experts='as_loaded' gives what the engine's own loader makes, for comparison alone"
        if not self.prefused:
            raise LayoutError(
                f"{name}: prefused=False with {sizes} serves a wrong model",
                expected=f"an engine that is started with prefuse_moe_weights=True; {comparison}",
                cause="the engine fuses gate and up over all shards, and the first ones then hold gate alone",
            )
        if split:
            raise LayoutError(
                f"{name}: expert_parallel={self.expert_parallel} with {sizes} serves a wrong model",
                expected="experts='whole' (with attention_dp > 1, the engine needs enable_dp_attention in its "
                f"maxtext_config), or expert parallelism alone; {comparison}",
                cause="the engine moves whole experts to devices, and takes each shard's slices, side by side, for all "
                "of gate and all of up",
            )

    @property
    def _width_shards(self) -> int:
        return self.mesh_axes["attn_dp"] * self.mesh_axes["model"]

    def _repeated(self, name: str, value: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        heads, shards = value.shape[axis], self.mesh_axes["model"] * self.mesh_axes["expert"]
        if heads >= shards:
            return value
        if shards % heads:
            raise LayoutError(f"{name}: {heads} KV heads cannot be repeated for model * expert={shards}")
        return jnp.repeat(value, shards // heads, axis=axis)

    def _spec(self, *axes: str) -> PartitionSpec:
        """As MaxText's rules say, without mesh axes of size 1 and without what is replicated at the end."""
        sizes = self.mesh_axes
        cuts = [tuple(cut for cut in _CUTS.get(axis, ()) if sizes[cut] > 1) for axis in axes]
        while cuts and not cuts[-1]:
            cuts.pop()
        return PartitionSpec(*(cut[0] if len(cut) == 1 else cut or None for cut in cuts))

    def _given_spec(self, name: str, value: Shaped[Array, "..."]) -> PartitionSpec:
        for pattern, spec in self.specs:
            if re.fullmatch(pattern, name):
                return spec
        raise LayoutError(
            f"{name}: no rule says how the engine cuts {list(value.shape)}",
            expected=f"specs=((r{re.escape(name)!r}, PartitionSpec(...)),), or the layout that "
            "portax.integrations.tpu_inference.layout reads off the live engine",
            cause="a block that MaxText 0.2.5 has not",
        )

    def _not_by_hub_name(self, block: Any) -> NoReturn:
        raise LayoutError(f"{getattr(block, 'name', block)}: MaxTextVllm holds weights under the trainer's names")

    linear = merged_linear = qkv = embedding = lm_head = tied_lm_head = _not_by_hub_name


_NO_EXPERT_BIASES = (
    "MaxText 0.2.5 cannot boot gpt-oss in vLLM: the biases of its experts are cut over one mesh axis twice "
    "(DuplicateSpecError); use tpu-inference's own model of it"
)


def _pad_chunks(x: Shaped[Array, "..."], *, axis: int, chunks: int, padded: int) -> Shaped[Array, "..."]:
    """Cuts an axis into equal chunks and appends zeros to each, so that all together are `padded` long."""
    shape = x.shape
    cut = x.reshape(*shape[:axis], chunks, shape[axis] // chunks, *shape[axis + 1 :])
    return kernels.pad_axis(cut, axis=axis + 1, multiple=padded // chunks).reshape(
        *shape[:axis], padded, *shape[axis + 1 :]
    )
