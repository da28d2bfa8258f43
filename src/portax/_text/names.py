"""Names for people: natural order, and numbered names folded into one."""

import re
from collections.abc import Callable, Container, Iterable

_NUMBER = re.compile(r"\d+")
_FOLDED = re.compile(r"\{(\d+(?:,\d+)*|\d+\.\.\.\d+)\}")
_INDEX = re.compile(r"(?<=[./])\d+(?=[./])|(?<=layers_)\d+(?=[./])|(?<=layer_)\d+(?=[./])")  # of a layer or an expert
_APART = re.compile(f"({_INDEX.pattern})")


def natural_order(name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Sort key that puts `layers.2` before `layers.10`."""
    return tuple(_NUMBER.split(name)), tuple(int(n) for n in _NUMBER.findall(name))


def fold_key(name: str) -> str:
    """Returns the name without layer and expert numbers: `layers.*.mlp.gate.weight`."""
    return _INDEX.sub("*", name)


def parts(name: str) -> tuple[list[str], tuple[int, ...]]:
    """Splits a name into the texts around its layer and expert numbers, and those numbers."""
    found = _APART.split(name)
    return found[::2], tuple(map(int, found[1::2]))


def fold(names: Iterable[str]) -> list[str]:
    """Folds names that differ only in layer or expert numbers: `layers.{0...47}.mlp.gate.weight`.

    Args:
        names: Names, in any order.

    Returns:
        One name per family, in order of first appearance.
    """
    families: dict[str, list[tuple[str, ...]]] = {}
    for name in names:
        families.setdefault(fold_key(name), []).append(tuple(_INDEX.findall(name)))
    return [_folded(pattern, rows) for pattern, rows in families.items()]


def _folded(pattern: str, rows: list[tuple[str, ...]]) -> str:
    for column in zip(*rows, strict=True):
        pattern = pattern.replace("*", numbers(sorted({int(n) for n in column})), 1)
    return pattern


def numbers(values: list[int]) -> str:
    """Writes a set of numbers, in order: `5`, `{0...3}`, `{0,2}`."""
    if len(values) == 1:
        return str(values[0])
    if values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}...{values[-1]}}}"
    return "{" + ",".join(str(value) for value in values) + "}"


def folded_into(folded: str) -> Callable[[str], bool]:
    """Returns a function that tells whether a name is one of those that this folded name stands for."""
    around = _FOLDED.split(folded)
    pattern = re.compile(r"(\d+)".join(re.escape(text) for text in around[::2]))
    columns = [_numbers(text) for text in around[1::2]]

    def tell(name: str) -> bool:
        found = pattern.fullmatch(name)
        return name == folded or (
            found is not None and all(int(n) in column for n, column in zip(found.groups(), columns, strict=True))
        )

    return tell


def _numbers(text: str) -> Container[int]:
    first, _, last = text.partition("...")
    return range(int(first), int(last) + 1) if last else [int(n) for n in text.split(",")]
