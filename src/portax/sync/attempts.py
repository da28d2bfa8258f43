"""The sync that wrote each live array, recorded with the array itself, whichever mapping holds it.

The leaves themselves show that an engine is torn (leaves of two syncs, or lost ones), whatever one `WeightSync`
remembers. So a table marks every array with the attempt that made it; the table keeps no array alive.
"""

import dataclasses
import itertools
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import jax

from portax.sync.report import Torn

_numbers = itertools.count(1)


class Attempt:
    """One sync that has begun to write, completed or not.

    Attributes:
        number: Its place among all of this process.
        cause: The error that ended it; empty if there was none.
        written: The mark of what it has written.
        lost: The mark of what it has given away, and not yet written.
    """

    def __init__(self):
        self.number = next(_numbers)
        self.cause = ""
        self.written = _Mark(self, lost=False)
        self.lost = _Mark(self, lost=True)


@dataclasses.dataclass(frozen=True)
class _Mark:
    """The attempt that wrote an array, or that has given its buffer away."""

    attempt: Attempt
    lost: bool


class _Marks:
    """Marks by array. Arrays have no hash, so they are known by identity while they live."""

    def __init__(self):
        self._lock = threading.Lock()
        self._held: dict[int, tuple[weakref.ref, _Mark]] = {}
        self._most = 1024

    def __getitem__(self, array: Any) -> _Mark | None:
        alive, mark = self._held.get(id(array), (None, None))
        return mark if alive is not None and alive() is array else None

    def __setitem__(self, array: jax.Array, mark: _Mark) -> None:
        with self._lock:
            if len(self._held) >= self._most:
                self._held = {key: held for key, held in self._held.items() if held[0]() is not None}
                self._most = 1024 + 2 * len(self._held)
            self._held[id(array)] = weakref.ref(array), mark


_marks = _Marks()


def mark_written(array: jax.Array, attempt: Attempt) -> None:
    """Records the attempt that made an array. Call it before the array goes into an engine, in case of an interrupt."""
    _marks[array] = attempt.written


def mark_lost(array: jax.Array, attempt: Attempt) -> None:
    """Records the attempt that gave an array's buffer to a program, or found wrong bits in it."""
    _marks[array] = attempt.lost


def torn(leaves: Mapping[str, Any]) -> Torn | None:
    """Returns the remains of an incomplete sync among an engine's leaves; None if they all belong together.

    Args:
        leaves: The planned leaves by name, as they are now; None for those that are gone.
    """
    marks = {name: _marks[leaf] for name, leaf in leaves.items()}
    lost = tuple(name for name, leaf in leaves.items() if _is_lost(leaf, marks[name]))
    whole = {name: mark and mark.attempt for name, mark in marks.items() if name not in {*lost}}
    if not lost and len({id(attempt) for attempt in whole.values()}) <= 1:
        return None
    attempts = [mark.attempt for mark in marks.values() if mark is not None]
    latest = max(attempts, key=lambda attempt: attempt.number, default=None)
    return Torn(
        new=tuple(name for name, attempt in whole.items() if attempt is latest is not None),
        old=tuple(name for name, attempt in whole.items() if attempt is not latest or latest is None),
        lost=lost,
        cause=(latest and latest.cause) or "something other than a sync, which replaced or freed leaves",
    )


def _is_lost(leaf: Any, mark: _Mark | None) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_deleted() or (mark is not None and mark.lost)
