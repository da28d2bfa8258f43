"""Moves the arrays of a block to the engine's devices, inside a program: first as parts, then packed in place."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from portax.execution.permute_reshard import exchange
from portax.execution.propagate import Cuts, backwards, cuts_of, spec_of
from portax.layouts import Layout
from portax.planning.plan import axes_of
from portax.weights import bits
from portax.weights.blocks import Block


def lower(
    layout: Layout, block: Block, mesh: Mesh | None, held: Sequence[NamedSharding | None], zero: Any
) -> list[Shaped[Array, "..."]]:
    """Makes the engine's arrays of one block, with the layout's partitioning; for tracing.

    Args:
        layout: The layout.
        block: The block.
        mesh: The mesh that arrays go to; None leaves them where they are.
        held: The partitioning of each of the block's arrays; None if it is unknown.
        zero: See `bits.pin_bits`.
    """
    parts, tree = jax.tree.flatten(layout.cast(block))
    pack = jax.make_jaxpr(lambda *parts: layout.pack(jax.tree.unflatten(tree, parts)), return_shape=True)
    jaxpr, tensors = pack(*(jax.ShapeDtypeStruct(part.shape, part.dtype) for part in parts))
    if mesh is None:
        packed = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *parts)
        return [bits.from_bits(bits.pin_bits(array, zero)) for array in packed]
    wanted = [cuts_of(tensor.spec, len(tensor.array.shape)) for tensor in tensors]
    cuts = backwards(jaxpr.jaxpr, wanted, dict(mesh.shape))
    moves_parts = all(cut is not None for cut in cuts) and any(any(cut or ()) for cut in cuts)
    if moves_parts:
        parts = [_moved(part, mesh, cut, own, zero) for part, cut, own in zip(parts, cuts, held, strict=True)]
    packed = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *parts)
    made = []
    for array, tensor in zip(packed, tensors, strict=True):
        if moves_parts:
            array = lax.with_sharding_constraint(array, NamedSharding(mesh, tensor.spec))
        else:
            array = _spread(bits.pin_bits(array, zero), mesh, tensor.spec, None)
        made.append(bits.from_bits(bits.pin_bits(array, zero)))
    return made


def _moved(part: Any, mesh: Mesh, cuts: Cuts | None, held: NamedSharding | None, zero: Any) -> Shaped[Array, "..."]:
    """Moves a part to the partitioning that packing needs, with its bits pinned: else XLA moves it before its cast."""
    return _spread(bits.pin_bits(part, zero), mesh, spec_of(cuts or ()), held)


def _spread(
    array: Shaped[Array, "..."], mesh: Mesh, spec: PartitionSpec, held: NamedSharding | None
) -> Shaped[Array, "..."]:
    """Partitions an array in two steps: over all of the mesh first, then with the engine's replication.

    In one step XLA may gather whole arrays; and without the constraint it would move the cast back to floats, and with
    it the communication, in front of the packing.
    """
    everywhere = NamedSharding(mesh, _everywhere(array.shape, mesh, spec))
    if held is not None and (swap := exchange(array.shape, held, everywhere)) is not None:
        array = swap(array)
    array = lax.with_sharding_constraint(array, everywhere)
    return lax.with_sharding_constraint(array, NamedSharding(mesh, spec))


def _everywhere(shape: tuple[int, ...], mesh: Mesh, spec: PartitionSpec) -> PartitionSpec:
    """Cuts the partitioning further over the axes that would hold copies, if a dimension permits."""
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    used = {axis for cut in axes for axis in axes_of(cut)}
    spare = tuple(axis for axis, size in mesh.shape.items() if axis not in used and size > 1)
    copies = math.prod(mesh.shape[axis] for axis in spare)
    free = [i for i, axis in enumerate(axes) if axis is None and shape[i] % copies == 0]
    if not spare or not free or len(shape) == 1:
        return spec
    cut = max(free, key=lambda i: shape[i])
    return PartitionSpec(*axes[:cut], spare, *axes[cut + 1 :])
