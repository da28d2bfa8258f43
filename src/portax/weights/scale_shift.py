"""`ScaleShift`: the one place where values change. A trainer may keep a weight scaled or shifted against the hub."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from portax.weights import bits


@dataclasses.dataclass(frozen=True)
class ScaleShift:
    """Makes the hub's value of the trainer's: `(trainer's value - minus) * times / over`.

    It computes in float32 and rounds once to the trainer's dtype, as MaxText's own exporter does. A division is a
    multiplication by the reciprocal, as XLA compiles the exporter's; it is spelled out, so that no backend decides.

    Attributes:
        minus: Number to subtract.
        times: Number to multiply by.
        over: Number to divide by.

    Example:
        >>> print(ScaleShift(minus=1.0)(jnp.array([1.0, 1.5])))  # a norm that the trainer keeps as 1 + weight
        [0.  0.5]
    """

    minus: float = 0.0
    times: float = 1.0
    over: float = 1.0

    def __call__(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Returns the hub's values; raw bfloat16 stays raw."""
        trainer = bits.from_bits(x)
        values = trainer.astype(jnp.float32)
        if self.minus != 0.0:
            values = values - np.float32(self.minus)
        if self.times != 1.0:
            values = values * np.float32(self.times)
        if self.over != 1.0:
            values = values * (np.float32(1) / np.float32(self.over))
        return bits.to_bits(values.astype(trainer.dtype))

    def inverse(self, y: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Returns trainer's values that have these hub values.

        Rounding cannot be undone: of several values that round to the same one, any may be returned.
        """
        wide = y.astype(np.float32) * np.float32(self.over) / np.float32(self.times) + np.float32(self.minus)
        found = guess = wide.astype(y.dtype)
        for towards in (-np.inf, np.inf):
            neighbour = np.nextafter(guess, guess.dtype.type(towards))
            found = np.where((self._hub(guess) != y) & (self._hub(neighbour) == y), neighbour, found)
        return found

    def _hub(self, x: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        return np.asarray(bits.from_bits(self(bits.to_bits(jnp.asarray(x)))))
