"""What of a trainer's tree and of an engine a plan covers, and what it leaves alone."""

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
    """Leaves of which the same is to be said.

    Attributes:
        what: What is to be said of them.
        names: Their full names.
        nbytes: Bytes of all of them; None where nobody knows.
    """

    what: str
    names: tuple[str, ...]
    nbytes: int | None


def coverage(plan: Plan, *, ties: Mapping[str, str], others: Iterable[str] = ()) -> tuple[Coverage, ...]:
    """Every leaf on both sides.

    Args:
        plan: What is written from what.
        ties: LayerParams of the engine that repeat others, whoever does that.
        others: What stands beside the parameters in a checkpoint.
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
    """The same for people."""
    table = new_table("coverage", ("count", "right"), ("bytes", "right"), "leaves")
    for row in rows:
        nbytes = "" if row.nbytes is None else size(row.nbytes)
        table.add_row(row.what, str(len(row.names)), nbytes, "\n".join(fold(row.names)))
    return table
