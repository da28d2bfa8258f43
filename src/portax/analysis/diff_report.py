"""`Diff`: the differences of two checkpoints or states, leaf by leaf."""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from rich.console import Group, RenderableType

from portax._text.names import fold, fold_key
from portax._text.report import Report
from portax._text.tables import new_table, plural, size, text_lines
from portax.analysis.compare import Found


@dataclasses.dataclass(frozen=True)
class LeafDiff:
    """One leaf on both sides.

    Attributes:
        name: Its full name in A, or in B if A lacks it.
        a: Its shape and dtype in A; None if A lacks it.
        b: The same in B.
        found: The comparison of the values; None if they were not compared.
    """

    name: str
    a: jax.ShapeDtypeStruct | None
    b: jax.ShapeDtypeStruct | None
    found: Found | None = None

    @functools.cached_property
    def differences(self) -> tuple[str, ...]:
        """Differences, in words: `only in A`, `only in B`, or any of `shape`, `dtype`, `values`."""
        if self.a is None or self.b is None:
            return ("only in B" if self.a is None else "only in A",)
        pairs = {
            "shape": self.a.shape != self.b.shape,
            "dtype": self.a.dtype != self.b.dtype,
            "values": self.found is not None and self.found.different > 0,
        }
        return tuple(what for what, differs in pairs.items() if differs)

    @property
    def elements(self) -> int:
        """Number of elements, in A if A has the leaf."""
        return math.prod((self.a or self.b).shape)  # type: ignore[union-attr]  # one of the two has it

    @property
    def nbytes(self) -> int:
        """Bytes of those elements."""
        return self.elements * (self.a or self.b).dtype.itemsize  # type: ignore[union-attr]


@dataclasses.dataclass(frozen=True)
class Diff(Report):
    """The differences of two checkpoints or states. `print(diff)` shows a table; `diff.to_json()` is for machines.

    Attributes:
        a: Words for A.
        b: Words for B.
        leaves: Every leaf of either, in A's order; then those that only B has.
        values: True if values were compared; else only names, shapes and dtypes.
        beside: Leaves of one side that are no difference, by name, with the reason; they are not among `leaves`.

    Example:
        >>> changed = {**params, "decoder/decoder_norm/scale": np.zeros(64, np.float32)}
        >>> found = portax.diff(params, changed)
        >>> [leaf.name for leaf in found.leaves if leaf.differences]
        ['decoder/decoder_norm/scale']
    """

    a: str
    b: str
    leaves: tuple[LeafDiff, ...]
    values: bool
    beside: Mapping[str, str]

    @property
    def equal(self) -> bool:
        """True if nothing differs."""
        return not any(leaf.differences for leaf in self.leaves)

    @property
    def verdict(self) -> str:
        """A summary in one line: `47 leaves: 45 equal, 1 only in A, 1 differs in values`."""
        kinds = collections.Counter(" and ".join(leaf.differences) for leaf in self.leaves)
        parts = []
        if count := kinds.pop("", 0):
            parts.append(f"{count} equal{'' if self.values else ' in shape and dtype; values were not compared'}")
        for kind, count in kinds.items():
            verb = "" if kind.startswith("only") else "differs in " if count == 1 else "differ in "
            parts.append(f"{count} {verb}{kind}")
        return f"{plural(len(self.leaves), 'leaf', 'leaves')}: {', '.join(parts)}"

    @property
    def reasons(self) -> list[str]:
        """Leaves outside the comparison, folded, with the reason: `lm_head.weight: repeats embed_tokens.weight`."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.beside.items():
            reasons.setdefault(why, []).append(name)
        return [f"{', '.join(fold(names))}: {why}" for why, names in reasons.items()]

    def __rich__(self) -> RenderableType:
        right = ("elements differ", "largest", "NaNs in A", "NaNs in B")
        table = new_table(
            "leaf", ("count", "right"), "A", "B", "verdict", *((what, "right") for what in right if self.values)
        )
        for leaves in groups(self.leaves):
            first = leaves[0]
            row = ["\n".join(fold(leaf.name for leaf in leaves)), str(len(leaves)), _kind(first.a), _kind(first.b)]
            table.add_row(*row, ", ".join(first.differences) or "equal", *(_numbers(leaves) if self.values else ()))
        lines = [f"A        {self.a}", f"B        {self.b}"]
        if not any(leaf.a and leaf.b for leaf in self.leaves):
            lines.append(
                "hint     no leaf is on both sides; a trainer's tree against the hub's tensors needs a converter"
            )
        lines += [f"beside   {reason}" for reason in self.reasons]
        return Group(table, text_lines([*lines, f"verdict  {self.verdict}"]))

    def to_dict(self) -> dict[str, Any]:
        """Returns all of the diff as values for JSON; an infinite largest difference is the string `inf`."""
        leaves = {
            leaf.name: {
                "a": _spec_json(leaf.a),
                "b": _spec_json(leaf.b),
                "differences": leaf.differences,
                "elements": leaf.elements,
                **({} if leaf.found is None else leaf.found.to_dict()),
            }
            for leaf in self.leaves
        }
        sides = {"a": self.a, "b": self.b}
        return {"equal": self.equal, "values": self.values, **sides, "beside": dict(self.beside), "leaves": leaves}


def groups(leaves: Iterable[LeafDiff]) -> list[list[LeafDiff]]:
    """Groups leaves that differ only in their number and in the size of their differences."""
    found: dict[Any, list[LeafDiff]] = {}
    for leaf in leaves:
        found.setdefault((fold_key(leaf.name), _kind(leaf.a), _kind(leaf.b), leaf.differences), []).append(leaf)
    return [*found.values()]


def _kind(spec: jax.ShapeDtypeStruct | None) -> str:
    return "-" if spec is None else f"{spec.dtype.name}{list(spec.shape)}"


def _spec_json(spec: jax.ShapeDtypeStruct | None) -> dict[str, Any] | None:
    return None if spec is None else {"shape": spec.shape, "dtype": spec.dtype.name}


def _numbers(leaves: list[LeafDiff]) -> tuple[str, ...]:
    """Returns the differences of several leaves, added up."""
    compared = [leaf.found for leaf in leaves if leaf.found is not None]
    if not compared:
        return ("", "", "", "")
    found = sum(compared, Found())
    share = found.different / max(sum(leaf.elements for leaf in leaves), 1)
    return (
        f"{found.different} ({share:.2%})" if found.different else "0",
        "" if found.largest is None else f"{found.largest:.3g}",
        *(str(count or "") for count in found.nans),
    )


def described(what: str, leaves: Iterable[Any], others: int = 0) -> str:
    """Describes one side: its form, its size, and the number of values that are not parameters."""
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves]
    beside = f"; not compared: {others} that are no parameters" if others else ""
    return f"{what}: {plural(len(sizes), 'leaf', 'leaves')}, {size(sum(sizes))}{beside}"
