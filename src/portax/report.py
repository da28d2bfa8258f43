"""Tables for people: plans and comparisons with goldens, with layer numbers folded."""

import io
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from portax.base import BaseConverter
from portax.config import ModelConfig
from portax.golden import Comparison
from portax.names import family, fold
from portax.plan import Entry, Plan, spec_text


def size(nbytes: int) -> str:
    """A number of bytes for people: `1.21 GB` (powers of ten)."""
    amount, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.3g} {units[0]}"


def plan_table(plan: Plan) -> str:
    """A plan as text: one row per family of engine leaves, then the totals."""
    table = new_table("engine leaf", ("count", "right"), "shape", "dtype", "spec", "from", ("bytes", "right"))
    for entries in _families(plan.entries).values():
        first = entries[0]
        table.add_row(
            _one(fold(entry.name for entry in entries)),
            str(len(entries)),
            str(list(first.shape)),
            first.dtype.name,
            spec_text(first.spec),
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


def families(known: Mapping[str, type[BaseConverter]], shipped: Mapping[str, ModelConfig]) -> list[dict[str, str]]:
    """What there is to say of each model family.

    Args:
        known: Converters by `decoder_block`.
        shipped: Configurations by MaxText's name of the model.
    """
    return [
        {
            "decoder_block": block,
            "converter": f"{family.__module__}.{family.__qualname__}",
            "what": (family.__doc__ or "").splitlines()[0],
            "configs": ", ".join(name for name, config in shipped.items() if config.decoder_block == block),
        }
        for block, family in known.items()
    ]


def families_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """The same as a table."""
    table = new_table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    return table


def comparison_table(runs: Mapping[str, Sequence[Comparison]], *, title: str) -> Table:
    """Leaves held against goldens: a row per family, a column per run with its bytes and whether it is exact.

    Args:
        runs: Comparisons of one model, by the name of the run.
        title: What to write above.
    """
    table = new_table("leaf family", ("count", "right"), *((run, "right") for run in runs), title=title)
    families: dict[str, dict[str, list[Comparison]]] = {}
    for run, rows in runs.items():
        for row in rows:
            families.setdefault(family(row.name), {}).setdefault(run, []).append(row)
    for of_family in families.values():
        some = next(iter(of_family.values()))
        cells = [_verdict(of_family.get(run, [])) for run in runs]
        table.add_row(_one(fold(row.name for row in some)), str(len(some)), *cells)
    return table


def _verdict(rows: Sequence[Comparison]) -> str:
    wrong = [row for row in rows if row.difference]
    if wrong:
        return f"[red]{len(wrong)} differ[/]\n{wrong[0].name}: {wrong[0].difference}"
    return f"{size(sum(row.nbytes for row in rows))} [green]exact[/]" if rows else "-"


def render(renderable: RenderableType) -> str:
    """What a console would show, without colour, as wide as it needs to be."""
    out = io.StringIO()
    Console(file=out, width=240, no_color=True).print(renderable)
    return out.getvalue()


def new_table(*columns: str | tuple[str, str], title: str | None = None) -> Table:
    """An empty table.

    Args:
        *columns: Headers; with `right` beside it, a column of numbers.
        title: What to write above.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for column in columns:
        header, justify = column if isinstance(column, tuple) else (column, "left")
        table.add_column(header, justify="right" if justify == "right" else "left", overflow="fold")
    return table


def _families(entries: Iterable[Entry]) -> dict[tuple, list[Entry]]:
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        groups.setdefault((family(entry.name), entry.shape, entry.dtype, str(entry.spec)), []).append(entry)
    return groups


def _one(folded: list[str]) -> str:
    return "\n".join(folded)
