"""Traces hooks and layouts on shapes: the blocks of a layer, the engine's tensors, and the leaves that feed each."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from portax.config.model_config import ModelConfig
from portax.errors import LayoutError, PlanError, Problem
from portax.layouts import Layout, Tensor
from portax.planning import flow
from portax.trainer.layer_params import Axes, LayerParams, own_shape
from portax.trainer.scan import LayerGroup
from portax.weights.blocks import Block

_MOVES_ALONE = "moves alone: reshape, transpose, slice, concatenate, pad with zeros, gather"


@runtime_checkable
class Hooks(Protocol):
    """The part of a converter that tracing needs."""

    config: ModelConfig
    layout: Layout

    def global_weights(self, model: LayerParams) -> tuple[Block, ...]:
        """Returns the blocks outside the layers."""

    def layer_blocks(self, layer: LayerParams) -> tuple[Block, ...]:
        """Returns the blocks of one layer."""

    def is_engine_owned(self, name: str) -> bool:
        """Tells whether the engine fills the leaf of this name itself."""


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


@contextlib.contextmanager
def refusing_values(hooks: Hooks) -> Iterator[None]:
    """Raises a `PlanError` for hooks that ask for the values of what they read, which no trace has."""
    try:
        yield
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        cause = f"numpy, float(), bool(), int() or an if with what it has read ({type(error).__name__}): use jax.numpy"
        problem = Problem(f"the hooks of {type(hooks).__name__}", "one that asks for values", _MOVES_ALONE, cause)
        raise PlanError([problem]) from error


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

    with refusing_values(hooks):
        jaxpr = jax.make_jaxpr(run)(own, jax.ShapeDtypeStruct((), jnp.bool_))
    return HookTrace(jaxpr, tuple(blocks), tuple(seen[-1].problems), seen[-1].expected)


def trace(hooks: Hooks, group: LayerGroup) -> Trace:
    """Traces one layer of a group up to the engine's tensors; touches no weight."""
    traced = trace_hooks(hooks, group)
    problems = [*traced.problems] or _arithmetic(hooks, group, traced)
    layout = hooks.layout.for_layer(group.types)
    parts = zip(traced.jaxpr.out_avals, flow.reached(traced.jaxpr, _marks(group)), strict=True)
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
        reached += flow.reached(jaxpr, fed_by)
    sources = [_paths(group, mark) for mark in reached]
    used = frozenset().union(*sources, *(_paths(group, mark) for mark in refused))
    return Trace(tuple(tensors), tuple(sources), used, tuple(problems), traced.expected)


def _marks(group: LayerGroup) -> tuple[int, ...]:
    return *map(flow.leaf_mark, range(len(group.paths))), 0  # `zero` comes last


def _paths(group: LayerGroup, mark: int) -> tuple[str, ...]:
    return tuple(path for i, path in enumerate(group.paths) if mark & flow.leaf_mark(i))


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


_BITS = "bfloat16 comes as its bits, so "


def _arithmetic(hooks: Hooks, group: LayerGroup, traced: HookTrace) -> list[Problem]:
    """Returns problems for hooks that compute with what they read, which is right for float32 and wrong for bits.

    What a hook does may hang on the dtype (rounding, a test for NaN), so it is traced with each.
    """
    found: dict[tuple[str, str], Problem] = {}
    cause = _BITS + "arithmetic gives other numbers: use read(..., scale_shift=ScaleShift(...)); casts are the layout's"
    for program in _in_every_dtype(hooks, group, traced):
        for name, mark in flow.computed(program.jaxpr, _marks(group)):
            for path in _paths(group, mark):
                found[path, name] = Problem(path, f"a hook that computes with it ({name})", _MOVES_ALONE, cause)
        for name in _constants(program, group):
            like = "constants in the dtype of a leaf"
            found[name, like] = Problem(name, like, "float32 constants, or zeros", _BITS + "ones are no ones in it")
    return [*found.values()]


def _in_every_dtype(hooks: Hooks, group: LayerGroup, traced: HookTrace) -> Iterator[HookTrace]:
    """Yields the hooks' program as it is, and for a trainer in either of the two usual dtypes."""
    yield traced
    for dtype in (jnp.bfloat16, jnp.float32):
        if any(leaf.dtype != dtype for leaf in group.shapes):
            yield trace_hooks(hooks, group, [dtype] * len(group.paths))


def _constants(traced: HookTrace, group: LayerGroup) -> Iterator[str]:
    """Yields the names of blocks that hold constants other than zeros in the dtype of bits."""
    parts = zip(traced.jaxpr.out_avals, flow.reached(traced.jaxpr, _marks(group)), strict=True)
    for tree, name in traced.blocks:
        if any(aval.dtype == jnp.uint16 and mark == 0 for aval, mark in itertools.islice(parts, tree.num_leaves)):
            yield name
