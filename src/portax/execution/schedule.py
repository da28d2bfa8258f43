"""The calls of a conversion: the tensors that each call makes, and the order of calls."""

import dataclasses
import functools
import itertools
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from portax.planning.plan import Entry, Plan
from portax.trainer.lazy_array import LazyArray
from portax.trainer.scan import LayerGroup, LayerSlice

_OfLayer: TypeAlias = tuple[LayerSlice, tuple[Entry, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class ProgramCall:
    """One call of a program, which makes some tensors of one layer.

    Attributes:
        group: The group that the layer belongs to.
        layer: The layer.
        tensors: Indices of its tensors among the layer's.
        entries: Those tensors, as planned.
        last: True if the next call is for another layer.
        frees: Paths of leaves that no later call reads.
    """

    group: LayerGroup
    layer: LayerSlice
    tensors: slice
    entries: tuple[Entry, ...]
    last: bool
    frees: tuple[str, ...] = ()

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(entry.nbytes for entry in self.entries)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Names of its tensors."""
        return tuple(entry.name for entry in self.entries)

    @functools.cached_property
    def needs(self) -> tuple[str, ...]:
        """The leaves that its tensors are made of, relative to the layer."""
        sources = {source for entry in self.entries for source in entry.sources}
        ends = {path: self.layer.path(path) for path in self.group.paths}
        return tuple(path for path, end in ends.items() if any(source.endswith(end) for source in sources))

    @functools.cached_property
    def reads(self) -> tuple[tuple[str, str, tuple[int | slice, ...]], ...]:
        """The leaves that it needs: path relative to the layer, path in the tree, and the layer's index in it."""
        places = ((path, self.group.scan_axis(path)) for path in self.needs)
        return tuple((path, self.layer.path(path), self.layer.at(axis)) for path, axis in places)


def schedule(
    plan: Plan,
    groups: Iterable[LayerGroup],
    bucket_bytes: int | None,
    only: Container[str] | None = None,
    *,
    stacks_of: Mapping[str, Any] | None = None,
) -> Iterator[ProgramCall]:
    """Yields the calls of a plan, in order: a layer at a time, or parts of a layer that is larger than a bucket.

    Args:
        plan: The plan.
        groups: The groups of the plan.
        bucket_bytes: Most bytes that a call makes, unless it makes one tensor; None for no limit.
        only: Names of the tensors to make; None for all.
        stacks_of: The leaves of the tree, to finish each stack on disk, in all its layers, before the next one; None to
            go layer by layer.
    """
    entries = iter(plan.entries)
    for group, count in zip(groups, plan.tensors_per_layer, strict=True):
        of_layer = [(layer, tuple(itertools.islice(entries, count))) for layer in group.layers]
        if stacks_of is None or not (group.scan and _on_disk(group, stacks_of)):
            yield from _calls(group, of_layer, slice(0, count), bucket_bytes, only)
            continue
        for stack in _by_container(of_layer):
            for tensors in _by_source(stack[0][1]):
                work = [*_calls(group, stack, tensors, bucket_bytes, only)]
                yield from work[:-1]
                for last in work[-1:]:
                    yield dataclasses.replace(last, frees=_read_by(work))


def _calls(
    group: LayerGroup, of_layer: Iterable[_OfLayer], tensors: slice, most: int | None, only: Container[str] | None
) -> Iterator[ProgramCall]:
    for layer, entries in of_layer:
        cuts = [*_cuts(entries, tensors, most, only)]
        for cut in cuts:
            yield ProgramCall(group, layer, cut, entries[cut], last=cut is cuts[-1])


def _on_disk(group: LayerGroup, leaves: Mapping[str, Any]) -> bool:
    layer = group.layers[0]
    return any(isinstance(leaves[layer.path(path)], LazyArray) for path in group.paths)


def _by_container(of_layer: Iterable[_OfLayer]) -> Iterable[list[_OfLayer]]:
    """Groups layers by their stack."""
    stacks: dict[str, list[_OfLayer]] = {}
    for layer, entries in of_layer:
        stacks.setdefault(layer.container, []).append((layer, entries))
    return stacks.values()


def _by_source(entries: tuple[Entry, ...]) -> Iterator[slice]:
    """Returns the shortest runs of tensors such that no leaf is in two of them."""
    last = {source: i for i, entry in enumerate(entries) for source in entry.sources}
    start = end = 0
    for i, entry in enumerate(entries):
        end = max([end, *(last[source] for source in entry.sources)])
        if i == end:
            yield slice(start, i + 1)
            start = end = i + 1


def _read_by(work: Iterable[ProgramCall]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(call.layer.path(path) for call in work for path in call.needs))


def _cuts(entries: tuple[Entry, ...], of: slice, most: int | None, only: Container[str] | None) -> Iterator[slice]:
    """Cuts the wanted tensors into runs."""
    start, size = of.start, 0
    for i in range(of.start, of.stop):
        entry = entries[i]
        wanted = only is None or entry.name in only
        if i > start and (not wanted or (most is not None and size + entry.nbytes > most)):
            yield slice(start, i)
            start, size = i, 0
        if wanted:
            size += entry.nbytes
        else:
            start = i + 1
    if start < of.stop:
        yield slice(start, of.stop)
