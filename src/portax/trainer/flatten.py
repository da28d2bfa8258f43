"""Flattens nested containers of any kind into paths and leaves, and opens the boxes that leaves come in."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from portax.trainer.lazy_array import LazyArray

Parts: TypeAlias = tuple[str, ...]
"""A path, in parts: `("decoder", "decoder_norm", "scale")`."""

Leaf: TypeAlias = Any
"""An array of JAX or numpy, its shape (`jax.ShapeDtypeStruct`), or a `LazyArray`; see `ARRAYS`."""

Box: TypeAlias = Any
"""A leaf, or what holds one: an `nnx.Variable`, a Linen `Partitioned`, anything with `get_value()` or `.value`."""

ARRAYS = (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic, LazyArray)


def flatten(node: object, path: Parts = ()) -> Iterator[tuple[Parts, Box]]:
    """The leaves of nested mappings, lists, tuples and named tuples, boxed as they are; None is no leaf.

    Args:
        node: The container, or a leaf.
        path: Its path.
    """
    children = _children(node)
    if children is not None:
        for key, child in children.items():
            yield from flatten(child, path + split(key))
    elif node is not None:
        yield path, node


def _children(node: object) -> Mapping[Any, object] | None:
    if isinstance(node, Mapping):
        return node
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return dict(zip(node._fields, node, strict=True))
    if isinstance(node, list | tuple):
        return dict(enumerate(node))
    return None


def fields(state: object) -> dict[str, object] | None:
    """Returns the fields of a train state that is an object, such as flax's `TrainState`; None without `params`."""
    params = getattr(state, "params", None)
    if not isinstance(params, Mapping):
        return None
    if not dataclasses.is_dataclass(state):
        return {"params": params}
    data = [field.name for field in dataclasses.fields(state) if field.metadata.get("pytree_node", True)]
    return {name: getattr(state, name) for name in data} | {"params": params}


def split(key: object) -> Parts:
    """The parts of one key of a mapping: `a/b`, `a.b` and `("a", "b")` have two."""
    if isinstance(key, tuple):
        return tuple(str(part) for part in key)
    return tuple(re.split(r"[/.]", key)) if isinstance(key, str) else (str(key),)


def unbox(box: Box) -> Leaf:
    """The array (or shape) in a box such as `nnx.Param`; an array itself is returned as it is."""
    if isinstance(box, ARRAYS):
        return box
    if hasattr(box, "get_value"):
        return box.get_value()
    return getattr(box, "value", box)
