"""Output of commands: reports and tables on standard output, everything else on standard error."""

import argparse
import json
import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.status import Status

from portax._text.report import Report
from portax._text.tables import text_lines

_WIDTH = 240  # of what is no terminal


def report(args: argparse.Namespace, found: Report) -> None:
    """Prints a report: as JSON with `--json`, else for people."""
    either(args, found.to_dict(), found)


def either(args: argparse.Namespace, for_machines: Any, for_people: RenderableType) -> None:
    """Prints one of two forms of the same thing, as `--json` says."""
    if args.json:
        print_json(for_machines)
    else:
        show(for_people)


def show(what: RenderableType) -> None:
    """Prints something for people, as wide as their terminal."""
    console = Console()
    width = console.width if console.is_terminal else _WIDTH
    Console(width=width, highlight=False).print(text_lines([what]) if isinstance(what, str) else what, crop=False)


def print_json(value: Any) -> None:
    """Prints a value as JSON."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def complain(text: str) -> None:
    """Prints an error."""
    sys.stderr.write(f"portax: {text}\n")


def status(text: str) -> Status:
    """Shows a message on standard error while the block runs, if that is a terminal."""
    return Console(stderr=True).status(text)
