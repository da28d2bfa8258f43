"""`portax doctor`: scrambles an engine's state, syncs into it, and checks it leaf by leaf."""

import argparse
import dataclasses

from portax.cli import arguments, devices, output
from portax.cli.command import Command
from portax.testing import demo, doctor


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    text = "a shipped tree (default: %(default)s)"
    parser.add_argument("--model", default="qwen3-30b-a3b", metavar="NAME", help=text)
    arguments.add_engine(parser)
    parser.add_argument("--tp", type=int, default=2, choices=demo.TENSOR_PARALLEL, help="tensor-parallel size")


def run(args: argparse.Namespace) -> int:
    """Carries out the command."""
    devices.simulate(demo.DEVICES)
    with output.status("scrambling, syncing, looking at every leaf ..."):
        checks = list(demo.examination(args.model, args.tp, args.engine))
    passed = all(check.passed for check in checks)
    found = {"passed": passed, "checks": [dataclasses.asdict(check) for check in checks]}
    output.either(args, found, doctor.table(checks, title=f"{args.model}, {args.engine}, tp={args.tp}"))
    return 0 if passed else 1


COMMAND = Command("doctor", "Scramble an engine's state, sync into it, check every leaf; on shipped data.", add, run)
