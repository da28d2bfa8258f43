"""`portax demo`: converts shipped MaxText trees and compares every leaf with the real engine's."""

import argparse
import itertools
import time
from collections.abc import Sequence

from rich.console import Group, RenderableType

from portax._text.tables import plural, text_lines
from portax.cli import arguments, devices, output
from portax.cli.command import Command
from portax.testing import demo
from portax.testing.comparison import comparison_table, rows_dict, tally


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_engine(parser)
    which = parser.add_mutually_exclusive_group()
    text = "only this model; may be repeated"
    which.add_argument("--model", action="append", default=[], metavar="NAME", help=text)
    which.add_argument("--all", action="store_true", help="every shipped tree; takes minutes")


def run(args: argparse.Namespace) -> int:
    """Carries out the command."""
    devices.simulate(demo.DEVICES)
    start = time.perf_counter()
    runs: list[demo.Run] = []
    with output.status("planning, compiling and converting the first model ...") as status:
        for run in demo.runs(demo.all_models(args.engine) if args.all else args.model, args.engine):
            runs.append(run)
            status.update(f"{run.model}, tp={run.tp}: {tally(run.rows)}")
    seconds = time.perf_counter() - start
    exact = all(run.exact for run in runs)
    found = {"exact": exact, "seconds": round(seconds, 3), "runs": [_as_dict(run) for run in runs]}
    output.either(args, found, Group(*_tables(runs), text_lines([_verdict(runs, seconds)])))
    return 0 if exact else 1


def _tables(runs: Sequence[demo.Run]) -> list[RenderableType]:
    tables: list[RenderableType] = []
    for model, of_model in itertools.groupby(runs, key=lambda run: run.model):
        same = list(of_model)
        rows = {f"tp={run.tp}": run.rows for run in same}
        tables.append(comparison_table(rows, title=f"{model}, {same[0].engine}"))
    return tables


def _verdict(runs: Sequence[demo.Run], seconds: float) -> str:
    leaves = sum(len(run.rows) for run in runs)
    verdict = "every one exact" if all(run.exact for run in runs) else "NOT all exact"
    what = f"{plural(len(runs), 'conversion')}, {plural(leaves, 'leaf', 'leaves')} against the real engine's digests"
    return f"{what}: {verdict}. {seconds:.0f} s"


def _as_dict(run: demo.Run) -> dict[str, object]:
    seconds = round(run.seconds, 3)
    return {"model": run.model, "tp": run.tp, "exact": run.exact, "seconds": seconds, "leaves": rows_dict(run.rows)}


COMMAND = Command("demo", "Convert shipped MaxText trees and check every leaf against the real engine's.", add, run)
