"""Finds values that cannot be quantised, in the scales that were made of them."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from portax.errors import QuantizationError
from portax.planning.plan import Entry

_MOST_NAMED = 8  # channels of a leaf, and leaves, that an error names


class ScaleCheck:
    """Looks at the scales among some leaves, on the devices that hold them; the weights are not read again.

    Layouts leave NaN in a scale for NaN, infinity for infinity, and minus infinity for a channel whose scale would be
    denormal. Every process that holds a part of a leaf finds the same.

    Example:
        >>> plan = converter.plan(params)  # of an engine that is not quantised: nothing to look at
        >>> ScaleCheck(plan.entries, converter.convert(params).values()).settle()
    """

    def __init__(self, entries: Iterable[Entry], arrays: Iterable[Any]):
        """Starts the check, and waits for nothing.

        Args:
            entries: The leaves that were made.
            arrays: The leaves, in the same order; fewer, where this process made or got none.
        """
        made = zip(entries, arrays, strict=False)
        self._scales = [(entry.name, array) for entry, array in made if entry.refuses_values]
        self._usable = _all_finite([array for _, array in self._scales]) if self._scales else []

    def settle(self) -> None:
        """Waits for the check.

        Raises:
            QuantizationError: Values cannot be quantised; it names leaves and channels.
        """
        if not self._usable:
            return
        with jax.transfer_guard_device_to_host("allow"):  # a byte each, also where a trainer forbids transfers
            usable = jax.device_get(self._usable)
            bad = [scales for scales, good in zip(self._scales, usable, strict=True) if not good]
            if bad:
                raise QuantizationError.of_values("; ".join(_told(bad)))


@jax.jit
def _all_finite(scales: list[Float[Array, "..."]]) -> list[Bool[Array, ""]]:
    return [jnp.isfinite(each).all() for each in scales]


def _told(bad: Sequence[tuple[str, Any]]) -> Iterator[str]:
    for name, scales in bad[:_MOST_NAMED]:
        found = dict(_channels(scales))
        first = ", ".join(f"{list(place)}: {what}" for place, what in itertools.islice(found.items(), _MOST_NAMED))
        more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        yield f"{name}: the values of these channels cannot be quantised: {first}{more}"
    if len(bad) > _MOST_NAMED:
        yield f"and {len(bad) - _MOST_NAMED} leaves more"


def _channels(scales: Any) -> Iterator[tuple[tuple[int, ...], str]]:
    """Places of unusable scales, as far as this process holds them, and why each one is."""
    for shard in scales.addressable_shards:
        data = np.asarray(shard.data)
        first = [index.start or 0 for index in shard.index]
        for place in np.argwhere(~np.isfinite(data)):
            value = data[tuple(place)]
            what = "NaN" if np.isnan(value) else "infinity" if value > 0 else "a scale that would be denormal"
            yield tuple(int(a + b) for a, b in zip(first, place, strict=True)), what
