"""Every error portax raises on purpose derives from `PortaxError`."""

import dataclasses
from collections.abc import Iterable
from typing import Any


class PortaxError(Exception):
    """Base of all portax errors: catch this one to catch them all."""


class ConfigError(PortaxError, ValueError):
    """A model configuration that is incomplete, contradictory, or of an unknown family."""


class LayoutError(PortaxError, ValueError):
    """A layout that cannot exist, or cannot hold a weight: an unknown version, a size that does not divide.

    Attributes:
        expected: What could be held instead; None: sizes that the layout can cut.
        cause: The usual cause, as a hint; None: the tensor-parallel size.
    """

    def __init__(self, message: str, *, expected: str | None = None, cause: str | None = None):
        super().__init__(message)
        self.expected = expected
        self.cause = cause


class QuantizationError(LayoutError):
    """An engine that quantises in a way that does not exist, was not run, or computes wrong."""

    def __init__(self, message: str):
        super().__init__(
            message,
            expected="a way of quantising that an engine was run with",
            cause="the engine's settings or its checkpoint ask for what it cannot do, or for what was not run",
        )


class SyncError(PortaxError, RuntimeError):
    """A sync that cannot start, or whose result is not what the trainer holds."""


class ValidationError(PortaxError, ValueError):
    """A validation that cannot be run as it was asked for, or an engine that did not take the weights."""


class MissingPackageError(PortaxError, ImportError):
    """An integration whose packages are not installed."""


class CheckpointError(PortaxError, ValueError):
    """A checkpoint that cannot be read as what it should be, or cannot be written."""


class GoldenError(PortaxError, ValueError):
    """A golden, tree or weights file that cannot be read as what it should be."""


class ReportError(PortaxError, ValueError):
    """A page that cannot be written: another file has its name, or the disk is full."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One reason why a plan cannot be carried out.

    Attributes:
        leaf: The trainer or engine leaf concerned, by its full name.
        found: What is there.
        expected: What should be there, and who says so.
        cause: The usual cause, as a hint.
    """

    leaf: str
    found: str
    expected: str
    cause: str

    def __str__(self) -> str:
        return f"{self.leaf}: found {self.found}; expected {self.expected}. Likely cause: {self.cause}"


class PlanError(PortaxError, ValueError):
    """Everything that keeps a conversion from being exact, in one error, raised before any weight is touched.

    Attributes:
        problems: Each problem found, in the order of the tree.
        plan: The `Plan` that was made all the same, to be shown and not to be carried out; None if there is none.
    """

    def __init__(self, problems: Iterable[Problem], plan: Any = None):
        self.problems = tuple(problems)
        self.plan = plan
        noun = "problem" if len(self.problems) == 1 else "problems"
        lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(self.problems, 1))
        super().__init__(f"{len(self.problems)} {noun}, nothing was changed:\n{lines}")
