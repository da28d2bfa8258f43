"""MaxText's default partitioning of parameters over its mesh."""

from collections.abc import Callable

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from portax.config import axes as axis_sizes
from portax.trainer.layer_params import Axes

# The mesh axes that may cut each axis of a weight, where there are such and they divide it; experts choose first.
# Source: MaxText 0.2.5, configs/base.yml, logical_axis_rules.
_RULES = {
    "num_experts": ("expert",),
    "emb_dim": ("fsdp", "expert"),
    "vocab_size": ("tensor",),
    "num_query_heads": ("tensor",),
    "num_kv_heads": ("tensor",),
    "mlp_dim": ("tensor",),
    "moe_mlp_dim": ("tensor",),
}


def partition(mesh: Mesh) -> Callable[[Axes], NamedSharding]:
    """Returns a function that gives the sharding of a weight on this mesh, from its axes; vectors are replicated.

    Args:
        mesh: The trainer's; of its axes, `fsdp`, `tensor` and `expert` cut weights.
    """

    def of(axes: Axes) -> NamedSharding:
        cuts: list[tuple[str, ...] | None] = [None] * len(axes)
        free = {axis for axis, size in mesh.shape.items() if size > 1}
        for name, rule in _RULES.items():
            for i, (of_axis, size) in enumerate(axes):
                if not axis_sizes.parse(of_axis).has_factor(name) or sum(other != "layers" for other, _ in axes) < 2:
                    continue
                cut: tuple[str, ...] = ()
                for axis in rule:
                    if axis in free and size % mesh.shape[axis] == 0:
                        cut, size = (*cut, axis), size // mesh.shape[axis]
                        free.remove(axis)
                cuts[i] = cut or None
        return NamedSharding(mesh, PartitionSpec(*cuts))

    return of
