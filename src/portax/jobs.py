"""What a conversion consists of: which tensors one call of a program makes, and in which order."""

import dataclasses
import itertools
from collections.abc import Container, Iterable, Iterator

from jax.sharding import Sharding

from portax.layers import Layer, Section
from portax.plan import Entry, Plan


@dataclasses.dataclass(frozen=True)
class Job:
    """Some of the tensors of one layer, made by one call of a program.

    Attributes:
        section: The section that the layer belongs to.
        layer: The layer.
        tensors: Which of the layer's tensors.
        entries: Those tensors, as planned.
        last: Whether no other job of this layer comes after this one.
    """

    section: Section
    layer: Layer
    tensors: slice
    entries: tuple[Entry, ...]
    last: bool

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
    plan: Plan, sections: Iterable[Section], bucket_bytes: int | None, only: Container[str] | None = None
) -> Iterator[Job]:
    """The work of a plan, in order: a layer at a time, or parts of one where it is larger than a bucket.

    Args:
        plan: The plan.
        sections: What it is of.
        bucket_bytes: Most bytes that a job makes, unless it makes one tensor; None for no limit.
        only: Names of the tensors that are wanted; None for all.
    """
    entries = iter(plan.entries)
    for section, count in zip(sections, plan.tensors_per_layer, strict=True):
        for layer in section.layers:
            mine = tuple(itertools.islice(entries, count))
            cuts = [*_cuts(mine, bucket_bytes, only)]
            for chosen in cuts:
                yield Job(section, layer, chosen, mine[chosen], last=chosen is cuts[-1])


def _cuts(entries: tuple[Entry, ...], most: int | None, only: Container[str] | None) -> Iterator[slice]:
    """Runs of wanted tensors."""
    start = size = 0
    for i, entry in enumerate(entries):
        wanted = only is None or entry.name in only
        if i > start and (not wanted or (most is not None and size + entry.nbytes > most)):
            yield slice(start, i)
            start, size = i, 0
        if wanted:
            size += entry.nbytes
        else:
            start = i + 1
    if start < len(entries):
        yield slice(start, len(entries))
