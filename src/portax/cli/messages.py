"""Errors in the words of the command line."""

import re
from typing import Any

from portax.errors import PlanError, PortaxError, Problem

_OPTIONS = (  # what the library advises those who call it, and what people at a shell can type
    (r"allow_untested=True", "--allow-untested"),
    (r"strict_dtype=True", "--strict-dtype"),
    (r"\bscratch=", "--scratch"),
    (r"\bleave=", "--leave "),
    (r"\(--leave \)", "(--leave)"),
    (r"Use TpuInference\(version=\"[\d.]+\", tp=\d+\)", "Use --layout tpu-inference"),
    (r"\w+\(version=\"([\d.]+)\", tp=\d+\)", r"--engine-version \1"),
    (r", or pass FlaxNnx\(\.\.\., architecture=\.\.\.\)", ""),
)


def for_shell(text: str) -> str:
    """Returns a message of the library with options instead of arguments of functions."""
    for argument, option in _OPTIONS:
        text = re.sub(argument, option, text)
    return text


def as_dict(error: PortaxError) -> dict[str, Any]:
    """Returns an error as values for JSON: its kind, its message and, if a plan failed, each of the problems."""
    found: dict[str, Any] = {"error": type(error).__name__, "message": for_shell(str(error))}
    if isinstance(error, PlanError):
        found["problems"] = [_problem(problem) for problem in error.problems]
    return found


def _problem(problem: Problem) -> dict[str, str]:
    return {name: for_shell(str(value)) for name, value in vars(problem).items()}
