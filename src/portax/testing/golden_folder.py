"""`verify_folder`: compares every golden below a folder with portax's result for the tree beside it."""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Group, RenderableType

from portax._text.report import Report
from portax._text.tables import new_table, plural, text_lines
from portax.converters import converter_for
from portax.errors import GoldenError, PortaxError
from portax.testing.comparison import exact, tally
from portax.testing.golden import Comparison, Golden, Tree, compare, is_golden

SOURCE = "source.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden, to compare for a source of one dtype.

    Attributes:
        path: The golden's file.
        source_dtype: Dtype that the tree's parameters are given; None for their own.
        golden: Its content; None if it is refused.
        refused: The reason why it cannot be compared; empty if it can.
    """

    path: pathlib.Path
    source_dtype: str | None
    golden: Golden | None
    refused: str = ""

    @property
    def devices(self) -> int:
        """Number of devices of its engine's mesh."""
        return math.prod(self.golden.layout.mesh_axes.values()) if self.golden else 1


@dataclasses.dataclass(frozen=True)
class Verified:
    """A comparison of one golden with portax's result.

    Attributes:
        case: The golden.
        rows: Every leaf; empty if the golden was refused.
        refused: The reason why nothing was compared: an unsupported family, layout or file; else empty.
        seconds: Duration.
    """

    case: Case
    rows: tuple[Comparison, ...]
    refused: str
    seconds: float

    @property
    def exact(self) -> bool:
        """True if leaves were compared, and none differs."""
        return not self.refused and exact(self.rows)

    @property
    def verdict(self) -> str:
        """The result in a line."""
        return f"refused: {self.refused}" if self.refused else tally(self.rows)


@dataclasses.dataclass(frozen=True)
class FolderReport(Report):
    """A comparison of every golden below a folder with portax's results.

    Attributes:
        folder: The folder.
        results: One result for each golden and source dtype.
    """

    folder: pathlib.Path
    results: tuple[Verified, ...]

    @property
    def exit_code(self) -> int:
        """0 if every leaf is exact, 1 if a leaf differs, 2 if none does but a golden was refused."""
        if any(not result.refused and not result.exact for result in self.results):
            return 1
        return 0 if all(result.exact for result in self.results) else 2

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it; only those leaves that differ."""
        rows = [
            {
                "golden": self._name(result),
                "source_dtype": result.case.source_dtype,
                "layout": repr(result.case.golden.layout) if result.case.golden else None,
                "exact": result.exact,
                "refused": result.refused or None,
                "leaves": len(result.rows),
                "different": {row.name: row.difference for row in result.rows if row.difference},
                "seconds": round(result.seconds, 3),
            }
            for result in self.results
        ]
        return {"folder": str(self.folder), "exact": self.exit_code == 0, "goldens": rows}

    def __rich__(self) -> RenderableType:
        table = new_table("golden", "source", ("seconds", "right"), "verdict")
        for result in self.results:
            source, seconds = result.case.source_dtype or "as dumped", f"{result.seconds:.1f}"
            table.add_row(self._name(result), source, seconds, text_lines([self._verdict(result)]))
        counts = {
            "exact": sum(result.exact for result in self.results),
            "different": sum(not result.exact and not result.refused for result in self.results),
            "refused": sum(bool(result.refused) for result in self.results),
        }
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return Group(table, text_lines([f"{plural(len(self.results), 'golden')}: {told}"]))

    def _name(self, result: Verified) -> str:
        return str(result.case.path.relative_to(self.folder))

    def _verdict(self, result: Verified) -> str:
        first = next((row for row in result.rows if row.difference), None)
        return result.verdict if first is None else f"{result.verdict}, such as {first.name}: {first.difference}"


def cases(folder: pathlib.Path, source_dtypes: Sequence[str] = ()) -> list[Case]:
    """Finds every golden below a folder: a `.json` that holds the leaves of an engine, or the tensors of the hub.

    Args:
        folder: The folder.
        source_dtypes: Dtypes that the parameters of each tree are given, one after the other; none for their own.

    Raises:
        GoldenError: There is no such folder, or no golden below it.
    """
    if not folder.is_dir():
        raise GoldenError(f"{folder}: there is no such folder")
    found = [path for path in sorted(folder.rglob("*.json")) if path.name != SOURCE and is_golden(path)]
    if not found:
        raise GoldenError(f"{folder}: there is no golden below it, such as hf.json or tpu-inference-0.32.0.tp2.json")
    return [_case(path, dtype) for path in found for dtype in source_dtypes or (None,)]


def _case(path: pathlib.Path, dtype: str | None) -> Case:
    try:
        golden = Golden.load(path)
        return Case(path, dtype, golden if dtype is None else golden.of_source(dtype))
    except PortaxError as error:
        return Case(path, dtype, None, str(error).removeprefix(f"{path}: "))


def verify(cases: Sequence[Case]) -> Iterator[Verified]:
    """Converts the tree beside each golden, and compares.

    Args:
        cases: The goldens; those of one folder one after the other, so that its tree is filled once.

    Yields:
        The result of one golden at a time.
    """
    filled = functools.lru_cache(maxsize=2)(_filled)
    for case in cases:
        start = time.perf_counter()
        try:
            rows, refused = _compared(case, filled), case.refused
        except PortaxError as error:
            rows, refused = (), str(error)
        yield Verified(case, rows, refused, time.perf_counter() - start)


def _compared(case: Case, filled: Any) -> tuple[Comparison, ...]:
    if case.golden is None:
        return ()
    source = case.path.with_name(SOURCE)
    if not source.is_file():
        raise GoldenError(f"there is no {SOURCE} beside it")
    axes = case.golden.layout.mesh_axes
    mesh = None
    if axes:
        mesh = Mesh(np.array(jax.devices()[: case.devices]).reshape([*axes.values()]), tuple(axes))
    config, params = filled(source, case.source_dtype, case.golden.values)
    weights = converter_for(config, layout=case.golden.layout, mesh=mesh).convert(params)
    return tuple(compare(weights, case.golden))


def _filled(source: pathlib.Path, dtype: str | None, values: str) -> tuple[Any, dict[str, np.ndarray]]:
    tree = Tree.load(source)
    return tree.config, tree.fill(values, dtype)
