"""`diff`: compares two checkpoints or states, leaf by leaf."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from portax._text.report import Progress, no_progress
from portax.analysis.compare import Found, common_dtype, compare
from portax.analysis.diff_report import Diff, LeafDiff, described
from portax.checkpoints.reading import Checkpoint
from portax.converters.base import BaseConverter
from portax.errors import CheckpointError
from portax.trainer import param_tree
from portax.trainer.flatten import split
from portax.trainer.param_tree import Params

PIECE_BYTES = 2**24
_BUCKET_BYTES = 2**28
_DECODER = "decoder/"  # where every trainer's tree has its layers, and no hub's checkpoint or engine has any


@dataclasses.dataclass(frozen=True)
class _Side:
    """One of the two sides.

    Attributes:
        what: Words for it.
        names: Full names by path; paths have `/` between parts, so that they are comparable.
        specs: Shapes and dtypes by path.
        read: Yields the leaves of the given paths, by path, some at a time.
        converted: True if they are converted when they are read.
        outside: Paths outside the layers, if they are known.
    """

    what: str
    names: Mapping[str, str]
    specs: Mapping[str, jax.ShapeDtypeStruct]
    read: Callable[[Collection[str]], Iterator[Mapping[str, Any]]]
    converted: bool = False
    outside: tuple[str, ...] = ()


def diff(
    a: Params,
    b: Params,
    *,
    converter: BaseConverter | None = None,
    values: bool = True,
    piece_bytes: int = PIECE_BYTES,
    progress: Progress = no_progress,
) -> Diff:
    """Compares two checkpoints or states, leaf by leaf: names, shapes, dtypes, and bits.

    Leaves are read one at a time, large ones in pieces. Roots such as `base/` are ignored if no leaf has the same name
    on both sides.

    Args:
        a: A `Checkpoint`, or a state: a nested or flat mapping of arrays (or, without values, shapes).
        b: The same.
        converter: Converts a side that is a trainer's tree, a layer at a time, before the comparison: of a trainer's
            checkpoint with the hub's, or of a scanned one with an unscanned one.
        values: True compares values; False reads nothing but names, shapes and dtypes.
        piece_bytes: Bytes to read at a time of a leaf on disk or in host memory.
        progress: Called with the number of bytes of A compared since its last call, and the total.

    Returns:
        The differences; printed, they are a table.

    Raises:
        PlanError: A side is no tree of arrays, or not a tree that the converter takes.
        CheckpointError: A side cannot be read, or has shapes instead of values.

    Example:
        >>> found = portax.diff(portax.open_checkpoint("checkpoint"), params)
        >>> found.equal
        True
    """
    states = [param_tree.read(tree) for tree in (a, b)]
    rooted = bool({*states[0].rooted} & {*states[1].rooted})
    one = _side(a, states[0], "A", converter, rooted=rooted)
    two = _side(b, states[1], "B", converter and converter.on(converter.mesh), rooted=rooted)
    common = [path for path in one.specs if path in two.specs]
    found: dict[str, Found] = {}
    if values:
        alike = [path for path in common if _comparable(one.specs[path], two.specs[path])]
        total = sum(one.specs[path].size * one.specs[path].dtype.itemsize for path in alike)
        for path, x, y in _pairs(one, two, alike):
            found[path] = compare(x, y, piece_bytes=piece_bytes, progress=lambda done: progress(done, total))
    beside = dict(_beside(one, two, converter, piece_bytes if values else None)) if converter else {}
    paths = dict.fromkeys((*one.specs, *two.specs))
    names = {**two.names, **one.names}
    rows = [LeafDiff(names[path], one.specs.get(path), two.specs.get(path), found.get(path)) for path in paths]
    return Diff(one.what, two.what, tuple(row for row in rows if row.name not in beside), values, beside)


def _side(
    tree: Any, state: param_tree.ParamTree, letter: str, converter: BaseConverter | None, *, rooted: bool
) -> _Side:
    what = f"{tree.path} ({tree.form})" if isinstance(tree, Checkpoint) else f"a state ({letter})"
    if converter is not None and any(path.startswith(_DECODER) for path in state.leaves):
        return _converted(tree, what, converter)
    leaves = state.rooted if rooted else {**state.leaves, **state.strangers}
    root = "" if rooted else state.root
    given = {"/".join(split(key)).removeprefix(root): key for key in tree if isinstance(key, str)}
    names = {path: given.get(path, root + path) for path in leaves}
    specs = {path: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype)) for path, leaf in leaves.items()}
    return _Side(
        what=described(what, specs.values(), len(state.ignored) + len(getattr(tree, "others", ()))),
        names=names,
        specs=specs,
        read=lambda paths: ({path: _with_values(names[path], leaves[path])} for path in paths),
    )


def _converted(tree: Params, what: str, converter: BaseConverter) -> _Side:
    plan = converter.plan(tree)
    paths = {entry.name: "/".join(split(entry.name)) for entry in plan.entries}

    def read(wanted: Collection[str]) -> Iterator[Mapping[str, Any]]:
        names = {name for name, path in paths.items() if path in wanted}
        for bucket in converter.stream(tree, bucket_bytes=_BUCKET_BYTES, only=names):
            yield {paths[name]: leaf for name, leaf in bucket.items()}

    specs = {paths[entry.name]: jax.ShapeDtypeStruct(entry.shape, entry.dtype) for entry in plan.entries}
    return _Side(
        what=described(f"{what} as {plan.layout}", specs.values()),
        names={path: name for name, path in paths.items()},
        specs=specs,
        read=read,
        converted=True,
        outside=tuple(specs)[: plan.tensors_per_layer[0]],
    )


def _with_values(name: str, leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct) or (isinstance(leaf, jax.Array) and leaf.is_deleted()):
        what = "a deleted array" if isinstance(leaf, jax.Array) else "a shape"
        raise CheckpointError(f"{name}: {what} has no values to compare; without values, shapes and dtypes can be")
    return leaf


def _comparable(a: jax.ShapeDtypeStruct, b: jax.ShapeDtypeStruct) -> bool:
    return a.shape == b.shape and common_dtype(a.dtype, b.dtype) is not None


def _pairs(a: _Side, b: _Side, paths: Collection[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yields the leaves of these paths on both sides; the converted side determines the order."""
    if b.converted and not a.converted:
        yield from ((path, x, y) for path, y, x in _pairs(b, a, paths))
        return
    for bucket in a.read(paths):
        for others in b.read(bucket):
            yield from ((path, bucket[path], other) for path, other in others.items())


def _beside(one: _Side, two: _Side, converter: BaseConverter, piece_bytes: int | None) -> Iterator[tuple[str, str]]:
    """Returns leaves that a converted side need not have, each with the reason."""
    for mine, other in ((one, two), (two, one)):
        if not mine.converted or other.converted:
            continue
        for path in other.specs.keys() - mine.specs.keys():
            if converter.is_engine_owned(other.names[path]):
                yield other.names[path], "no weight of the language model"
            elif piece_bytes and (same := _repeated(path, mine.outside, other, piece_bytes)):
                yield other.names[path], f"repeats {same}"


def _repeated(path: str, outside: Iterable[str], side: _Side, piece_bytes: int) -> str | None:
    """Returns the leaf outside the layers that this one copies: a tied head that was saved all the same."""
    for other in outside:
        if other in side.specs and (side.specs[other].shape, side.specs[other].dtype) == (
            side.specs[path].shape,
            side.specs[path].dtype,
        ):
            [x], [y] = side.read([path]), side.read([other])
            if not compare(x[path], y[other], piece_bytes=piece_bytes).different:
                return side.names[other]
    return None
