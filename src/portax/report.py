"""Tables for people: plans and comparisons with goldens, with layer numbers folded."""

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from portax.golden import Comparison
from portax.names import family, fold
from portax.plan import Entry, Plan


def size(nbytes: int) -> str:
    """A number of bytes for people: `1.21 GB` (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def plan_table(plan: Plan) -> str:
    """A plan as text: one row per family of engine leaves, then the totals."""
    table = _table("engine leaf", ("count", "right"), "shape", "dtype", "spec", "from", ("bytes", "right"))
    for entries in _families(plan.entries).values():
        first = entries[0]
        table.add_row(
            _one(fold(entry.name for entry in entries)),
            str(len(entries)),
            str(list(first.shape)),
            first.dtype.name,
            _spec(first),
            "\n".join(fold(source for entry in entries for source in entry.sources)),
            size(sum(entry.nbytes for entry in entries)),
        )
    lines = [
        f"layout        {plan.layout}",
        f"bytes         {size(plan.bytes_in)} in, {size(plan.bytes_out)} out",
        f"planned peak  {size(plan.peak_bytes)} over all devices: source, results, "
        f"{size(plan.working_bytes)} for the layers in work",
    ]
    lines += [f"cast          {cast}: {len(names)} leaves" for cast, names in plan.casts.items()]
    lines += [f"tied          {name} repeats {to}" for name, to in plan.ties.items()]
    if plan.ignored:
        lines.append(f"ignored       {len(plan.ignored)} variables of the trainer that are no parameters")
    if plan.engine_owned:
        lines.append("engine-owned  " + ", ".join(fold(plan.engine_owned)))
    return render(table) + "\n".join(lines)


def comparison_table(rows: Sequence[Comparison]) -> Table:
    """Comparisons by family of leaves: count, bytes, exact or not."""
    table = _table("leaf family", ("count", "right"), ("bytes", "right"), "exact")
    groups: dict[str, list[Comparison]] = {}
    for row in rows:
        groups.setdefault(family(row.name), []).append(row)
    for group in groups.values():
        wrong = [row for row in group if row.difference]
        verdict = "[green]exact[/]" if not wrong else f"[red]{len(wrong)} differ[/]: {wrong[0].name}: {wrong[0].difference}"
        table.add_row(
            _one(fold(row.name for row in group)), str(len(group)), size(sum(row.nbytes for row in group)), verdict
        )
    return table


def render(renderable: RenderableType) -> str:
    """What a console would show, without colour, as wide as it needs to be."""
    out = io.StringIO()
    Console(file=out, width=240, no_color=True).print(renderable)
    return out.getvalue()


def _table(*columns: str | tuple[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        header, justify = column if isinstance(column, tuple) else (column, "left")
        table.add_column(header, justify="right" if justify == "right" else "left", overflow="fold")
    return table


def _families(entries: Iterable[Entry]) -> dict[tuple, list[Entry]]:
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        groups.setdefault((family(entry.name), entry.shape, entry.dtype, str(entry.spec)), []).append(entry)
    return groups


def _spec(entry: Entry) -> str:
    return f"P({', '.join(repr(axis) for axis in entry.spec)})"


def _one(folded: list[str]) -> str:
    return "\n".join(folded)
