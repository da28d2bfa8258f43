"""What the command line shows: comparisons with goldens, and the model families that there are."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from portax._text.names import fold, fold_key
from portax._text.tables import new_table, size
from portax.config.model_config import ModelConfig
from portax.converters.base import BaseConverter
from portax.testing.golden import Comparison


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
            families.setdefault(fold_key(row.name), {}).setdefault(run, []).append(row)
    for of_family in families.values():
        some = next(iter(of_family.values()))
        cells = [_verdict(of_family.get(run, [])) for run in runs]
        table.add_row("\n".join(fold(row.name for row in some)), str(len(some)), *cells)
    return table


def _verdict(rows: Sequence[Comparison]) -> str:
    wrong = [row for row in rows if row.difference]
    if wrong:
        return f"[red]{len(wrong)} differ[/]\n{wrong[0].name}: {wrong[0].difference}"
    return f"{size(sum(row.nbytes for row in rows))} [green]exact[/]" if rows else "-"
