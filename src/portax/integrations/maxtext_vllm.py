"""MaxText's own model inside a live vLLM engine (`MaxTextForCausalLM`): its layout, and its leaves.

`portax.integrations.tpu_inference` asks here; measured with MaxText 0.2.5 and tpu-inference 0.32.0.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from portax.converters.structure import is_known
from portax.errors import LayoutError
from portax.layouts import MaxTextVllm
from portax.trainer.flatten import flatten, unbox

_CLASS = "MaxTextForCausalLM"
_AXES = ("data", "attn_dp", "attn_dp_expert", "expert", "model", "dcp", "pcp")
_IN_LAYER = re.compile(r"model\.(?:decoder\.(?:dense_|moe_)?layers_\d+\.)?(?P<leaf>.+)")
_UNPROVEN = ("scan_layers", "quantization", "fused_mlp", "fused_qkv", "fuse_expert_scales")


def is_maxtext(runner: Any) -> bool:
    """Tells whether the engine runs MaxText's own model."""
    return type(getattr(runner, "model", None)).__name__ == _CLASS


def layout(runner: Any, *, experts: str = "per_shard") -> MaxTextVllm:
    """Returns the layout, read off the engine's mesh and the configuration of its model.

    Args:
        runner: The engine's runner.
        experts: As for `MaxTextVllm`.

    Raises:
        LayoutError: The engine was started in a way that is not proven, or MaxText's version is unknown.
    """
    mesh, config = runner.mesh.shape, runner.model.maxtext_config
    _check_mesh(mesh)
    if unproven := [f"{name}={value!r}" for name in _UNPROVEN if (value := getattr(config, name, None))]:
        raise LayoutError(f"the engine's maxtext_config has {', '.join(unproven)}, with which nothing was tried")
    found = MaxTextVllm.installed(
        tp=mesh["model"] * mesh["attn_dp"],
        attention_dp=mesh["attn_dp"],
        expert_parallel=mesh["expert"] * mesh["attn_dp_expert"],
        prefused=bool(config.prefuse_moe_weights),
        dtype=jnp.dtype(getattr(config.weight_dtype, "value", config.weight_dtype)),
        experts=experts,
        specs=tuple(_unknown_specs(runner.state)),
    )
    _check_width(found, config)
    if experts == "whole" and mesh["attn_dp_expert"] > 1 and not getattr(config, "enable_dp_attention", False):
        raise LayoutError(
            f"experts='whole' with attn_dp_expert={mesh['attn_dp_expert']} needs enable_dp_attention=True in the "
            "engine's additional_config['maxtext_config']: without it the engine cuts every expert and would serve a "
            "wrong model"
        )
    return found


def trainer_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the leaves of the engine's state by full name, except those that are the engine's own by their type.

    The engine's own are the states of random number generators, and caches. Any other leaf that is no weight stays, so
    that a plan reports it.
    """
    from flax import nnx  # the engine's own dependency, not ours

    owned = (nnx.RngState, nnx.Cache, nnx.Intermediate)
    return {".".join(path): box for path, box in flatten(state) if not isinstance(box, owned)}


def _check_mesh(mesh: Mapping[str, int]) -> None:
    if missing := [axis for axis in _AXES if axis not in mesh]:
        raise LayoutError(
            f"the engine's mesh has {dict(mesh)}, without {', '.join(missing)}: {_CLASS} was proven on the mesh of "
            "seven axes; start the engine with NEW_MODEL_DESIGN=1"
        )
    unproven = [axis for axis in ("data", "dcp", "pcp") if mesh[axis] > 1]
    unproven += [axis for axis in mesh if axis not in _AXES and mesh[axis] > 1]
    unproven += ["expert"] if mesh["attn_dp"] > 1 and mesh["expert"] > 1 else []
    unproven += ["attn_dp_expert"] if mesh["attn_dp"] == 1 and mesh["attn_dp_expert"] > 1 else []
    if unproven:
        sizes = ", ".join(f"{axis}={mesh[axis]}" for axis in unproven)
        raise LayoutError(
            f"the engine's mesh has {sizes} in {dict(mesh)}, which {_CLASS} was not run with: start it with tensor, "
            "attention-data and expert parallelism alone"
        )


def _check_width(layout: MaxTextVllm, config: Any) -> None:
    """Refuses a width that was padded by hand, in another way than the adapter's: the kernel may not take it."""
    if getattr(config, "num_experts", 1) <= 1:
        return
    width = getattr(config, "moe_mlp_dim", None) or config.base_moe_mlp_dim
    padded = getattr(config, "padded_base_moe_mlp_dim", None) or width
    if padded != (expected := layout.padded_width(width)):
        raise LayoutError(
            f"the engine's padded_base_moe_mlp_dim is {padded}, and experts of width {width} are padded to {expected} "
            f"for attn_dp * model={layout.mesh_axes['attn_dp'] * layout.mesh_axes['model']}: leave it unset in "
            "maxtext_config; MaxText's adapter sets it by moe_intermediate_size of the hub's config"
        )


def _unknown_specs(state: Mapping[str, Any]) -> Iterable[tuple[str, PartitionSpec]]:
    """Returns the partitioning of leaves that no rule covers, by their names within a layer."""
    found: dict[str, PartitionSpec] = {}
    for name, leaf in _weights(state):
        sharding, path = getattr(leaf, "sharding", None), name.replace(".", "/")
        if isinstance(sharding, NamedSharding) and not is_known(path, leaf.ndim):
            found[re.escape(name)] = _plain(sharding)
    return found.items()


def _weights(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, box in trainer_state(state).items():
        if match := _IN_LAYER.fullmatch(name):
            yield match["leaf"], unbox(box)


def _plain(sharding: NamedSharding) -> PartitionSpec:
    """Returns a partitioning without axes of size 1."""
    cuts = [(cut,) if isinstance(cut, str) else tuple(cut or ()) for cut in sharding.spec]
    cuts = [tuple(axis for axis in cut if sharding.mesh.shape[axis] > 1) for cut in cuts]
    return PartitionSpec(*(cut[0] if len(cut) == 1 else cut or None for cut in cuts))
