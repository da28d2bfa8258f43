"""Tables and sizes for people. rich is imported when the first table is made."""

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text


def size(nbytes: int) -> str:
    """Writes a number of bytes for people: `1.21 GB` (powers of ten)."""
    amount, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.3g} {units[0]}"


def new_table(*columns: str | tuple[str, str], title: str | None = None) -> "Table":
    """Makes an empty table.

    Args:
        *columns: Headers; a pair of header and `right` for a column of numbers.
        title: Text above the table.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for column in columns:
        header, justify = column if isinstance(column, tuple) else (column, "left")
        table.add_column(header, justify="right" if justify == "right" else "left", overflow="fold")
    return table


def text_lines(lines: Iterable[str]) -> "Text":
    """Returns lines as text that is not wrapped and in which nothing is read as markup."""
    from rich.text import Text

    return Text("\n".join(lines), no_wrap=True, overflow="ignore")


def plural(count: int, one: str, many: str | None = None) -> str:
    """Writes a number of things: `1 leaf`, `2 leaves`.

    Args:
        count: The number.
        one: The singular.
        many: The plural; None for `one` with an s.
    """
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def render(renderable: "RenderableType") -> str:
    """Returns the text that a console would show, without colour, as wide as it needs to be."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=240, no_color=True).print(renderable, crop=False)
    return out.getvalue()
