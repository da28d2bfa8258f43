"""What a conversion consists of: which tensors one call of a program makes, and in which order."""

import dataclasses
import itertools
from collections.abc import Container, Iterable, Iterator
from typing import TypeAlias

from jax.sharding import Sharding

from portax.planning.plan import Entry, Plan
from portax.trainer.lazy_array import LazyArray
from portax.trainer.scan import Layer, Section

_OfLayer: TypeAlias = tuple[Layer, tuple[Entry, ...]]


@dataclasses.dataclass(frozen=True)
class Job:
    """Some of the tensors of one layer, made by one call of a program.

    Attributes:
        section: The section that the layer belongs to.
        layer: The layer.
        tensors: Which of the layer's tensors.
        entries: Those tensors, as planned.
        last: Whether the next job is of another layer.
        frees: What no later job reads.
    """

    section: Section
    layer: Layer
    tensors: slice
    entries: tuple[Entry, ...]
    last: bool
    frees: tuple[LazyArray, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(entry.nbytes for entry in self.entries)

    def needs(self, leaf: str) -> bool:
        """Whether any of them is made of this leaf, given by its path relative to the layer."""
        path = self.layer.path(leaf)
        return any(source.endswith(path) for entry in self.entries for source in entry.sources)

    @property
    def source_sharding(self) -> Sharding | None:
        """Where the trainer has the leaves that they are made of; None for host memory."""
        leaves = self.section.arrays(self.layer)
        return next((leaf.sharding for leaf in leaves if getattr(leaf, "sharding", None) is not None), None)


def jobs(
    plan: Plan,
    sections: Iterable[Section],
    bucket_bytes: int | None,
    only: Container[str] | None = None,
    *,
    by_stack: bool = False,
) -> Iterator[Job]:
    """The work of a plan, in order: a layer at a time, or parts of one where it is larger than a bucket.

    Args:
        plan: The plan.
        sections: What it is of.
        bucket_bytes: Most bytes that a job makes, unless it makes one tensor; None for no limit.
        only: Names of the tensors that are wanted; None for all.
        by_stack: Whether a stack on disk is done with, in all its layers, before the next one is begun.
    """
    entries = iter(plan.entries)
    for section, count in zip(sections, plan.tensors_per_layer, strict=True):
        of_layer = [(layer, tuple(itertools.islice(entries, count))) for layer in section.layers]
        if not (by_stack and section.kind.scan and _on_disk(section)):
            yield from _jobs(section, of_layer, slice(0, count), bucket_bytes, only)
            continue
        for stack in _by_container(of_layer):
            for tensors in _by_source(stack[0][1]):
                work = [*_jobs(section, stack, tensors, bucket_bytes, only)]
                yield from work[:-1]
                for last in work[-1:]:
                    yield dataclasses.replace(last, frees=_read_by(work))


def _jobs(
    section: Section, of_layer: Iterable[_OfLayer], tensors: slice, most: int | None, only: Container[str] | None
) -> Iterator[Job]:
    for layer, entries in of_layer:
        cuts = [*_cuts(entries, tensors, most, only)]
        for cut in cuts:
            yield Job(section, layer, cut, entries[cut], last=cut is cuts[-1])


def _on_disk(section: Section) -> bool:
    return any(isinstance(leaf, LazyArray) for leaf in section.layers[0].leaves.values())


def _by_container(of_layer: Iterable[_OfLayer]) -> Iterable[list[_OfLayer]]:
    """The layers of each stack."""
    stacks: dict[str, list[_OfLayer]] = {}
    for layer, entries in of_layer:
        stacks.setdefault(layer.container, []).append((layer, entries))
    return stacks.values()


def _by_source(entries: tuple[Entry, ...]) -> Iterator[slice]:
    """The shortest runs of tensors such that no leaf is in two of them."""
    last = {source: i for i, entry in enumerate(entries) for source in entry.sources}
    start = end = 0
    for i, entry in enumerate(entries):
        end = max([end, *(last[source] for source in entry.sources)])
        if i == end:
            yield slice(start, i + 1)
            start = end = i + 1


def _read_by(work: Iterable[Job]) -> tuple[LazyArray, ...]:
    """What jobs read from disk."""
    found = {id(leaf): leaf for job in work for path, leaf in job.layer.leaves.items() if job.needs(path)}
    return tuple(leaf for leaf in found.values() if isinstance(leaf, LazyArray))


def _cuts(entries: tuple[Entry, ...], of: slice, most: int | None, only: Container[str] | None) -> Iterator[slice]:
    """Runs of wanted tensors."""
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
