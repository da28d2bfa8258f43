"""Tables for people: how every one looks. rich is imported when the first one is made."""

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text


def size(nbytes: int) -> str:
    """A number of bytes for people: `1.21 GB` (powers of ten)."""
    amount, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.3g} {units[0]}"


def new_table(*columns: str | tuple[str, str], title: str | None = None) -> "Table":
    """An empty table.

    Args:
        *columns: Headers; with `right` beside it, a column of numbers.
        title: What to write above.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for column in columns:
        header, justify = column if isinstance(column, tuple) else (column, "left")
        table.add_column(header, justify="right" if justify == "right" else "left", overflow="fold")
    return table


def text_lines(lines: Iterable[str]) -> "Text":
    """Lines as they are: not wrapped, and with nothing in them read as markup."""
    from rich.text import Text

    return Text("\n".join(lines), no_wrap=True, overflow="ignore")


def plural(count: int, one: str, many: str | None = None) -> str:
    """A number of things: `1 leaf`, `2 leaves`.

    Args:
        count: How many.
        one: What one of them is called.
        many: What several are called; None for `one` with an s.
    """
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def render(renderable: "RenderableType") -> str:
    """What a console would show, without colour, as wide as it needs to be."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=240, no_color=True).print(renderable, crop=False)
    return out.getvalue()
