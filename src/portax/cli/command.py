"""`Command`: the definition of a command, one in each module of this folder."""

import argparse
import dataclasses
from collections.abc import Callable


def nothing_kept(args: argparse.Namespace) -> str:
    """Returns the message of an interrupted command that writes no files."""
    return "nothing was written; run the same command again"


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of `portax`.

    Attributes:
        name: Its name on the command line.
        text: A sentence of help.
        add: Adds its arguments to a parser.
        run: Carries it out and returns the exit code.
        interrupted: Returns a message about the remains of an interrupted run, and how to go on.
    """

    name: str
    text: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    interrupted: Callable[[argparse.Namespace], str] = nothing_kept
