"""The leaves of a trainer's tree and of an engine that a plan covers, and those that it leaves alone."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from portax._text.names import fold
from portax._text.tables import new_table, size
from portax.planning.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Coverage:
    """A group of leaves with one status.

    Attributes:
        what: The status, in words.
        names: Their full names.
        nbytes: Total size in bytes; None if unknown.
    """

    what: str
    names: tuple[str, ...]
    nbytes: int | None


def coverage(plan: Plan, *, ties: Mapping[str, str], others: Iterable[str] = ()) -> tuple[Coverage, ...]:
    """Returns every leaf on both sides, grouped by status.

    Args:
        plan: The plan of the conversion.
        ties: Leaves of the engine that repeat others, by the conversion or the engine.
        others: Values of a checkpoint that are not parameters.
    """
    nbytes = {entry.name: entry.nbytes for entry in plan.entries}
    sources = dict.fromkeys(source for entry in plan.entries for source in entry.sources)
    rows = [
        Coverage("trainer leaves read", tuple(sources), plan.bytes_in),
        Coverage("no parameters, not read", (*others, *plan.ignored), None),
        Coverage("engine leaves written", tuple(nbytes), plan.bytes_out),
        *(
            Coverage(f"cast {cast}", tuple(names), sum(nbytes[name] for name in names))
            for cast, names in plan.casts.items()
        ),
        Coverage("tied", tuple(f"{name} = {to}" for name, to in ties.items()), None),
        Coverage("the engine's own, not written", plan.engine_owned, None),
    ]
    return tuple(row for row in rows if row.names)


def coverage_table(rows: Sequence[Coverage]) -> "Table":
    """Returns the groups as a table."""
    table = new_table("coverage", ("count", "right"), ("bytes", "right"), "leaves")
    for row in rows:
        nbytes = "" if row.nbytes is None else size(row.nbytes)
        table.add_row(row.what, str(len(row.names)), nbytes, "\n".join(fold(row.names)))
    return table
