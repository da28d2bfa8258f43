"""Reads a trainer's parameters, in any of the trees that they come in, as one flat mapping."""

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from portax.errors import PlanError, Problem
from portax.trainer.flatten import ARRAYS, Leaf, fields, flatten
from portax.trainer.train_state import Selection, select


@dataclasses.dataclass(frozen=True)
class ParamTree:
    """The parameters of one model as a flat mapping.

    Attributes:
        leaves: Arrays (or their shapes) by path below the root, e.g. `decoder/decoder_norm/scale`.
        root: Prefix of every path, e.g. `base/`.
        ignored: Whole paths of variables that are no parameters, such as random state and an optimizer's.
        left: Whole paths of parameters that were to be left out.
        strangers: Arrays beside the parameters, by whole path, that nothing says what they are; no model has them.
    """

    leaves: Mapping[str, Leaf]
    root: str
    ignored: tuple[str, ...]
    left: tuple[str, ...] = ()
    strangers: Mapping[str, Leaf] = dataclasses.field(default_factory=dict)

    @property
    def rooted(self) -> dict[str, Leaf]:
        """Arrays by their whole path, strangers too."""
        return {**{self.root + path: leaf for path, leaf in self.leaves.items()}, **self.strangers}


Params: TypeAlias = object
"""A trainer's parameters: an `nnx.State`, a nested or flat mapping, a checkpoint, or a whole train state."""


def read(params: Params, leave: Sequence[str] = ()) -> ParamTree:
    """Flattens a parameter tree of any of the forms that trainers use.

    Args:
        params: An `nnx.State`, a nested or flat mapping (paths as `a/b/c`, `a.b.c` or tuples), a FrozenDict, lists of
            layers in any of these; a whole train state, of which the parameters are taken. Leaves are arrays, shapes,
            or boxes of them (`get_value()`, `.value`, `{"value": array}`); below `base`, `params`, or no root. A
            `ParamTree` has been read, and is returned as it is.
        leave: Patterns of `fnmatch`; parameters whose whole path matches one are left out.

    Returns:
        The flat state.

    Raises:
        PlanError: The tree is empty, is no tree, or holds something else than arrays; or a pattern matches nothing.
    """
    if isinstance(params, ParamTree):
        return params
    selection, twice = select(flatten(_container(params)))
    selection, left = _without(selection, leave)
    problems = [_twice(path) for path in twice]
    if not selection.params and not problems:
        raise PlanError([_no_parameters("an empty tree", "the state was filtered to nothing")])
    for path, leaf in selection.params.items():
        problems += _leaf_problems(selection.root + path, leaf)
    if problems:
        raise PlanError(problems)
    return ParamTree(selection.params, selection.root, (*selection.ignored,), left, selection.strangers)


def refuse_strangers(state: ParamTree) -> None:
    """Raises a `PlanError` if there are unknown arrays beside the parameters."""
    if state.strangers:
        raise PlanError(_stranger(path, leaf) for path, leaf in state.strangers.items())


def refuse_tracers(state: ParamTree) -> None:
    """Raises a `PlanError` if leaves are the tracers of a program that is being traced around the call."""
    if traced := [path for path, leaf in state.leaves.items() if isinstance(leaf, jax.core.Tracer)]:
        cause = "this was called inside jax.jit, jax.eval_shape or the like: call it outside, or plan(), which needs no"
        more = f" (and {len(traced) - 1} more)" if len(traced) > 1 else ""
        problem = Problem(state.root + traced[0] + more, "a tracer", "an array with values", f"{cause} values")
        raise PlanError([problem])


def _container(params: object) -> Mapping[Any, Any]:
    if isinstance(params, Mapping):
        return params
    what = f"a {type(params).__name__}" if params is not None else "None"
    if _is_module(params):
        raise PlanError([_no_parameters(f"{what}, a model", "pass the model's parameters: nnx.state(model)")])
    held = fields(params)
    if held is None:
        raise PlanError([_no_parameters(what, "another object was passed")])
    return held


def _is_module(params: object) -> bool:
    """Tells whether this is a model object of NNX or Linen."""
    return any(base.__module__.startswith("flax.") and base.__name__ == "Module" for base in type(params).__mro__)


def _without(selection: Selection, leave: Sequence[str]) -> tuple[Selection, tuple[str, ...]]:
    """The selection without what is to be left out, and the paths of that."""
    if not leave:
        return selection, ()
    paths = [*(selection.root + path for path in selection.params), *selection.strangers]
    matches = {pattern: fnmatch.filter(paths, pattern) for pattern in leave}
    if idle := [_idle(pattern, paths) for pattern, matched in matches.items() if not matched]:
        raise PlanError(idle)
    gone = {path for matched in matches.values() for path in matched}
    params = {path: leaf for path, leaf in selection.params.items() if selection.root + path not in gone}
    strangers = {path: leaf for path, leaf in selection.strangers.items() if path not in gone}
    rest = dataclasses.replace(selection, params=params, strangers=strangers)
    return rest, tuple(path for path in paths if path in gone)


def _leaf_problems(path: str, leaf: Leaf) -> Iterator[Problem]:
    if not isinstance(leaf, ARRAYS):
        yield _no_array(path, leaf)
    elif (cause := _unreadable(leaf.dtype)) is not None:
        yield Problem(
            path, f"dtype {leaf.dtype}", "float32, bfloat16 or float16, in the byte order of this host", cause
        )


def _unreadable(dtype: np.dtype) -> str | None:
    """Returns the reason why JAX cannot take over an array of this dtype; None if it can."""
    if not isinstance(dtype, np.dtype):
        return "a key of a random number generator, which is no weight"
    if not dtype.isnative:
        remedy = "array.astype(array.dtype.newbyteorder('='))"
        return f"the file or machine that it comes from has another byte order: {remedy}"
    if jnp.issubdtype(dtype, np.floating):
        return None if dtype.itemsize <= 8 else "numpy's longdouble, which no accelerator has: astype(numpy.float32)"
    if jnp.issubdtype(dtype, np.integer) or dtype == np.bool_:
        return None  # may be quantised; the hook that reads it says so
    return "the array holds something else than weights, or was built from lists of unequal lengths"


def _no_parameters(found: str, cause: str) -> Problem:
    expected = "a mapping that holds the model's parameters (nnx.State, nested or flat dict), or a train state"
    return Problem("params", found, expected, cause)


def _no_array(path: str, leaf: Leaf) -> Problem:
    cause = "metadata, a framework's own tensor type, or a box that is not opened"
    if any(word in type(leaf).__name__ for word in ("QArray", "QTensor", "WithAux")):
        cause = "weights quantised by qwix or AQT: hand over the weights as they were before"
    return Problem(path, f"a {type(leaf).__name__}", "an array of JAX or numpy, or a jax.ShapeDtypeStruct", cause)


def _twice(path: str) -> Problem:
    cause = "names that are told apart by nothing but dots and slashes, or trees that were merged"
    return Problem(path, "two leaves of this path", "one", cause)


def _stranger(path: str, leaf: Leaf) -> Problem:
    return Problem(
        path,
        f"{leaf.dtype}{list(leaf.shape)} beside the parameters",
        "nothing there but an optimizer's state, a step and random state",
        "adapters, averages or a second model: hand over the parameters alone, or leave it out (leave=)",
    )


def _idle(pattern: str, paths: Sequence[str]) -> Problem:
    example = f"such as {paths[0]}" if paths else "of which there is none"
    cause = "the pattern is not of whole paths, '*' included, or the tree has no such part"
    return Problem(f"leave={pattern!r}", "no leaf that it matches", f"a pattern of whole paths, {example}", cause)
