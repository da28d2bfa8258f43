"""`Plan`: every leaf that a conversion writes, and its sources, checked before a byte moves."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import PartitionSpec

from portax._text.names import fold, fold_key
from portax._text.report import Report
from portax._text.tables import new_table, plural, size, text_lines

if TYPE_CHECKING:
    from rich.console import RenderableType

PROGRAMS_IN_FLIGHT = 2  # how many layers a conversion works on at a time, beside what is finished


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf of the engine.

    Attributes:
        name: Its full name.
        shape: Its shape.
        dtype: Its dtype.
        spec: Its partitioning in the engine.
        sources: The trainer leaves that its values come from.
        casts: Casts on the way that lose precision, such as `float32 -> bfloat16`.
        tied_to: The engine leaf whose values it repeats, if the model ties them.
        refuses_values: True for scales that have to be finite.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    spec: PartitionSpec
    sources: tuple[str, ...]
    casts: tuple[str, ...]
    tied_to: str | None
    refuses_values: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the whole, unsharded leaf."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Plan(Report):
    """A checked conversion. `print(plan)` shows a table; `plan.to_json()` is for machines.

    Attributes:
        layout: The layout, in words.
        definition: Words for what an exact result is, if not the trainer's values cast to the engine's dtype.
        entries: Every engine leaf that is written, in the order of writing.
        bytes_in: Bytes of the trainer leaves.
        tensors_per_layer: For each group of layers, the number of entries of each layer.
        working_bytes: Bytes of the layers in work at a time, beside sources and results.
        ignored: Variables of the trainer's state that are not parameters.
        engine_owned: Leaves of the target that the engine fills itself; empty without a target.
        left: Leaves of the trainer that `leave=` leaves out.
        padded: Leaves of the trainer whose padding is cut off, after a check that it is zero.

    Example:
        >>> plan = converter.plan(params)
        >>> len(plan.entries), plan.casts.keys()
        (19, dict_keys(['float32 -> bfloat16']))
    """

    layout: str
    entries: tuple[Entry, ...]
    tensors_per_layer: tuple[int, ...]
    bytes_in: int
    working_bytes: int
    ignored: tuple[str, ...]
    engine_owned: tuple[str, ...]
    left: tuple[str, ...] = ()
    definition: str | None = None
    padded: tuple[str, ...] = ()

    @functools.cached_property
    def bytes_out(self) -> int:
        """Bytes of everything that is written."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def peak_bytes(self) -> int:
        """Planned peak over all devices: sources, results, and the layers in work."""
        return self.bytes_in + self.bytes_out + self.working_bytes

    @property
    def casts(self) -> dict[str, list[str]]:
        """Engine leaves by the precision-losing cast that feeds them, e.g. `float32 -> bfloat16`."""
        found: dict[str, list[str]] = {}
        for entry in self.entries:
            for cast in entry.casts:
                found.setdefault(cast, []).append(entry.name)
        return found

    @property
    def ties(self) -> dict[str, str]:
        """Engine leaves that repeat another leaf's values."""
        return {entry.name: entry.tied_to for entry in self.entries if entry.tied_to is not None}

    def __rich__(self) -> "RenderableType":
        from rich.console import Group

        table = new_table("engine leaf", ("count", "right"), "shape", "dtype", "spec", "from", ("bytes", "right"))
        for entries in _families(self.entries).values():
            first = entries[0]
            table.add_row(
                "\n".join(fold(entry.name for entry in entries)),
                str(len(entries)),
                str(list(first.shape)),
                first.dtype.name,
                spec_text(first.spec),
                "\n".join(fold(source for entry in entries for source in entry.sources)),
                size(sum(entry.nbytes for entry in entries)),
            )
        return Group(table, text_lines(self._totals()))

    def _totals(self) -> list[str]:
        lines = [
            f"layout        {self.layout}",
            *([f"exact         {self.definition}"] if self.definition else []),
            f"bytes         {size(self.bytes_in)} in, {size(self.bytes_out)} out",
            f"planned peak  {size(self.peak_bytes)} over all devices: source, results, "
            f"{size(self.working_bytes)} for the layers in work",
        ]
        lines += [f"cast          {cast}: {plural(len(names), 'leaf', 'leaves')}" for cast, names in self.casts.items()]
        lines += [f"tied          {name} repeats {to}" for name, to in self.ties.items()]
        if self.ignored:
            lines.append(f"ignored       {plural(len(self.ignored), 'variable')} of the trainer, no parameters")
        if self.left:
            lines.append(f"left out      {_counted(self.left)} of the trainer: {', '.join(fold(self.left))}")
        if self.padded:
            zero = "cut off once it is found to be zero"
            lines.append(f"padding       of {_counted(self.padded)}, {zero}: {', '.join(fold(self.padded))}")
        if self.engine_owned:
            lines.append("engine-owned  " + ", ".join(fold(self.engine_owned)))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Returns all of the plan as values for JSON."""
        entries = {
            entry.name: {
                "shape": entry.shape,
                "dtype": entry.dtype.name,
                "spec": list(entry.spec),
                "bytes": entry.nbytes,
                "sources": entry.sources,
                "casts": entry.casts,
                "tied_to": entry.tied_to,
            }
            for entry in self.entries
        }
        totals = {"bytes_in": self.bytes_in, "bytes_out": self.bytes_out, "peak_bytes": self.peak_bytes}
        lists = {"ignored": self.ignored, "engine_owned": self.engine_owned, "left": self.left, "padded": self.padded}
        return {"layout": self.layout, "definition": self.definition, **totals, **lists, "entries": entries}


def _counted(leaves: tuple[str, ...]) -> str:
    return plural(len(leaves), "leaf", "leaves")


def axes_of(cut: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes over which a `PartitionSpec` cuts one dimension."""
    return () if cut is None else (cut,) if isinstance(cut, str) else cut


def spec_text(spec: PartitionSpec) -> str:
    """Writes a partitioning for people: `P(None, 'model')`."""
    return f"P({', '.join(repr(axis) for axis in spec)})"


def _families(entries: Iterable[Entry]) -> dict[tuple, list[Entry]]:
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        groups.setdefault((fold_key(entry.name), entry.shape, entry.dtype, str(entry.spec)), []).append(entry)
    return groups
