"""Comparisons with goldens, as tables and values for JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from portax._text.names import fold, fold_key
from portax._text.tables import new_table, plural, size
from portax.testing.golden import Comparison


def exact(rows: Sequence[Comparison]) -> bool:
    """Tells whether no leaf differs."""
    return not any(row.difference for row in rows)


def tally(rows: Sequence[Comparison]) -> str:
    """Summarises all leaves in a line: `35 leaves, all exact`, `35 leaves, 1 differs`."""
    wrong = sum(bool(row.difference) for row in rows)
    return f"{plural(len(rows), 'leaf', 'leaves')}, {_differ(wrong) if wrong else 'all exact'}"


def rows_dict(rows: Sequence[Comparison]) -> dict[str, dict[str, Any]]:
    """Returns all of them as values for JSON, by the name of the leaf."""
    return {row.name: {"bytes": row.nbytes, "exact": not row.difference, "difference": row.difference} for row in rows}


def comparison_table(runs: Mapping[str, Sequence[Comparison]], *, title: str) -> Table:
    """Returns a table: a row per folded leaf, a column per run with its bytes and its result.

    Args:
        runs: Comparisons of one model, by the name of the run.
        title: Text above the table.
    """
    table = new_table("leaf family", ("count", "right"), *((run, "right") for run in runs), title=title)
    families: dict[str, dict[str, list[Comparison]]] = {}
    for run, rows in runs.items():
        for row in rows:
            families.setdefault(fold_key(row.name), {}).setdefault(run, []).append(row)
    for of_family in families.values():
        some = next(iter(of_family.values()))
        cells = [_verdict(of_family.get(run, [])) for run in runs]
        table.add_row("\n".join(fold(row.name for row in some)), str(len(some)), *cells)
    return table


def _verdict(rows: Sequence[Comparison]) -> str:
    wrong = [row for row in rows if row.difference]
    if wrong:
        return f"[red]{_differ(len(wrong))}[/]\n{wrong[0].name}: {wrong[0].difference}"
    return f"{size(sum(row.nbytes for row in rows))} [green]exact[/]" if rows else "-"


def _differ(count: int) -> str:
    return f"{count} differs" if count == 1 else f"{count} differ"
