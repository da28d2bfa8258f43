"""Data flow in programs: the inputs that each output is made of, and the steps that compute with inputs."""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from portax.trainer.layer_params import SCALED_NAME

Mark: TypeAlias = int
"""Bits that tell the sources of a value."""

ZERO: Mark = 1
"""Marks constants that are zeros; leaf `i` has the mark `leaf_mark(i)`."""

_MOVES = frozenset(
    (
        "broadcast_in_dim",
        "concatenate",
        "copy",
        "dynamic_slice",
        "dynamic_update_slice",
        "expand_dims",
        "gather",
        "optimization_barrier",
        "pad",
        "reshape",
        "rev",
        "scatter",
        "select_n",
        "slice",
        "split",
        "squeeze",
        "stack",
        "stop_gradient",
        "tile",
        "transpose",
        "unstack",
    )
)
"""Primitives that move elements and leave their bits alone."""

_MOVED = {
    "dynamic_slice": slice(1),
    "dynamic_update_slice": slice(2),
    "gather": slice(1),
    "scatter": slice(0, 3, 2),
    "select_n": slice(1, None),
}
"""The operands that are moved; the others are positions."""

_KEEP_ZERO = _MOVES | {"convert_element_type"}


def leaf_mark(i: int) -> Mark:
    """Returns the mark of one leaf."""
    return 2 << i


def is_of_leaves(mark: Mark) -> bool:
    """Tells whether a value is made of any leaf."""
    return bool(mark & ~ZERO)


def computed(program: ClosedJaxpr, marks: Iterable[Mark]) -> list[tuple[str, Mark]]:
    """Returns the steps of a program that compute with leaves, or put something else among them than zeros.

    Args:
        program: The program.
        marks: A mark for each of its inputs.

    Returns:
        What each such step is, and the joined marks of what goes into it.
    """
    found: list[tuple[str, Mark]] = []

    def visit(name: str, given: Sequence[Mark]) -> None:
        if (what := _computes(name, given)) is not None:
            found.append((what, functools.reduce(operator.or_, given, 0)))

    reached(program, marks, visit)
    return found


def _computes(name: str, given: Sequence[Mark]) -> str | None:
    """Returns what a step does beside moving leaves; None if it does nothing else, or touches none."""
    if not any(map(is_of_leaves, given)):
        return None
    if name not in _MOVES:
        return name
    moved = range(len(given))[_MOVED.get(name, slice(None))]
    if any(is_of_leaves(mark) for i, mark in enumerate(given) if i not in moved):
        return f"{name}, by its values"
    if any(not is_of_leaves(given[i]) and given[i] != ZERO for i in moved):
        return f"{name} with something else than zeros"
    return None


def inner_program(equation: Any) -> tuple[Jaxpr, int] | None:
    """Returns the program that an equation runs, and how many of its inputs are not that program's; None for others."""
    if found := _inner_programs(equation):
        programs, first = found
        return programs[-1].jaxpr, first  # one for each platform; they do the same
    return None


def _inner_programs(equation: Any) -> tuple[Sequence[ClosedJaxpr], int] | None:
    if equation.primitive.name in ("jit", "pjit") and equation.params.get("name") != SCALED_NAME:
        return (equation.params["jaxpr"],), 0
    if equation.primitive.name == "cond":
        return equation.params["branches"], 1
    return None


def reached(
    program: ClosedJaxpr, marks: Iterable[Mark], visit: Callable[[str, Sequence[Mark]], None] | None = None
) -> list[Mark]:
    """Returns the marks of a program's inputs, joined for each output in those that its value depends on.

    Args:
        program: The program.
        marks: A mark for each of its inputs.
        visit: Called with the name of each primitive, and the marks of its operands.
    """
    of: dict[Any, Mark] = dict(zip(program.jaxpr.invars, marks, strict=True))
    of |= {var: _constant(value) for var, value in zip(program.jaxpr.constvars, program.consts, strict=True)}

    def mark(atom: Any) -> Mark:
        return _constant(atom.val) if isinstance(atom, Literal) else of.get(atom, 0)

    for equation in program.jaxpr.eqns:
        given = [mark(atom) for atom in equation.invars]
        if inner := _inner_programs(equation):
            programs, first = inner
            ends = [reached(branch, given[first:], visit) for branch in programs]
            chosen = functools.reduce(operator.or_, given[:first], 0) & ~ZERO
            if visit is not None and chosen:
                visit(equation.primitive.name, given[:first])
            made = [_joined(either, True) | chosen for either in zip(*ends, strict=True)]
        else:
            name = equation.primitive.name
            if visit is not None and equation.params.get("name") != SCALED_NAME:
                visit(name, given)
            made = [_joined(given[_MOVED.get(name, slice(None))], name in _KEEP_ZERO) | _joined(given)]
            made = made * len(equation.outvars)
        of.update(zip(equation.outvars, made, strict=True))
    return [mark(atom) for atom in program.jaxpr.outvars]


def _constant(value: Any) -> Mark:
    if isinstance(value, jax.core.Tracer) or jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.extended):
        return 0
    return 0 if np.any(np.asarray(value)) else ZERO


def _joined(marks: Sequence[Mark], keeps_zero: bool = False) -> Mark:
    """Returns the mark of what is made of several values; zeros, if all of them are."""
    joined = functools.reduce(operator.or_, marks, 0)
    return joined if joined == ZERO and keeps_zero and all(marks) else joined & ~ZERO
