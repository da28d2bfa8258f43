"""`Command`: what each module of this folder defines."""

import argparse
import dataclasses
from collections.abc import Callable


def nothing_kept(args: argparse.Namespace) -> str:
    """What an interrupted command says if it writes nothing but what it shows."""
    return "nothing was written; run the same command again"


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of `portax`.

    Attributes:
        name: What people type.
        text: What it does, in a sentence.
        add: Adds its arguments to a parser.
        run: Carries it out and returns the exit code.
        interrupted: What an interrupted run left behind, and how to go on.
    """

    name: str
    text: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    interrupted: Callable[[argparse.Namespace], str] = nothing_kept
