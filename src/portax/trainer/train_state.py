"""Tells a model's parameters from the rest of a train state: by their variables' types, else by usual names."""

import collections
import dataclasses
import sys
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from portax.trainer.flatten import ARRAYS, Box, Leaf, Parts, unbox

_TRUNK = ("base", "params", "decoder", "token_embedder")  # what a trainer's `model` holds, and a hub's does not
_BESIDE = ("optimizer", "opt_state", "step", "nnx_aux", "batch_stats")  # what stands beside parameters
_RANDOM = ("rngs", "dropout")  # what holds random state alone, where no variable's type says so
_WEIGHTS = ("MoEBiasVar",)  # variables that are weights and no `nnx.Param`: DeepSeek's router bias in MaxText
_AUX, _AUX_WEIGHTS = ("nnx_aux", "model"), ("gate", "bias")  # where checkpoints have those, which know no types


@dataclasses.dataclass(frozen=True)
class Selection:
    """The parameters of a train state, separated from everything else in it.

    Attributes:
        root: Prefix of every parameter's path, e.g. `model/base/`.
        params: Parameters by path below the root.
        ignored: Everything else by its whole path: optimizer state, step, random state, statistics, caches.
        strangers: Unknown arrays beside the parameters, by whole path.
    """

    root: str
    params: Mapping[str, Leaf]
    ignored: Mapping[str, Leaf]
    strangers: Mapping[str, Leaf]


def select(found: Iterable[tuple[Parts, Box]]) -> tuple[Selection, list[str]]:
    """Finds the parameters in a flattened train state, or in a part of it.

    Args:
        found: Paths and boxed leaves, as of `flatten`.

    Returns:
        The selection, and paths that more than one leaf has.
    """
    candidates: dict[Parts, Leaf] = {}
    ignored: dict[Parts, Leaf] = {}
    twice: list[str] = []
    for parts, box in found:
        leaf = unbox(box)
        twice += ["/".join(parts)] * (parts in candidates)
        (candidates if _is_parameter(parts, box, leaf) else ignored)[parts] = leaf
    root = _root(candidates)
    strangers: dict[Parts, Leaf] = {}
    params: dict[str, Leaf] = {}
    boxed = _boxed(candidates)
    for parts, leaf in candidates.items():
        if parts[: len(root)] == root:
            path = "/".join(parts[len(root) : len(parts) - (parts in boxed)])
            twice += ["/".join((*root, path))] * (path in params)
            params[path] = leaf
        elif _is_auxiliary_weight(parts, parts in boxed):
            params["/".join(parts[len(_AUX) : len(parts) - (parts in boxed)])] = leaf
        elif _is_stranger(parts, root, leaf):
            strangers[parts] = leaf
        else:
            ignored[parts] = leaf
    return Selection("".join(f"{part}/" for part in root), params, _joined(ignored), _joined(strangers)), twice


def _joined(leaves: Mapping[Parts, Leaf]) -> dict[str, Leaf]:
    return {"/".join(parts): leaf for parts, leaf in leaves.items()}


def _is_parameter(parts: Parts, box: Box, leaf: Leaf) -> bool:
    nnx = sys.modules.get("flax.nnx")  # a tree can hold flax variables only if flax is already imported
    if nnx is not None:
        kind = getattr(box, "type", None) if not isinstance(box, nnx.Variable) else type(box)
        if isinstance(kind, type) and issubclass(kind, nnx.Variable):
            return issubclass(kind, nnx.Param) or any(base.__name__ in _WEIGHTS for base in kind.__mro__)
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
        return False
    return not any(part in _RANDOM for part in parts)


def _root(paths: Iterable[Parts]) -> Parts:
    """Returns the folders in front of the parameters, from the outside inwards."""
    root: Parts = ()
    inside = list(paths)
    while (head := _head(inside, len(root))) is not None:
        root = (*root, head)
        inside = [parts for parts in inside if parts[: len(root)] == root]
    return root


def _head(paths: Iterable[Parts], depth: int) -> str | None:
    """Returns the folder at this depth that holds the parameters; None if they stand there themselves."""
    folders = [parts[depth : depth + 2] for parts in paths if len(parts) > depth + 1]
    heads = {head for head, _ in folders}
    if "params" in heads:
        return "params"
    if heads == {"base"}:
        return "base"
    return "model" if any(head == "model" and below in _TRUNK for head, below in folders) else None


def _is_auxiliary_weight(parts: Parts, boxed: bool) -> bool:
    """Tells a weight that MaxText saves beside the parameters because its variable is no `nnx.Param`."""
    path = parts[: len(parts) - boxed]
    return path[: len(_AUX)] == _AUX and path[-len(_AUX_WEIGHTS) :] == _AUX_WEIGHTS


def _is_stranger(parts: Parts, root: Parts, leaf: Leaf) -> bool:
    """Tells whether a leaf beside the parameters may be a weight; counters and other known leaves are not."""
    common = next(i for i, part in enumerate(root) if parts[i : i + 1] != (part,))
    known = parts[common] in _BESIDE if len(parts) > common else False
    return not known and isinstance(leaf, ARRAYS) and leaf.ndim > 0 and jax.numpy.issubdtype(leaf.dtype, np.floating)


def _boxed(paths: Iterable[Parts]) -> set[Parts]:
    """Paths of arrays that were saved as `{"value": array}`: nothing stands beside such a `value`."""
    ends = {parts for parts in paths if len(parts) > 1 and parts[-1] == "value"}
    if not ends:
        return ends
    beside = collections.Counter(child[:-1] for child in {p[: i + 1] for p in paths for i in range(len(p))})
    return {parts for parts in ends if beside[parts[:-1]] == 1}
