"""Reads what a trainer hands over: a flat mapping of parameters, whatever tree they came in."""

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from portax.errors import PlanError, Problem
from portax.trainer.lazy_array import LazyArray

_ROOTS = ("base", "params")
_ARRAYS = (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic, LazyArray)


@dataclasses.dataclass(frozen=True)
class ParamTree:
    """The parameters of one model as a flat mapping.

    Attributes:
        leaves: Arrays (or their shapes) by path below the root, e.g. `decoder/decoder_norm/scale`.
        root: What stood in front of every path, e.g. `base/`.
        ignored: Paths of variables that are no parameters, such as RNG state.
    """

    leaves: Mapping[str, Any]
    root: str
    ignored: tuple[str, ...]

    @property
    def rooted(self) -> dict[str, Any]:
        """Arrays by their whole path."""
        return {self.root + path: leaf for path, leaf in self.leaves.items()}


def read(params: Any) -> ParamTree:
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
    leaves: dict[str, Any] = {}
    ignored, twice = [], []
    for parts, box in flatten(params):
        path, leaf = "/".join(parts), unbox(box)
        if _is_parameter(box, leaf):
            twice += [path] * (path in leaves)
            leaves[path] = leaf
        else:
            ignored.append(path)
    if twice:
        raise PlanError(_twice(path) for path in twice)
    if not leaves:
        raise PlanError([_no_parameters("an empty tree")])
    if odd := [_no_array(path, leaf) for path, leaf in leaves.items() if not isinstance(leaf, _ARRAYS)]:
        raise PlanError(odd)
    root = _common_root(leaves)
    return ParamTree({path.removeprefix(root): leaf for path, leaf in leaves.items()}, root, tuple(ignored))


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


def _twice(path: str) -> Problem:
    cause = "names that are told apart by nothing but dots and slashes, or trees that were merged"
    return Problem(path, "two leaves of this path", "one", cause)


def flatten(node: Mapping, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of a nested or flat mapping, boxed as they are, with their paths in parts."""
    for key, child in node.items():
        here = path + split(key)
        if isinstance(child, Mapping):
            yield from flatten(child, here)
        elif child is not None:
            yield here, child


def split(key: Any) -> tuple[str, ...]:
    """The parts of one key of a mapping: `a/b`, `a.b` and `("a", "b")` have two."""
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
