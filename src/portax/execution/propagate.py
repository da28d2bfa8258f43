"""Carries partitionings through a program that moves elements: from its inputs on, or from its results back.

Packing moves nothing between devices if each part is cut like the packed array. A layout gives the cuts of the packed
array; this module finds those of its parts. In the same way, it finds the cuts of the parts that a hook makes of a
leaf from the leaf's partitioning.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

from jax.extend.core import Jaxpr, Literal
from jax.sharding import PartitionSpec

from portax.planning.flow import inner_program
from portax.planning.plan import axes_of
from portax.trainer.layer_params import SCALED_NAME

Cuts: TypeAlias = tuple[tuple[str, ...], ...]
"""The mesh axes that cut each dimension."""

Shape: TypeAlias = tuple[int, ...]

_ELEMENTWISE = frozenset(("xor", "bitcast_convert_type", "convert_element_type", "copy", "optimization_barrier"))
_PARTIAL = frozenset(("slice", "dynamic_slice", "split", "pad"))
_RESHAPES = frozenset(("reshape", "squeeze", "expand_dims"))


def cuts_of(spec: PartitionSpec, ndim: int) -> Cuts:
    """Returns the mesh axes that cut each dimension, given a spec."""
    return tuple(axes_of(cut) for cut in (*spec, *[None] * (ndim - len(spec))))


def spec_of(cuts: Cuts) -> PartitionSpec:
    """Returns the spec of these cuts."""
    return PartitionSpec(*(axes or None for axes in cuts))


def forwards(jaxpr: Jaxpr, cuts: Sequence[Cuts | None], sizes: dict[str, int]) -> list[Cuts | None]:
    """Finds the cuts of each result of a program, given its inputs' cuts; None if they are unknown.

    Args:
        jaxpr: The program.
        cuts: The cuts of each input; None if they are unknown.
        sizes: Size of each mesh axis.
    """
    known: dict[Any, Cuts | None] = dict(zip(jaxpr.invars, cuts, strict=True))
    for equation in jaxpr.eqns:
        given = [None if isinstance(atom, Literal) else known.get(atom) for atom in equation.invars]
        if inner := inner_program(equation):
            program, first = inner
            made = forwards(program, given[first:], sizes)
        else:
            made = [_forwards(equation, given, _shape(out), sizes) for out in equation.outvars]
        known.update(zip(equation.outvars, made, strict=True))
    return [None if isinstance(atom, Literal) else known.get(atom) for atom in jaxpr.outvars]


def _forwards(equation: Any, given: list[Cuts | None], shape: Shape, sizes: dict[str, int]) -> Cuts | None:
    """Returns the cuts that all inputs of a result agree on."""
    through = [
        _through(equation, cuts, _shape(atom), shape, sizes, back=False) if cuts is not None else None
        for atom, cuts in zip(equation.invars, given, strict=True)
        if atom.aval.ndim or not shape
    ]
    return through[0] if through and all(cuts == through[0] for cuts in through) else None


def backwards(jaxpr: Jaxpr, cuts: Sequence[Cuts | None], sizes: dict[str, int]) -> list[Cuts | None]:
    """Finds the best cuts for each input of a program, given its results' cuts; None if no cut suits all results.

    Args:
        jaxpr: The program.
        cuts: The cuts of each result; None if any will do.
        sizes: Size of each mesh axis.
    """
    wanted: dict[Any, Cuts | None] = {}

    def want(atom: Any, cut: Cuts | None) -> None:
        if not isinstance(atom, Literal) and atom.aval.ndim:
            wanted[atom] = cut if wanted.get(atom, cut) == cut else None

    for atom, cut in zip(jaxpr.outvars, cuts, strict=True):
        want(atom, cut)
    for equation in reversed(jaxpr.eqns):
        needed = [wanted.get(out) for out in equation.outvars]
        if inner := inner_program(equation):
            program, first = inner
            found = [None] * first + backwards(program, needed, sizes)
        else:
            found = [_backwards(equation, needed, _shape(atom), sizes) for atom in equation.invars]
        for atom, cut in zip(equation.invars, found, strict=True):
            want(atom, cut)
    return [wanted.get(atom) for atom in jaxpr.invars]


def _backwards(equation: Any, needed: list[Cuts | None], shape: Shape, sizes: dict[str, int]) -> Cuts | None:
    through = [
        _through(equation, cuts, _shape(out), shape, sizes, back=True)
        for out, cuts in zip(equation.outvars, needed, strict=True)
        if cuts is not None
    ]
    return through[0] if through and all(cuts == through[0] for cuts in through) else None


def _shape(atom: Any) -> Shape:
    return tuple(atom.aval.shape)


def _through(
    equation: Any, cuts: Cuts, source: Shape, target: Shape, sizes: dict[str, int], *, back: bool
) -> Cuts | None:
    """Returns the cuts on the other side of one equation; None if shards would have to exchange elements."""
    name, params = equation.primitive.name, equation.params
    if name in _ELEMENTWISE or params.get("name") == SCALED_NAME:
        return cuts if source == target else None
    if name in _RESHAPES:
        return _reshaped(cuts, source, target, sizes)
    if name == "transpose":
        order = params["permutation"]
        return tuple(cuts[order.index(i) if back else axis] for i, axis in enumerate(order))
    if name == "concatenate":
        return None if cuts[params["dimension"]] else cuts
    if name == "broadcast_in_dim":
        return _broadcast(cuts, source, target, params["broadcast_dimensions"], back=back)
    if name in _PARTIAL and len(source) == len(target):
        whole = all(a == b or not cut for a, b, cut in zip(source, target, cuts, strict=True))
        return cuts if whole else None
    return None


def _broadcast(cuts: Cuts, source: Shape, target: Shape, places: Shape, *, back: bool) -> Cuts | None:
    small, large = (target, source) if back else (source, target)
    kept = [(i, place) for i, place in enumerate(places) if small[i] == large[place]]
    if back:
        if any(cut for i, cut in enumerate(cuts) if i not in {place for _, place in kept}):
            return None
        at = dict(kept)
        return tuple(cuts[at[i]] if i in at else () for i in range(len(small)))
    if any(cut for i, cut in enumerate(cuts) if i not in dict(kept)):
        return None
    by_place = {place: cuts[i] for i, place in kept}
    return tuple(by_place.get(i, ()) for i in range(len(large)))


def _reshaped(cuts: Cuts, source: Shape, target: Shape, sizes: dict[str, int]) -> Cuts | None:
    """A cut stays with the slowest axis of those that a reshape splits or joins, if its size divides that."""
    found: list[tuple[str, ...]] = [()] * len(target)
    for ours, theirs in _groups(source, target):
        axes = [i for i in ours if source[i] != 1] or ours[:1]
        if any(cuts[i] for i in ours if i not in axes[:1]):
            return None
        if not axes or not cuts[axes[0]]:
            continue
        into = next((i for i in theirs if target[i] != 1), None)
        shards = 1
        for axis in cuts[axes[0]]:
            shards *= sizes[axis]
        if into is None or target[into] % shards or source[axes[0]] % shards:
            return None
        found[into] = cuts[axes[0]]
    return tuple(found)


def _groups(source: Shape, target: Shape) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions on both sides that hold the same elements."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) or j < len(target):
        ours, theirs = [i] if i < len(source) else [], [j] if j < len(target) else []
        a = source[i] if ours else 1
        b = target[j] if theirs else 1
        i, j = i + len(ours), j + len(theirs)
        while a != b:
            if a < b:
                if i == len(source):
                    return []
                a, ours, i = a * source[i], [*ours, i], i + 1
            else:
                if j == len(target):
                    return []
                b, theirs, j = b * target[j], [*theirs, j], j + 1
        groups.append((ours, theirs))
    return groups
