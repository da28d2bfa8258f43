"""Names for people: natural order, and numbered names folded into one."""

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"\d+")


def natural_order(name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Sort key that puts `layers.2` before `layers.10`."""
    return tuple(_NUMBER.split(name)), tuple(int(n) for n in _NUMBER.findall(name))


def family(name: str) -> str:
    """The name with every number that is a path component (or its suffix) replaced: `layers.*.mlp`."""
    return re.sub(r"(?<=[._/])\d+(?=[./]|$)", "*", name)


def fold(names: Iterable[str]) -> list[str]:
    """Folds names that differ only in layer or expert numbers: `layers.{0...47}.mlp.gate.weight`.

    Args:
        names: Names, in any order.

    Returns:
        One name per family, in order of first appearance.
    """
    families: dict[str, list[tuple[str, ...]]] = {}
    for name in names:
        numbers = tuple(re.findall(r"(?<=[._/])\d+(?=[./]|$)", name))
        families.setdefault(family(name), []).append(numbers)
    return [_folded(pattern, rows) for pattern, rows in families.items()]


def _folded(pattern: str, rows: list[tuple[str, ...]]) -> str:
    for column in zip(*rows, strict=True):
        pattern = pattern.replace("*", numbers(sorted({int(n) for n in column})), 1)
    return pattern


def numbers(values: list[int]) -> str:
    """A set of numbers, in order: `5`, `{0...3}`, `{0,2}`."""
    if len(values) == 1:
        return str(values[0])
    if values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}...{values[-1]}}}"
    return "{" + ",".join(str(value) for value in values) + "}"
