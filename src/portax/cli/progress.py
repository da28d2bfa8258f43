"""A progress bar with the rate and the remaining time; on a terminal only."""

import contextlib
from collections.abc import Iterator

from rich import progress as bars
from rich.console import Console

from portax._text.report import Progress


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """Shows a bar on standard error while the block runs.

    Args:
        what: The running task, in words.

    Yields:
        A function that takes the number of bytes done since its last call, and the total.
    """
    columns = (bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn())
    console = Console(stderr=True)
    with bars.Progress(bars.TextColumn("{task.description}"), *columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, advance=done, total=total)
