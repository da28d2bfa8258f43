"""`Pending`: a version of an engine's leaves that is being made beside those that the engine serves."""

import collections

import jax

from portax.execution.executor import Conversion
from portax.execution.scale_check import ScaleCheck
from portax.sync.report import Verification


class Pending:
    """All leaves of one version, in buffers of their own, finished or not.

    Attributes:
        conversion: The conversion that makes them; its sources may be gone by now.
        leaves: The leaves by name, on the engine's devices.
        moved: Bytes that moved between devices for it.
        seconds: Seconds of each phase so far.
        verification: The comparison with the trainer's weights; None if there was none.
    """

    def __init__(self, conversion: Conversion, seconds: dict[str, float]):
        """Starts with no leaf."""
        self.conversion = conversion
        self.seconds = seconds
        self.leaves: dict[str, jax.Array] = {}
        self.moved = 0
        self.verification: Verification | None = None
        self._checks: list[ScaleCheck] = []
        self._started = collections.deque[dict[str, jax.Array]]()

    def add(self, leaves: dict[str, jax.Array], check: ScaleCheck | None = None) -> None:
        """Adds leaves, and a check that has to pass before anybody uses them."""
        self.leaves |= leaves
        self._started.append(leaves)
        self._checks += [] if check is None else [check]

    def bound(self, in_flight: int | None) -> None:
        """Waits until at most so many additions are unfinished; None: for none."""
        while in_flight is not None and len(self._started) > in_flight:
            jax.block_until_ready(self._started.popleft())

    def ready(self) -> bool:
        """Tells whether all leaves are finished, without waiting."""
        return all(leaf.is_ready() for leaf in self.leaves.values())  # type: ignore[attr-defined]  # ArrayImpl has it

    def settle(self) -> None:
        """Waits for all leaves.

        Raises:
            QuantizationError: Values cannot be quantised.
        """
        for check in self._checks:
            check.settle()
        jax.block_until_ready(self.leaves)
