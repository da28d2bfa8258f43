"""`portax diff`: compares two checkpoints, leaf by leaf."""

import argparse

from portax.analysis import cards, html_page
from portax.analysis.diff import diff
from portax.cli import arguments, inputs, output
from portax.cli.command import Command
from portax.cli.progress import progress_bar
from portax.converters import read_config
from portax.converters.base import BaseConverter
from portax.errors import CheckpointError, ConfigError, PlanError


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    text = "an Orbax checkpoint, safetensors (a file or a folder) or, with --dry-run, a dumped tree"
    parser.add_argument("a", metavar="A", help=text)
    parser.add_argument("b", metavar="B", help="the same")
    arguments.add_model(parser)
    arguments.add_layout(parser)
    parser.set_defaults(layout="hf")
    parser.add_argument("--scratch", metavar="DIR", help="folder for a temporary file; default: the system's")
    arguments.add_page(parser)
    parser.add_argument("--dry-run", action="store_true", help="compare names, shapes and dtypes; read no values")


def run(args: argparse.Namespace) -> int:
    """Carries out the command."""
    page = arguments.page(args)
    converter = _converter(args)
    opened = inputs.open_shapes if args.dry_run else inputs.open_values
    a, b = (opened(path, scratch=args.scratch)[0] for path in (args.a, args.b))
    try:
        with progress_bar("comparing") as report:
            found = diff(a, b, converter=converter, values=not args.dry_run, progress=report)
    except PlanError as error:
        raise CheckpointError(f"{args.a} and {args.b} cannot be compared: {error}") from error
    if page:
        html_page.write(page, cards.of_diff(found))
    output.report(args, found)
    return 0 if found.equal else 1


def _converter(args: argparse.Namespace) -> BaseConverter | None:
    if (config := arguments.named_config(args)) is not None:
        return arguments.converter(args, read_config(config), arguments.layout(args))
    if (args.layout, args.dtype) != ("hf", None):
        raise ConfigError("--layout and --dtype are for a trainer's tree that is converted: add --model or --config")
    return None


COMMAND = Command("diff", "Show what differs between two checkpoints, leaf by leaf.", add, run)
