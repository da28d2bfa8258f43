"""Where arrays go inside a program: from the trainer's partitioning to the engine's."""

import dataclasses
import math

from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from portax.execution.permute_reshard import exchange
from portax.layouts import Stage
from portax.planning.plan import axes_of
from portax.trainer.layer_params import LayerParams
from portax.weights import bits


@dataclasses.dataclass(frozen=True)
class Placer:
    """The `Place` of one program.

    Attributes:
        mesh: Where arrays go; None leaves them where they are.
        leaves: What the program reads.
    """

    mesh: Mesh | None
    leaves: LayerParams

    def __call__(
        self,
        array: Shaped[Array, "..."],
        spec: PartitionSpec,
        stage: Stage,
        origin: Shaped[Array, "..."] | None = None,
    ) -> Shaped[Array, "..."]:
        """As `Place`: constrained where there is a mesh, and sealed on both sides."""
        if self.mesh is not None and stage == "packed":
            array = lax.with_sharding_constraint(array, NamedSharding(self.mesh, spec))
        elif self.mesh is not None:  # sealed before, else what moves is what it was cast from
            array = _spread(bits.pin_bits(array, self.leaves.zero), self.mesh, spec, self.leaves.partitioning(origin))
        return array if stage == "part" else bits.pin_bits(array, self.leaves.zero)


def _spread(
    array: Shaped[Array, "..."], mesh: Mesh, spec: PartitionSpec, held: NamedSharding | None
) -> Shaped[Array, "..."]:
    """Partitions an array in two steps: over all of the mesh first, then as the engine replicates it.

    In one step XLA may gather whole arrays; and without the constraint it would move the cast back to floats, and with
    it the communication, in front of the packing.
    """
    everywhere = NamedSharding(mesh, _everywhere(array.shape, mesh, spec))
    if held is not None and (swap := exchange(array.shape, held, everywhere)) is not None:
        array = swap(array)
    array = lax.with_sharding_constraint(array, everywhere)
    return lax.with_sharding_constraint(array, NamedSharding(mesh, spec))


def _everywhere(shape: tuple[int, ...], mesh: Mesh, spec: PartitionSpec) -> PartitionSpec:
    """The same, cut further over the axes that would hold copies, if a dimension permits."""
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    used = {axis for cut in axes for axis in axes_of(cut)}
    spare = tuple(axis for axis, size in mesh.shape.items() if axis not in used and size > 1)
    copies = math.prod(mesh.shape[axis] for axis in spare)
    free = [i for i, axis in enumerate(axes) if axis is None and shape[i] % copies == 0]
    if not spare or not free or len(shape) == 1:
        return spec
    cut = max(free, key=lambda i: shape[i])
    return PartitionSpec(*axes[:cut], spare, *axes[cut + 1 :])
