"""From a section of the trainer's tree to the engine's tensors: for real inside a program, or abstractly in a plan."""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, Shaped

from portax.config.model_config import ModelConfig
from portax.errors import LayoutError, Problem
from portax.layouts import Layout, Place, Tensor, nowhere
from portax.trainer.layer_params import Axes, LayerParams
from portax.trainer.scan import Kind, Section
from portax.weights.blocks import Block


@runtime_checkable
class Hooks(Protocol):
    """What tracing needs of a converter."""

    config: ModelConfig
    layout: Layout

    def global_weights(self, model: LayerParams) -> tuple[Block, ...]:
        """Blocks outside the layers."""

    def layer_blocks(self, layer: LayerParams) -> tuple[Block, ...]:
        """Blocks of one layer."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one section turns into, from shapes alone.

    Attributes:
        tensors: The engine's tensors of one layer; their arrays are `jax.ShapeDtypeStruct`s.
        sources: For each tensor, the trainer leaves that its values come from, relative to the layer.
        used: All leaves that any block holds, those of refused blocks included.
        problems: What is wrong; leaves are named relative to the layer.
        expected: Axes of every leaf that a hook has asked for, relative to the layer.
    """

    tensors: tuple[Tensor, ...]
    sources: tuple[tuple[str, ...], ...]
    used: frozenset[str]
    problems: tuple[Problem, ...]
    expected: Mapping[str, Axes]


def lower(
    hooks: Hooks, leaves: LayerParams, *, is_global: bool, place: Place = nowhere
) -> tuple[tuple[Tensor, ...], tuple[Shaped[Array, "..."], ...]]:
    """Asks the hooks what the leaves are, and the layout how the engine holds that.

    Args:
        hooks: The converter.
        leaves: The leaves of one layer, or of the model outside its layers.
        is_global: Which of the two.
        place: Puts an array where it belongs; see `Layout.lower`.

    Returns:
        The engine's tensors, and the arrays that the layout refuses; why is recorded in `leaves.problems`.
    """
    tensors: list[Tensor] = []
    refused: list[Shaped[Array, "..."]] = []
    layout = hooks.layout.for_layer(leaves.types)
    for block in hooks.global_weights(leaves) if is_global else hooks.layer_blocks(leaves):
        try:
            tensors += layout.lower(block, place)
        except LayoutError as error:
            refused += [leaf for leaf in jax.tree.leaves(block) if isinstance(leaf, jax.Array)]
            leaves.problems.append(
                Problem(
                    getattr(block, "name", type(block).__name__),
                    str(error),
                    error.expected or f"sizes that {type(hooks.layout).__name__} can cut",
                    error.cause or "this tensor-parallel size does not fit this model",
                )
            )
    return tuple(tensors), tuple(refused)


def layer_leaves(
    hooks: Hooks,
    kind: Kind,
    arrays: tuple[Any, ...],
    position: Int[Array, " depth"],
    shardings: Mapping[str, NamedSharding] | None = None,
) -> LayerParams:
    """One layer as its hooks see it, given its arrays and its place in their stack."""
    by_path = dict(zip(kind.paths, arrays, strict=True))
    return LayerParams(by_path, hooks.config, types=kind.types, scan=kind.scan, position=position, shardings=shardings)


def trace(hooks: Hooks, section: Section) -> Trace:
    """Runs the hooks on shapes; no weight is touched."""
    kind = section.kind
    problems: list[Problem] = []
    expected: dict[str, Axes] = {}

    def one_layer(arrays, position):
        leaves = layer_leaves(hooks, kind, arrays, position)
        held = lower(hooks, leaves, is_global=kind.is_global)
        problems.extend(leaves.problems)
        expected.update(leaves.expected)
        return held

    shapes = tuple(
        jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
        for leaf in section.arrays(section.layers[0])
    )
    position = jax.ShapeDtypeStruct((max(len(kind.scan), 1),), jnp.int32)
    jaxpr, (tensors, _) = jax.make_jaxpr(one_layer, return_shape=True)(shapes, position)
    marks = [*(1 << i for i in range(len(kind.paths))), 0]  # the position comes last
    reached = _reached(jaxpr.jaxpr, marks)
    sources = [tuple(path for path, bit in zip(kind.paths, marks, strict=False) if bit & mark) for mark in reached]
    used = frozenset().union(*sources)
    return Trace(tensors, tuple(sources[: len(tensors)]), used, tuple(problems), expected)


def _reached(jaxpr: Jaxpr, marks: Iterable[int]) -> list[int]:
    """The bits that mark a program's inputs, joined for each output in those that its value depends on."""
    of: dict[Any, int] = dict(zip(jaxpr.invars, marks, strict=True))

    def mark(atom: Any) -> int:
        return 0 if isinstance(atom, Literal) else of.get(atom, 0)

    for equation in jaxpr.eqns:
        given = [mark(atom) for atom in equation.invars]
        if equation.primitive.name in ("jit", "pjit"):
            made = _reached(equation.params["jaxpr"].jaxpr, given)
        else:
            made = [functools.reduce(operator.or_, given, 0)] * len(equation.outvars)
        of.update(zip(equation.outvars, made, strict=True))
    return [mark(atom) for atom in jaxpr.outvars]
