"""The one place where values change: a trainer may keep a weight scaled or shifted against the hub."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from portax.weights import bits


@dataclasses.dataclass(frozen=True)
class ScaleShift:
    """The hub's value is `(trainer's value - minus) * times / over`.

    In float32, and rounded once to the trainer's dtype, as MaxText's own exporter does it. That runs under XLA, which
    multiplies with the reciprocal of a divisor; here it is spelled out, so that no backend decides.

    Attributes:
        minus: What is subtracted.
        times: What the rest is multiplied with.
        over: What that is divided by.
    """

    minus: float = 0.0
    times: float = 1.0
    over: float = 1.0

    def __call__(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """The hub's values; raw bfloat16 comes and goes raw."""
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
        """Trainer's values whose hub values are these.

        What rounding lost stays lost: of several values that round to the same one, any may be the answer.
        """
        wide = y.astype(np.float32) * np.float32(self.over) / np.float32(self.times) + np.float32(self.minus)
        found = guess = wide.astype(y.dtype)
        for towards in (-np.inf, np.inf):
            neighbour = np.nextafter(guess, guess.dtype.type(towards))
            found = np.where((self._hub(guess) != y) & (self._hub(neighbour) == y), neighbour, found)
        return found

    def _hub(self, x: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        return np.asarray(bits.from_bits(self(bits.to_bits(jnp.asarray(x)))))
