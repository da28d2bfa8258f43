"""The errors of portax. Each one that is raised on purpose derives from `PortaxError`."""

import dataclasses
from collections.abc import Iterable
from typing import Any


class PortaxError(Exception):
    """Base of all portax errors: catch this one to catch them all.

    Example:
        >>> try:
        ...     weights = converter.convert({"decoder/decoder_norm/scale": np.ones(64, np.float32)})
        ... except portax.PortaxError as error:
        ...     print(type(error).__name__)
        PlanError
    """


class ConfigError(PortaxError, ValueError):
    """A model configuration that is incomplete, contradictory, or of an unknown family. The message names every field.

    Example:
        >>> portax.read_config({"decoder_block": "qwen3", "vocab_size": 256})
        Traceback (most recent call last):
        portax.errors.ConfigError: not a usable model configuration:
          num_decoder_layers: missing (MaxText's key is base_num_decoder_layers)
          ...
    """


class LayoutError(PortaxError, ValueError):
    """A layout that cannot exist, or cannot hold a weight: an unknown version, a size that does not divide.

    Attributes:
        expected: A description of what could be held; None stands for sizes that the layout can cut.
        cause: The usual cause, as a hint; None stands for the tensor-parallel size.

    Example:
        >>> portax.layouts.TpuInference(version="0.19", tp=4)
        Traceback (most recent call last):
        portax.errors.LayoutError: ...
    """

    def __init__(self, message: str, *, expected: str | None = None, cause: str | None = None):
        super().__init__(message)
        self.expected = expected
        self.cause = cause


class QuantizationError(LayoutError):
    """An engine quantises in an unknown, untested or broken way, or values cannot be quantised."""

    def __init__(self, message: str):
        super().__init__(
            message,
            expected="a way of quantising that an engine was run with",
            cause="the engine's settings or its checkpoint ask for what it cannot do, or for what was not run",
        )

    @classmethod
    def of_values(cls, channels: str) -> "QuantizationError":
        """Returns the error for weights that cannot be quantised.

        Args:
            channels: The channels by leaf, each with the reason.
        """
        error = cls(channels)
        error.expected = "finite values, each channel all zeros or large enough for a normal scale"
        error.cause = "the trainer has diverged, or its weights were never initialised"
        error.args = (f"{channels}. Expected {error.expected}. Likely cause: {error.cause}",)
        return error


class SyncError(PortaxError, RuntimeError):
    """A sync cannot start, or its result is not what the trainer holds. `WeightSync.torn` tells what it left behind.

    Example:
        >>> sync = portax.WeightSync(converter, converter.convert(params))
        >>> try:
        ...     report = sync(params)
        ... except portax.SyncError:
        ...     print(sync.torn)
    """


class ValidationError(PortaxError, ValueError):
    """A validation cannot be run as asked, or the engine did not take the weights."""


class MissingPackageError(PortaxError, ImportError):
    """The packages of an integration are not installed. The message names the extra that installs them.

    Example:
        >>> try:
        ...     from portax.integrations import tunix
        ... except portax.MissingPackageError:
        ...     tunix = None
    """


class CheckpointError(PortaxError, ValueError):
    """A checkpoint cannot be read, is not of the expected kind, or cannot be written.

    Example:
        >>> portax.open_checkpoint("nowhere")
        Traceback (most recent call last):
        portax.errors.CheckpointError: nowhere: there is no such checkpoint
    """


class GoldenError(PortaxError, ValueError):
    """A golden, a dumped tree or a weights file cannot be read, or is not of the expected kind."""


class ReportError(PortaxError, ValueError):
    """A page cannot be written: another file has its name, or the disk is full."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One reason why a plan cannot be carried out.

    Attributes:
        leaf: The trainer or engine leaf concerned, by its full name.
        found: The actual state of the leaf.
        expected: The required state, and its source.
        cause: The usual cause, as a hint.

    Example:
        >>> print(portax.Problem("decoder_norm/scale", "shape [3]", "[64]", "the config is of another size"))
        decoder_norm/scale: found shape [3]; expected [64]. Likely cause: the config is of another size
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
        plan: The `Plan` that was made all the same, to show and not to run; None if there is none.

    Example:
        >>> try:
        ...     converter.plan({**params, "decoder/lora_a": np.ones(3, np.float32)})
        ... except portax.PlanError as error:
        ...     print(error.problems[0].leaf)
        decoder/lora_a
    """

    def __init__(self, problems: Iterable[Problem], plan: Any = None):
        self.problems = tuple(problems)
        self.plan = plan
        noun = "problem" if len(self.problems) == 1 else "problems"
        lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(self.problems, 1))
        super().__init__(f"{len(self.problems)} {noun}, nothing was changed:\n{lines}")
