"""`Behind`: work that goes on while its caller prepares the next."""

import concurrent.futures
from collections.abc import Callable


class Behind:
    """Runs calls in a thread, one at a time and in order.

    A context manager: when it ends, all calls have.
    """

    def __init__(self) -> None:
        """Makes the thread; it starts with the first call."""
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._last: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def wait(self) -> None:
        """Waits for the last call; raises what it raised."""
        if self._last is not None:
            self._last.result()

    def run(self, call: Callable[[], None]) -> None:
        """Starts a call as soon as the last one has ended.

        Args:
            call: What to call. If the last call raised an error, this raises it, and calls nothing.
        """
        self.wait()
        self._last = self._thread.submit(call)
