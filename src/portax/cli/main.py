"""The `portax` command: models, inspect, plan, convert, import, diff, validate, verify, demo, doctor.

Exit codes: 0 done, and exact or equal; 1 a leaf differs, or the plan has problems; 2 the command, a file, the
configuration or the layout is not usable, what is to be compared cannot be, or the disk is full; 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from portax._text.version import portax_version
from portax.cli import convert, demo, diff, doctor, import_, inspect, messages, models, output, plan, validate, verify
from portax.errors import PlanError, PortaxError

_COMMANDS = (
    models.COMMAND,
    inspect.COMMAND,
    plan.COMMAND,
    convert.COMMAND,
    import_.COMMAND,
    diff.COMMAND,
    validate.COMMAND,
    verify.COMMAND,
    demo.COMMAND,
    doctor.COMMAND,
)
_INTERRUPTED = 130  # as shells count it
_NOBODY_READS = 141


def run() -> NoReturn:
    """Entry point of the `portax` command."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `portax plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _NOBODY_READS
    sys.exit(code)


def main(arguments: Sequence[str]) -> int:
    """Carries out a command line and returns its exit code.

    Args:
        arguments: The words after `portax`.
    """
    args = _parser().parse_args(arguments)
    try:
        return args.command.run(args)
    except KeyboardInterrupt:
        output.complain(f"interrupted; {args.command.interrupted(args)}")
        return _INTERRUPTED
    except PortaxError as error:
        if args.json:
            output.print_json(messages.as_dict(error))
        output.complain(f"error: {messages.for_shell(str(error))}")
        return 1 if isinstance(error, PlanError) else 2


def _parser() -> argparse.ArgumentParser:
    text, codes = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(prog="portax", description=text, epilog=" ".join(codes.split()))
    parser.add_argument("--version", action="version", version=f"portax {portax_version()}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in _COMMANDS:
        sub = commands.add_parser(command.name, help=command.text, description=command.text)
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
        command.add(sub)
    return parser
