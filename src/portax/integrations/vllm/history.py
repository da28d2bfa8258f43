"""The update that wrote each tensor of an engine, so that the engine itself can tell whether it is torn."""

from collections.abc import Collection, Iterable
from typing import Any


class History:
    """The number of the update that each tensor is of: 0 is what the engine was started with."""

    def __init__(self):
        self._number = 0
        self._of: dict[str, int] = {}
        self._cause = "an update that goes on"

    def start(self, names: Iterable[str]) -> None:
        """Starts an update of these tensors."""
        self._number += 1
        self._of = {name: self._of.get(name, 0) for name in names}
        self._cause = "an update that goes on"

    def end(self, old: Collection[str], cause: str = "") -> None:
        """Ends it.

        Args:
            old: Tensors that were not written.
            cause: The reason, if it did not write all.
        """
        old = {*old}
        self._of |= {name: self._number for name in self._of if name not in old}
        self._cause = cause

    def torn(self, old: Collection[str] = ()) -> dict[str, Any] | None:
        """Returns the arguments of a `Torn`; None if all tensors are of one update.

        Args:
            old: While an update goes on, the tensors that it has not written.
        """
        now = {name: number if name in {*old} or not old else self._number for name, number in self._of.items()}
        if len(set(now.values())) <= 1:
            return None
        latest = max(now.values())
        return {
            "new": tuple(name for name, number in now.items() if number == latest),
            "old": tuple(name for name, number in now.items() if number != latest),
            "lost": (),
            "cause": self._cause,
        }
