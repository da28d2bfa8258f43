"""Traces hooks and layouts on shapes: the blocks of a layer, the engine's tensors, and the leaves that feed each."""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from portax.config.model_config import ModelConfig
from portax.errors import LayoutError, Problem
from portax.layouts import Layout, Tensor
from portax.trainer.layer_params import SCALED_NAME, Axes, LayerParams, own_shape
from portax.trainer.scan import LayerGroup
from portax.weights.blocks import Block

_MOVES = frozenset(
    (
        "bitcast_convert_type",
        "broadcast_in_dim",
        "concatenate",
        "copy",
        "dynamic_slice",
        "dynamic_update_slice",
        "expand_dims",
        "gather",
        "pad",
        "reshape",
        "rev",
        "scatter",
        "select_n",
        "slice",
        "split",
        "squeeze",
        "transpose",
    )
)
"""Primitives that move elements and leave their bits alone."""

_ZERO = 1
"""Marks constants that are zeros; leaf `i` of a group has the mark `2 << i`."""

_KEEP_ZERO = frozenset(("broadcast_in_dim", "convert_element_type", "copy", "reshape"))


@runtime_checkable
class Hooks(Protocol):
    """The part of a converter that tracing needs."""

    config: ModelConfig
    layout: Layout

    def global_weights(self, model: LayerParams) -> tuple[Block, ...]:
        """Returns the blocks outside the layers."""

    def layer_blocks(self, layer: LayerParams) -> tuple[Block, ...]:
        """Returns the blocks of one layer."""


@dataclasses.dataclass(frozen=True, eq=False)
class HookTrace:
    """A group's hooks as a program: from the layer's own leaves to the arrays of its blocks.

    Attributes:
        jaxpr: Takes the leaves in the order of the group's paths, and `zero`; returns the arrays of all blocks.
        blocks: The structure of each block, and its name.
        problems: Everything that is wrong; leaves are named relative to the layer.
        expected: Axes of every leaf that a hook has read, relative to the layer.
    """

    jaxpr: ClosedJaxpr
    blocks: tuple[tuple[Any, str], ...]
    problems: tuple[Problem, ...]
    expected: Mapping[str, Axes]

    def __call__(self, values: Sequence[Any], zero: Any) -> tuple[Block, ...]:
        """Returns the blocks of these values; for tracing."""
        arrays = iter(jax.core.eval_jaxpr(self.jaxpr.jaxpr, self.jaxpr.consts, *values, zero))
        return tuple(jax.tree.unflatten(tree, itertools.islice(arrays, tree.num_leaves)) for tree, _ in self.blocks)


@dataclasses.dataclass(frozen=True)
class Trace:
    """The engine's tensors of one layer of a group, from shapes alone.

    Attributes:
        tensors: Their arrays are `jax.ShapeDtypeStruct`s.
        sources: For each tensor, the trainer leaves that its values come from, relative to the layer.
        used: All leaves that any block holds, those of refused blocks included.
        problems: Everything that is wrong; leaves are named relative to the layer.
        expected: Axes of every leaf that a hook has read, relative to the layer.
    """

    tensors: tuple[Tensor, ...]
    sources: tuple[tuple[str, ...], ...]
    used: frozenset[str]
    problems: tuple[Problem, ...]
    expected: Mapping[str, Axes]


def trace_hooks(hooks: Hooks, group: LayerGroup, dtypes: Sequence[Any] | None = None) -> HookTrace:
    """Runs a group's hooks on shapes; touches no weight.

    Args:
        hooks: The converter.
        group: The layers.
        dtypes: Dtypes of the leaves; None for those that the group's shapes have.
    """
    shapes = group.shapes
    dtypes = [jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in shapes] if dtypes is None else dtypes
    own = [
        jax.ShapeDtypeStruct(own_shape(tuple(leaf.shape), axis, group.scan), _bits_dtype(dtype))
        for leaf, axis, dtype in zip(shapes, group.scan_axes, dtypes, strict=True)
    ]
    seen: list[LayerParams] = []
    blocks: list[tuple[Any, str]] = []

    def run(values: Sequence[Any], zero: Any) -> list[Any]:
        params = LayerParams(
            dict(zip(group.paths, values, strict=True)),
            hooks.config,
            types=group.types,
            stacks=dict(zip(group.paths, shapes, strict=True)),
            scan=group.scan,
            scan_axis=group.scan_axis,
            zero=zero,
        )
        seen.append(params)
        found = hooks.global_weights(params) if group.is_global else hooks.layer_blocks(params)
        odd = [block for block in found if not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(block))]
        params.problems += [_refusal(hooks.layout, _name(block), hooks.layout.unknown(block)) for block in odd]
        found = tuple(block for block in found if block not in odd)
        blocks[:] = [(jax.tree.structure(block), _name(block)) for block in found]
        return jax.tree.leaves(found)

    jaxpr = jax.make_jaxpr(run)(own, jax.ShapeDtypeStruct((), jnp.bool_))
    return HookTrace(jaxpr, tuple(blocks), tuple(seen[-1].problems), seen[-1].expected)


def trace(hooks: Hooks, group: LayerGroup) -> Trace:
    """Traces one layer of a group up to the engine's tensors; touches no weight."""
    traced = trace_hooks(hooks, group)
    problems = [*traced.problems] or _arithmetic(hooks, group, traced)
    layout = hooks.layout.for_layer(group.types)
    parts = zip(traced.jaxpr.out_avals, _reached(traced.jaxpr.jaxpr, _marks(group)), strict=True)
    tensors: list[Tensor] = []
    reached: list[int] = []
    refused: list[int] = []
    for tree, name in traced.blocks:
        of_block = [*itertools.islice(parts, tree.num_leaves)]
        fed_by = [mark for _, mark in of_block]
        try:
            jaxpr, made = _lowered(layout, tree, [aval for aval, _ in of_block])
        except LayoutError as error:
            refused += fed_by
            problems.append(_refusal(layout, name, error))
            continue
        tensors += made
        reached += _reached(jaxpr.jaxpr, fed_by)
    sources = [_paths(group, mark) for mark in reached]
    used = frozenset().union(*sources, *(_paths(group, mark) for mark in refused))
    return Trace(tuple(tensors), tuple(sources), used, tuple(problems), traced.expected)


def _marks(group: LayerGroup) -> tuple[int, ...]:
    return *(2 << i for i in range(len(group.paths))), 0  # `zero` comes last


def _paths(group: LayerGroup, mark: int) -> tuple[str, ...]:
    return tuple(path for i, path in enumerate(group.paths) if mark & 2 << i)


def _lowered(layout: Layout, tree: Any, avals: Sequence[Any]) -> tuple[ClosedJaxpr, tuple[Tensor, ...]]:
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    return jax.make_jaxpr(lambda *parts: layout.lower(jax.tree.unflatten(tree, parts)), return_shape=True)(*shapes)


def _refusal(layout: Layout, name: str, error: LayoutError) -> Problem:
    return Problem(
        name,
        str(error),
        error.expected or f"sizes that {type(layout).__name__} can cut",
        error.cause or "this tensor-parallel size does not fit this model",
    )


def _name(block: Any) -> str:
    return getattr(block, "name", type(block).__name__)


def _bits_dtype(dtype: Any) -> Any:
    return jnp.uint16 if dtype == jnp.bfloat16 else dtype


def _arithmetic(hooks: Hooks, group: LayerGroup, traced: HookTrace) -> list[Problem]:
    """Returns problems for hooks that compute with the values they read, which is wrong for raw bits."""
    if any(leaf.dtype != jnp.bfloat16 for leaf in group.shapes):  # another dtype may hide a cast to it
        traced = trace_hooks(hooks, group, [jnp.bfloat16] * len(group.paths))
    found: dict[tuple[str, str], Problem] = {}
    for name, mark in _computed(traced.jaxpr.jaxpr, _marks(group)):
        for path in _paths(group, mark):
            found[path, name] = Problem(
                path,
                f"a hook that computes with it ({name})",
                "moves alone: reshape, transpose, slice, concatenate, pad with zeros, gather",
                "bfloat16 comes as its bits, so arithmetic gives other numbers: pass read(..., scale_shift="
                "ScaleShift(...)), and leave casts to the layout",
            )
    return [*found.values()]


def _computed(jaxpr: Jaxpr, marks: Iterable[int]) -> list[tuple[str, int]]:
    """Returns the primitives that compute with marked inputs, and the marks of those inputs."""
    computed: list[tuple[str, int]] = []

    def visit(equation: Any, given: list[int]) -> None:
        name = equation.primitive.name
        if name == "pad" and given[1] != _ZERO:
            name = "pad with something else than zeros"
        if any(mark & ~_ZERO for mark in given) and name not in _MOVES:
            computed.append((name, functools.reduce(operator.or_, given, 0)))

    _reached(jaxpr, marks, visit)
    return computed


def inner_program(equation: Any) -> tuple[Jaxpr, int] | None:
    """Returns the program that an equation runs, and the number of inputs in front of its own; None for others."""
    if equation.primitive.name in ("jit", "pjit") and equation.params.get("name") != SCALED_NAME:
        return equation.params["jaxpr"].jaxpr, 0
    if equation.primitive.name == "cond":  # one for each platform; they do the same
        return equation.params["branches"][-1].jaxpr, 1
    return None


def _reached(jaxpr: Jaxpr, marks: Iterable[int], visit: Any = None) -> list[int]:
    """Returns the marks of the inputs that each output's value depends on."""
    of: dict[Any, int] = dict(zip(jaxpr.invars, marks, strict=True))

    def mark(atom: Any) -> int:
        if isinstance(atom, Literal):
            return _ZERO if not np.any(atom.val) else 0
        return of.get(atom, 0)

    for equation in jaxpr.eqns:
        given = [mark(atom) for atom in equation.invars]
        if inner := inner_program(equation):
            program, first = inner
            made = _reached(program, given[first:], visit)
        else:
            if visit is not None and equation.params.get("name") != SCALED_NAME:
                visit(equation, given)
            joined = functools.reduce(operator.or_, given, 0)
            is_zero = joined == _ZERO and equation.primitive.name in _KEEP_ZERO
            made = [joined if is_zero else joined & ~_ZERO] * len(equation.outvars)
        of.update(zip(equation.outvars, made, strict=True))
    return [mark(atom) for atom in jaxpr.outvars]
