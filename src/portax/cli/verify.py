"""`portax verify`: converts trees and compares every leaf with golden files."""

import argparse
import math
import pathlib

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Group

from portax._text.tables import text_lines
from portax.cli import arguments, devices, inputs, output
from portax.cli.command import Command
from portax.converters import converter_for
from portax.errors import ConfigError
from portax.testing import demo, golden_folder
from portax.testing.comparison import comparison_table, exact, rows_dict, tally
from portax.testing.golden import SOURCE_DTYPES, Golden, compare


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_weights(parser, filled=True)
    arguments.add_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--golden", metavar="FILE", help="digests of an engine's state, or hf.json")
    text = (
        "every golden below a folder, each for the source.json beside it; exit code 2 if one of them is not supported"
    )
    what.add_argument("--goldens", metavar="FOLDER", help=text)
    text = "dtype of the parameters, for --goldens; may be repeated (default: as dumped)"
    parser.add_argument("--source-dtype", action="append", default=[], choices=SOURCE_DTYPES, help=text)


def run(args: argparse.Namespace) -> int:
    """Carries out the command."""
    if args.goldens is not None:
        return _folder(args)
    if args.source_dtype:
        raise ConfigError("--source-dtype goes with --goldens")
    golden = Golden.load(args.golden)
    axes = golden.layout.mesh_axes
    count = math.prod(axes.values())
    devices.simulate(max(demo.DEVICES, count))
    params, config = arguments.weights_and_config(args, inputs.open_filled)
    mesh = Mesh(np.array(jax.devices()[:count]).reshape([*axes.values()]), tuple(axes)) if axes else None
    rows = compare(converter_for(config, layout=golden.layout, mesh=mesh).convert(params), golden)
    found = {"layout": repr(golden.layout), "exact": exact(rows), "leaves": rows_dict(rows)}
    table = comparison_table({"leaves": rows}, title=str(golden.layout))
    output.either(args, found, Group(table, text_lines([tally(rows)])))
    return 0 if exact(rows) else 1


def _folder(args: argparse.Namespace) -> int:
    if any((args.checkpoint, args.tree, args.model, args.config)):
        raise ConfigError("--goldens goes by the source.json beside each golden: name no weights and no configuration")
    folder = pathlib.Path(args.goldens)
    cases = golden_folder.cases(folder, args.source_dtype)
    devices.simulate(max(demo.DEVICES, *(case.devices for case in cases)))
    results = []
    with output.status(f"{len(cases)} goldens") as status:
        for result in golden_folder.verify(cases):
            results.append(result)
            status.update(f"{len(results)} of {len(cases)} goldens; {result.case.path}: {result.verdict}")
    report = golden_folder.FolderReport(folder, tuple(results))
    output.report(args, report)
    return report.exit_code


COMMAND = Command("verify", "Convert trees and hold every leaf against golden files, both ways.", add, run)
