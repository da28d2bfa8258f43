"""Reads what a trainer hands over, and shows every layer as if it were unscanned."""

import dataclasses
import re
import statistics
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from portax.errors import PlanError, Problem
from portax.names import fold, natural_order

_ROOTS = ("base", "params")
_ARRAYS = (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """The parameters of one model as a flat mapping.

    Attributes:
        leaves: Arrays (or their shapes) by path below the root, e.g. `decoder/decoder_norm/scale`.
        root: What stood in front of every path, e.g. `base/`.
        ignored: Paths of variables that are no parameters, such as RNG state.
    """

    leaves: Mapping[str, Any]
    root: str
    ignored: tuple[str, ...]


def read(params: Any) -> TrainerState:
    """Flattens a parameter tree of any of the forms that trainers use.

    Args:
        params: An `nnx.State`, a nested or flat mapping (paths as `a/b/c`, `a.b.c` or tuples), or a FrozenDict; leaves
            are arrays, shapes, or boxes of them with `get_value()` or `.value`; below `base`, `params`, or no root.

    Returns:
        The flat state.

    Raises:
        PlanError: The tree is empty, is no tree, or holds something else than arrays.
    """
    if not isinstance(params, Mapping):
        raise PlanError([_no_parameters(f"a {type(params).__name__}")])
    leaves, ignored = {}, []
    for path, box in flatten(params):
        leaf = unbox(box)
        if _is_parameter(box, leaf):
            leaves["/".join(path)] = leaf
        else:
            ignored.append("/".join(path))
    if not leaves:
        raise PlanError([_no_parameters("an empty tree")])
    if odd := [_no_array(path, leaf) for path, leaf in leaves.items() if not isinstance(leaf, _ARRAYS)]:
        raise PlanError(odd)
    root = _common_root(leaves)
    return TrainerState({path.removeprefix(root): leaf for path, leaf in leaves.items()}, root, tuple(ignored))


def _no_parameters(found: str) -> Problem:
    return Problem(
        "params",
        found,
        "a mapping that holds the model's parameters (nnx.State, nested or flat dict)",
        "the state was filtered to nothing, or another object was passed",
    )


def _no_array(path: str, leaf: Any) -> Problem:
    cause = "metadata, a framework's own tensor type, or a box that is not opened"
    return Problem(path, f"a {type(leaf).__name__}", "an array of JAX or numpy, or a jax.ShapeDtypeStruct", cause)


def flatten(node: Mapping, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of a nested or flat mapping, boxed as they are, with their paths in parts."""
    for key, child in node.items():
        here = path + _split(key)
        if isinstance(child, Mapping):
            yield from flatten(child, here)
        elif child is not None:
            yield here, child


def _split(key: Any) -> tuple[str, ...]:
    if isinstance(key, tuple):
        return tuple(str(part) for part in key)
    return tuple(re.split(r"[/.]", key)) if isinstance(key, str) else (str(key),)


def unbox(box: Any) -> Any:
    """The array (or shape) in a box such as `nnx.Param`; an array itself is returned as it is."""
    if isinstance(box, _ARRAYS):
        return box
    if hasattr(box, "get_value"):
        return box.get_value()
    return getattr(box, "value", box)


def _is_parameter(box: Any, leaf: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # a tree can hold flax variables only if flax is already imported
    if nnx is not None:
        kind = getattr(box, "type", None) if not isinstance(box, nnx.Variable) else type(box)
        if isinstance(kind, type) and issubclass(kind, nnx.Variable):
            return issubclass(kind, nnx.Param)
    return not jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def _common_root(leaves: Mapping[str, Any]) -> str:
    root = ""
    while len(heads := {path.removeprefix(root).partition("/")[0] for path in leaves}) == 1 and heads <= {*_ROOTS}:
        root += f"{heads.pop()}/"
    return root


@dataclasses.dataclass(frozen=True)
class Layer:
    """Where the weights of one layer, or of the model outside its layers, are.

    Attributes:
        index: Number of the layer in the model; None for the global weights.
        container: Path of the layer or of its stack, e.g. `decoder/layers`; empty for the global weights.
        leaves: Its arrays, or the stacks that it is a slice of, by path relative to the container.
        scan: Size of each scan axis of `leaves`; empty for a layer with arrays of its own.
        position: Index of this layer on each scan axis.
    """

    index: int | None
    container: str
    leaves: Mapping[str, Any]
    scan: tuple[int, ...] = ()
    position: tuple[int, ...] = ()

    def path(self, leaf: str) -> str:
        """Full path of one leaf, below the root."""
        return f"{self.container}/{leaf}" if self.container else leaf


@dataclasses.dataclass(frozen=True)
class Kind:
    """What one compiled program is made for; the shapes and dtypes of the arrays come on top.

    Attributes:
        is_global: Whether this is the model outside its layers.
        paths: The leaves' paths, relative to the layer.
        scan: Size of each scan axis of the leaves.
    """

    is_global: bool
    paths: tuple[str, ...]
    scan: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """Layers of one kind, whose leaves have the same shapes and dtypes.

    Attributes:
        kind: What they have in common.
        layers: The layers, in order.
    """

    kind: Kind
    layers: tuple[Layer, ...]

    def arrays(self, layer: Layer) -> tuple[Any, ...]:
        """The leaves of one of the layers, in the order of the kind's paths."""
        return tuple(layer.leaves[path] for path in self.kind.paths)

    def names(self, path: str) -> str:
        """Path of one leaf in all the layers, folded: `decoder/layers_{0...3}/mlp/wo/kernel`."""
        return fold(sorted({layer.path(path) for layer in self.layers}, key=natural_order))[0]


# Where MaxText keeps layers, and how many scan axes the leaves there have.
_CONTAINERS = (
    (re.compile(r"(?P<container>decoder/layers_(?P<index>\d+))/(?P<leaf>.+)"), 0),
    (re.compile(r"(?P<container>decoder/layers)/(?P<leaf>.+)"), 1),
)


def sections(state: TrainerState, scan_axis: int) -> tuple[Section, ...]:
    """Groups a state into the global weights and the layers of each kind.

    Layers are told apart by their leaves, never by their names or numbers: how many programs a model needs does not
    depend on its depth.

    Args:
        state: The flat state.
        scan_axis: First scan axis of stacked leaves (MaxText's `param_scan_axis`).
    """
    kinds: dict[Any, list[Layer]] = {}
    for layer in _layers(state, scan_axis):
        kind = Kind(layer.index is None, tuple(sorted(layer.leaves)), layer.scan)
        types = tuple((layer.leaves[path].shape, np.dtype(layer.leaves[path].dtype)) for path in kind.paths)
        kinds.setdefault((kind, types), []).append(layer)
    return tuple(Section(kind, tuple(layers)) for (kind, _), layers in kinds.items())


def _layers(state: TrainerState, scan_axis: int) -> list[Layer]:
    global_leaves: dict[str, Any] = {}
    unscanned: dict[tuple[int, str], dict[str, Any]] = {}
    stacks: dict[str, dict[str, Any]] = {}
    for path, leaf in state.leaves.items():
        match, depth = next(((m, d) for pattern, d in _CONTAINERS if (m := pattern.fullmatch(path))), (None, 0))
        if match is None:
            global_leaves[path] = leaf
        elif depth:
            stacks.setdefault(match["container"], {})[match["leaf"]] = leaf
        else:
            unscanned.setdefault((int(match["index"]), match["container"]), {})[match["leaf"]] = leaf
    layers = [Layer(index, container, leaves) for (index, container), leaves in unscanned.items()]
    for container, leaves in stacks.items():
        layers += _unstack(container, leaves, scan_axis)
    return [Layer(None, "", global_leaves), *sorted(layers, key=lambda layer: layer.index or 0)]


def _unstack(container: str, leaves: dict[str, Any], scan_axis: int) -> list[Layer]:
    lengths = [leaf.shape[scan_axis] for leaf in leaves.values() if len(leaf.shape) > scan_axis]
    length = statistics.mode(lengths) if lengths else 0
    return [Layer(i, container, leaves, (length,), (i,)) for i in range(length)]
