"""Reshards an array in rounds: in each round every device sends one piece and receives one.

Every element travels at most once, straight to where it belongs. XLA's own way is a chain of collectives, each for an
axis of a mesh; where both partitionings cut the same dimension, but over different devices, that moves most of an
array twice (docs/performance.md).
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from portax.planning.plan import axes_of

MOST_ROUNDS = 16  # beyond, many small messages cost more than the bytes that they save
_Cuts: TypeAlias = tuple[tuple[str, ...], ...]  # for each dimension, the axes that cut it
_Fine: TypeAlias = dict[str, tuple[str, ...]]  # the finer axes that a mesh axis consists of


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """The rounds of a reshard: every sender, receiver and piece.

    Attributes:
        mesh: The devices, with axes fine enough to name both partitionings.
        source: The array's partitioning.
        target: Its new partitioning.
        piece: Shape of a piece.
        rounds: Pairs of a sender and a receiver in each round: every device once as either, some to themselves.
        take: Start of the sent piece in the device's shard, per round and device.
        put: Start of the received piece in the device's new shard, per round and device.
    """

    mesh: Mesh
    source: PartitionSpec
    target: PartitionSpec
    piece: tuple[int, ...]
    rounds: tuple[tuple[tuple[int, int], ...], ...]
    take: Int[np.ndarray, "rounds devices dims"]
    put: Int[np.ndarray, "rounds devices dims"]

    def __call__(self, array: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Returns the array in its new partitioning; for tracing."""
        names = self.mesh.axis_names
        shard = NamedSharding(self.mesh, self.target).shard_shape(array.shape)

        def swap(own: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
            me = lax.axis_index(names)
            new = jnp.zeros(shard, own.dtype)
            for pairs, take, put in zip(self.rounds, self.take, self.put, strict=True):
                piece = lax.dynamic_slice(own, jnp.asarray(take)[me], self.piece)
                new = lax.dynamic_update_slice(new, lax.ppermute(piece, names, pairs), jnp.asarray(put)[me])
            return new

        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            swapped = jax.shard_map(swap, mesh=self.mesh, in_specs=self.source, out_specs=self.target, check_vma=False)
            return swapped(array)


@functools.lru_cache(maxsize=4096)
def exchange(shape: tuple[int, ...], source: NamedSharding, target: NamedSharding) -> Exchange | None:
    """Plans a reshard in rounds; returns None if XLA's own way is as short, or if there would be too many rounds.

    Args:
        shape: Shape of the array.
        source: Its partitioning.
        target: Its new partitioning, on the same devices.
    """
    common = _common(source.mesh, target.mesh)
    if common is None:
        return None
    mesh, *fine = common
    before, after = (
        _cuts(sharding.spec, len(shape), axes) for sharding, axes in zip((source, target), fine, strict=True)
    )
    if all(_nested(*cuts) for cuts in zip(before, after, strict=True)):
        return None
    counts = [tuple(math.prod(mesh.shape[axis] for axis in axes) for axes in cuts) for cuts in (before, after)]
    finest = [max(pair) for pair in zip(*counts, strict=True)]
    even = all(most % n == 0 for count in counts for most, n in zip(finest, count, strict=True))
    if not even or any(size % most for size, most in zip(shape, finest, strict=True)):
        return None
    if math.prod(counts[0]) < mesh.size or math.prod(finest) // math.prod(counts[1]) > MOST_ROUNDS:
        return None
    piece = tuple(size // most for size, most in zip(shape, finest, strict=True))
    return _exchange(shape, mesh, _spec(before), _spec(after), piece)


def _exchange(
    shape: tuple[int, ...], mesh: Mesh, source: PartitionSpec, target: PartitionSpec, piece: tuple[int, ...]
) -> Exchange:
    held, wanted = (_pieces(shape, NamedSharding(mesh, spec), piece) for spec in (source, target))
    owner = {index: device for device, indices in enumerate(held) for index in indices}
    edges = {(owner[index], device): index for device, indices in enumerate(wanted) for index in indices}
    rounds, take, put = [], [], []
    left = set(edges)
    while left:  # every device sends and gets as many as any other, so a matching without them leaves such a graph
        pairs = _matching(left, mesh.size)
        left -= set(pairs)
        rounds.append(pairs)
        take.append([_start(edges[pair], held[pair[0]][0], piece) for pair in pairs])
        into = {pair[1]: _start(edges[pair], wanted[pair[1]][0], piece) for pair in pairs}
        put.append([into[device] for device in range(mesh.size)])
    return Exchange(mesh, source, target, piece, tuple(rounds), np.array(take, np.int32), np.array(put, np.int32))


def _matching(edges: set[tuple[int, int]], devices: int) -> tuple[tuple[int, int], ...]:
    from scipy.sparse import csgraph, csr_array  # a third of a second, which few conversions need

    senders, receivers = zip(*sorted(edges), strict=True)
    graph = csr_array((np.ones(len(edges), np.int8), (senders, receivers)), shape=(devices, devices))
    return tuple(enumerate(csgraph.maximum_bipartite_matching(graph, perm_type="column").tolist()))


def _pieces(shape: tuple[int, ...], sharding: NamedSharding, piece: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
    """Returns the pieces of every device's shard, in order, by their number in each dimension."""
    indices = sharding.devices_indices_map(shape)
    return [
        list(
            itertools.product(
                *(
                    range((cut.start or 0) // n, (size if cut.stop is None else cut.stop) // n)
                    for cut, size, n in zip(indices[device], shape, piece, strict=True)
                )
            )
        )
        for device in sharding.mesh.devices.flat
    ]


def _start(index: tuple[int, ...], first: tuple[int, ...], piece: tuple[int, ...]) -> list[int]:
    return [(i - own) * n for i, own, n in zip(index, first, piece, strict=True)]


def _nested(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Tells whether one partitioning of a dimension refines the other in place, so that shards only split or join."""
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]


def _spec(cuts: _Cuts) -> PartitionSpec:
    return PartitionSpec(*(axes or None for axes in cuts))


def _cuts(spec: PartitionSpec, ndim: int, fine: _Fine) -> _Cuts:
    axes = [*spec, *[None] * (ndim - len(spec))]
    return tuple(tuple(name for axis in axes_of(cut) for name in fine[axis]) for cut in axes)


@functools.cache
def _common(one: Any, other: Any) -> tuple[Mesh, _Fine, _Fine] | None:
    """Returns a mesh with an axis for every factor of either's axes, and the names of both meshes' axes in it.

    It is None if they differ in devices or their order, or if axes have no common factors.
    """
    if one.devices.size != other.devices.size or (one.devices.ravel() != other.devices.ravel()).any():
        return None
    strides = [_strides(mesh) for mesh in (one, other)]
    every = sorted({1, one.size, *(stride for found in strides for ends in found.values() for stride in ends)})
    factors = [*itertools.pairwise(every)][::-1]  # the last axis has the shortest stride
    if any(high % low for low, high in factors):
        return None
    names = {(low, high): f"stride_{low}" for low, high in factors}
    fine = [
        {
            axis: tuple(name for (low, high), name in names.items() if start <= low and high <= stop)
            for axis, (start, stop) in found.items()
        }
        for found in strides
    ]
    mesh = Mesh(one.devices.reshape([high // low for low, high in factors]), tuple(names.values()))
    return mesh, fine[0], fine[1]


def _strides(mesh: Mesh) -> dict[str, tuple[int, int]]:
    """Returns the stride of each axis in the order of devices, and the stride at which it ends."""
    ends = [math.prod(mesh.devices.shape[i:]) for i in range(mesh.devices.ndim + 1)]
    return {axis: (ends[i + 1], ends[i]) for i, axis in enumerate(mesh.axis_names)}
