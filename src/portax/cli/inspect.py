"""`portax inspect`: lists a checkpoint's leaves and identifies its model."""

import argparse

from portax.analysis.inspect import inspect
from portax.checkpoints.reading import open_checkpoint
from portax.cli import arguments, output
from portax.cli.command import Command
from portax.config.shipped import configs
from portax.converters import read_config


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    text = "an Orbax checkpoint, or safetensors of a trainer's tree"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=text)
    arguments.add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Carries out the command."""
    given = arguments.named_config(args)
    shipped = {path.stem: read_config(path) for path in configs()}
    config = None if given is None else read_config(given)
    output.report(args, inspect(open_checkpoint(args.checkpoint), shipped, config))
    return 0


COMMAND = Command("inspect", "Show what is in a checkpoint, and which model it is of; reads no weight.", add, run)
