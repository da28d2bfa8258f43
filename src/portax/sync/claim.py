"""`Claim`: keeps two syncs from working on the same engine at the same time, whichever objects and threads they are.

What it claims are the arrays of an engine and what holds them. The mapping alone would not do: an engine may make it
anew each time it is asked for, and two mappings may hold the same arrays.
"""

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from portax.errors import SyncError

_admission = threading.RLock()
_claims: "weakref.WeakSet[Claim]" = weakref.WeakSet()


class Claim:
    """The leaves that one sync or comparison works on, while its lock is held.

    Attributes:
        lock: Hold it around everything else. An interrupt cannot come between taking a lock by `with` and releasing
            it, so no engine stays claimed after an interrupt.

    Example:
        >>> engine, claim = {"weight": jnp.ones(2)}, Claim()
        >>> with claim.lock:
        ...     claim.take(lambda: engine.values())
    """

    def __init__(self):
        self.lock = threading.Lock()
        self._things: dict[int, Any] = {}  # kept alive, so that nothing else gets their identities

    def take(self, find: Callable[[], Iterable[Any]]) -> None:
        """Claims things by their identity.

        Args:
            find: Returns them; nothing else is claimed meanwhile.

        Raises:
            SyncError: Another claim, whose lock is held, has one of them.
        """
        with _admission:
            found = {id(thing): thing for thing in find()}
            running = [claim for claim in _claims if claim is not self and claim.lock.locked()]
            if not all(found.keys().isdisjoint(claim._things) for claim in running):
                raise SyncError(
                    "a sync or a comparison is running on this engine; wait for it: two at once would write the same "
                    "buffers, or compare what is half written"
                )
            self._things = found
            _claims.add(self)
