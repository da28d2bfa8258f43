"""Sizes of a weight's axes as a config names them: `head_dim`, `2*head_dim`, `gdn_key_dim+gdn_value_dim`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class Term:
    """A product of one number and any config fields.

    Attributes:
        number: The product of the numbers in it; 1 without any.
        names: The fields in it.
    """

    number: int
    names: tuple[str, ...]

    def unknown(self, known: Iterable[str]) -> tuple[str, ...]:
        """Returns the fields that are not among the known ones."""
        return tuple(name for name in self.names if name not in known)

    def known_factor(self, known: Mapping[str, int]) -> int:
        """Returns the product of all factors whose value is known."""
        return self.number * math.prod(known.get(name, 1) for name in self.names)


@dataclasses.dataclass(frozen=True)
class Axis:
    """The size of one axis: a sum of products.

    Attributes:
        terms: The products that are added.
    """

    terms: tuple[Term, ...]

    def size(self, of: Callable[[str], int]) -> int:
        """Returns the size.

        Args:
            of: Gives the value of a field.
        """
        return sum(term.number * math.prod(of(name) for name in term.names) for term in self.terms)

    def has_factor(self, name: str) -> bool:
        """Tells whether the size is a multiple of this field."""
        return all(name in term.names for term in self.terms)


@functools.cache
def parse(text: str) -> Axis:
    """Reads the size of an axis.

    Args:
        text: Fields and whole numbers, multiplied and added.

    Example:
        >>> parse("2*head_dim+8").size({"head_dim": 128}.__getitem__)
        264
    """
    return Axis(tuple(_term(term.split("*")) for term in text.split("+")))


def _term(factors: list[str]) -> Term:
    numbers = [int(factor) for factor in factors if factor.isdecimal()]
    return Term(math.prod(numbers), tuple(factor for factor in factors if not factor.isdecimal()))
