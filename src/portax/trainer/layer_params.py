"""`LayerParams`: one layer's parameters as its hooks see them, read by path and checked against the config."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

from portax.config.model_config import ModelConfig
from portax.errors import Problem
from portax.trainer.padding import Padding, padding_of
from portax.weights import bits
from portax.weights.scale_shift import ScaleShift

Axes: TypeAlias = tuple[tuple[str, int], ...]
"""The config's name of each axis of a leaf, `layers` for a scan axis, and its size."""

Shape: TypeAlias = tuple[int, ...]


class LayerParams:
    """The trainer's parameters of one layer, or of the model outside its layers.

    Reading one states what it must be: `layer.read("mlp/wo/kernel", "mlp_dim emb_dim")`. A leaf that is missing or of
    another shape or dtype is recorded in `problems` and read as something of the right shape, so that one pass over all
    hooks finds everything that is wrong; nothing runs while there are problems.

    Attributes:
        config: The model's configuration, with the sizes of the axes.
        problems: All problems found so far; leaves are named relative to the layer.
        expected: Axes, in the trainer's form, of every leaf that has been read.
        types: The layer's types, as the config says: e.g. `{"full_attention"}`.

    Example:
        >>> layer = LayerParams({"mlp/wo/kernel": jnp.ones((128, 32))}, portax.read_config(config))
        >>> layer.read("mlp/wo/kernel", "mlp_dim emb_dim").shape, layer.problems[0].found
        ((128, 64), 'shape [128, 32]')
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        config: ModelConfig,
        *,
        types: frozenset[str] = frozenset(),
        stacks: Mapping[str, Any] | None = None,
        scan: Shape = (),
        scan_axis: Callable[[str], int] | None = None,
        zero: Bool[Array, ""] | bool = False,
    ):
        """Makes a view.

        Args:
            values: This layer's own slice of each leaf, by path relative to the layer; bfloat16 as its bits.
            config: The model's configuration.
            types: The layer's types.
            stacks: The trainer's leaves that the values are slices of, or their shapes; None where they are the values.
            scan: Size of each scan axis of the stacks.
            scan_axis: First scan axis of a stacked leaf, by its path; None for `config.param_scan_axis`.
            zero: False, as an argument of the program; see `bits.pin_bits`.
        """
        self.config = config
        self.types = types
        self.problems: list[Problem] = []
        self.expected: dict[str, Axes] = {}
        self._values = values
        self._stacks = values if stacks is None else stacks
        self._scan = scan
        self._scan_axis = scan_axis or (lambda _: config.param_scan_axis)
        self._zero = zero

    def __contains__(self, path: str) -> bool:
        """Tells whether the tree has this leaf; the config must permit whatever that decides."""
        return path in self._stacks

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all leaves in the tree."""
        return tuple(self._stacks)

    def take(self, path: str) -> Shaped[Array, "..."]:
        """Takes one leaf of this layer, to move it without knowing what it means; bfloat16 as its bits, no padding.

        Args:
            path: Path of a leaf that the tree has.
        """
        stack, at = self._stacks[path], self._scan_axis(path)
        expected = (*stack.shape[:at], *self._scan, *stack.shape[at + len(self._scan) :])
        if problem := _problem(path, stack, expected, f"of a stack of {list(self._scan)} layers on axis {at}"):
            self.problems.append(problem)
            return _in_place_of(self._values[path], own_shape(expected, at, self._scan))
        return self._without_padding(path)

    def read(self, path: str, axes: str, scale_shift: ScaleShift | None = None) -> Shaped[Array, "..."]:
        """Reads one leaf of this layer, without its scan axes.

        bfloat16 comes as its bits, `uint16`: move it as you like (reshape, transpose, slice, concatenate), and change
        values by `scale_shift` alone. A plan refuses any other arithmetic.

        Args:
            path: Path relative to the layer, e.g. `self_attention/query/kernel`.
            axes: The config's names of the axes, e.g. `emb_dim num_query_heads 2*head_dim`.
            scale_shift: Makes the hub's values of the trainer's, if they differ.

        Example:
            >>> layer = LayerParams({"mlp/wo/kernel": jnp.ones((128, 64))}, portax.read_config(config))
            >>> layer.read("mlp/wo/kernel", "mlp_dim emb_dim").shape
            (128, 64)
        """
        names = axes.split()
        shape = tuple(self.config.size(name) for name in names)
        at = self._scan_axis(path)
        sized = [*zip(names, shape, strict=True)]
        sized[at:at] = [("layers", size) for size in self._scan]
        self.expected[path] = tuple(sized)
        labels = [f"{name}={size}" for name, size in sized]
        kind = f" in a {', '.join(sorted(self.types))} layer" if self.types else ""
        stack = self._stacks.get(path)
        expected = tuple(size for _, size in sized)
        if padding := self._padding(path):
            expected = padding.stacked(at, len(self._scan)).held_shape(expected)
        if problem := _problem(path, stack, expected, f"[{', '.join(labels)}]{kind}"):
            self.problems.append(problem)
            return _in_place_of(None if stack is None else self._values[path], shape)
        value = self._without_padding(path)
        return value if scale_shift is None else scaled(scale_shift, value, self._zero)

    def _padding(self, path: str) -> Padding | None:
        stack = self._stacks.get(path)
        if stack is None:
            return None
        return padding_of(path, own_shape(tuple(stack.shape), self._scan_axis(path), self._scan), self.config)

    def _without_padding(self, path: str) -> Shaped[Array, "..."]:
        padding = self._padding(path)
        return self._values[path] if padding is None else padding.cut(self._values[path])


def own_shape(shape: Shape, scan_axis: int, scan: Shape) -> Shape:
    """Returns the shape of one layer's slice of a stack; a leaf with too few axes keeps its own."""
    if len(shape) < scan_axis + len(scan):
        return shape
    return shape[:scan_axis] + shape[scan_axis + len(scan) :]


def scaled(scale_shift: ScaleShift, value: Shaped[Array, "..."], zero: Any) -> Shaped[Array, "..."]:
    """Applies a `ScaleShift`, under a name by which a plan tells it from any other arithmetic."""
    return _SCALED(scale_shift, value, zero)


def _scale_shift(scale_shift: ScaleShift, value: Any, zero: Any) -> Any:
    return bits.pin_bits(scale_shift(value), jnp.asarray(zero))


_SCALED = jax.jit(_scale_shift, static_argnums=0)
SCALED_NAME = _scale_shift.__name__
"""Name of the jitted function in a jaxpr."""


def _in_place_of(value: Any, shape: Shape) -> Shaped[Array, "..."]:
    """Returns an array of this shape that depends on the value, so that a trace shows what it feeds."""
    if value is None or not math.prod(value.shape):
        return jnp.zeros(shape, jnp.float32)
    kept = value if value.dtype == jnp.uint16 or jnp.issubdtype(value.dtype, jnp.floating) else value.astype(np.float32)
    return jnp.broadcast_to(kept.reshape(-1)[:1].reshape(()), shape)


def _problem(path: str, leaf: Any, expected: Shape, labels: str) -> Problem | None:
    if leaf is None:
        return Problem(
            path,
            "nothing",
            f"a leaf of shape {labels}",
            "the tree is of another model or MaxText version, or the config does not describe it",
        )
    if tuple(leaf.shape) != expected:
        return Problem(
            path,
            f"shape {list(leaf.shape)}",
            f"{list(expected)} = {labels}",
            "the config is of another size, or param_scan_axis or scan_layers differs from the trainer's",
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize == 1:
        return Problem(
            path,
            f"dtype {leaf.dtype}",
            "float32, bfloat16 or float16",
            "a trainer or checkpoint that is quantised or packed: dequantise it, its scales are not converted",
        )
    return None
