"""Restoration: a trainer's tree from the tensors that a converter makes of it."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from portax.config.model_config import ModelConfig
from portax.errors import LayoutError, PlanError, Problem
from portax.planning.jax_context import each_in_own_context, fetch
from portax.planning.plan import Entry, Plan
from portax.planning.trace import Hooks
from portax.trainer.layer_params import LayerParams, own_shape
from portax.trainer.scan import LayerGroup, LayerSlice
from portax.weights.scale_shift import ScaleShift

Tree: TypeAlias = dict[str, Shaped[np.ndarray, "..."]]

_BITS: dict[int, Any] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


class _Inputs(LayerParams):
    """Parameters that reach the hooks unchanged, so that the hooks are linear in them."""

    def __init__(self, values: Mapping[str, Any], config: ModelConfig, types: frozenset[str]):
        super().__init__(values, config, types=types)
        self.scale_shifts: dict[str, ScaleShift] = {}

    def read(self, path: str, axes: str, scale_shift: ScaleShift | None = None) -> Any:
        if scale_shift is not None:
            self.scale_shifts[path] = scale_shift
        return self._values[path]


class Restoration:
    """A planned restoration of a trainer's tree, to run layer by layer.

    No inverse is written by hand: hooks and layout only move elements, which is linear; the transpose is the inverse.
    Values that the hooks scale or shift are computed back, see `ScaleShift.inverse`.

    Attributes:
        leaves: Shape and dtype of every leaf of the trainer's tree, by path. A stack has the dtype that holds the
            values of all its layers.
        scan_axes: The axes of each leaf that count layers.
    """

    def __init__(self, hooks: Hooks, plan: Plan, groups: Sequence[LayerGroup], weights: Mapping[str, Any], dtype: Any):
        """Checks the tensors; reads none, unless there are more than the plan has.

        Args:
            hooks: The converter.
            plan: A plan of these groups.
            groups: The trainer's tree, as shapes.
            weights: The tensors, by the names of the plan; read one layer at a time.
            dtype: Dtype of the leaves; None for that of the tensors.

        Raises:
            PlanError: A tensor is missing, left over, or of another shape.
        """
        _check(hooks, plan, weights)
        self._hooks, self._plan, self._groups, self._weights = hooks, plan, groups, weights
        self._types = _types(plan.entries, weights)
        self.leaves: dict[str, jax.ShapeDtypeStruct] = {}
        self.scan_axes: dict[str, tuple[int, ...]] = {}
        for group, layer in ((each, layer) for each in groups for layer in each.layers):
            for relative, leaf in layer.leaves.items():
                path, first = layer.path(relative), group.scan_axis(relative)
                self.leaves[path] = jax.ShapeDtypeStruct(leaf.shape, self._types[path] if dtype is None else dtype)
                self.scan_axes[path] = tuple(range(first, first + len(layer.scan)))

    def __iter__(self) -> Iterator[tuple[LayerSlice, Tree]]:
        """Yields each layer, and its own part of its leaves by full path.

        Raises:
            LayoutError: The layout holds some elements more than once, or not at all; before the first layer.
        """
        return each_in_own_context(self._restored())

    def _restored(self) -> Iterator[tuple[LayerSlice, Tree]]:
        inverses = [_Inverse(self._hooks, group) for group in self._groups]
        entries = iter(self._plan.entries)
        for inverse, group, count in zip(inverses, self._groups, self._plan.tensors_per_layer, strict=True):
            for layer in group.layers:
                mine = tuple(itertools.islice(entries, count))
                leaves = inverse(layer, mine, self._weights, self._types)
                yield layer, {path: leaf.astype(self.leaves[path].dtype, copy=False) for path, leaf in leaves.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self.leaves.values())

    def at(self, layer: LayerSlice, path: str) -> Any:
        """Returns the place of a layer in one of its leaves, as an index."""
        return layer.at(min(self.scan_axes[path], default=0)) or ...

    def tree(self) -> Tree:
        """Returns all leaves, in memory."""
        tree = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in self.leaves.items()}
        for layer, leaves in self:
            for path, leaf in leaves.items():
                tree[path][self.at(layer, path)] = leaf
        return tree


class _Inverse:
    """The inverse of one group's programs: from the tensors of a layer to its leaves."""

    def __init__(self, hooks: Hooks, group: LayerGroup):
        self._scale_shifts: dict[str, ScaleShift] = {}
        self._own: list[bool] = []  # tensors that are no copies of others

        def forward(leaves: dict[str, Any]) -> list[Any]:
            inputs = _Inputs(leaves, hooks.config, group.types)
            blocks = hooks.global_weights(inputs) if group.is_global else hooks.layer_blocks(inputs)
            tensors = [tensor for block in blocks for tensor in hooks.layout.pack(block)]
            self._scale_shifts, self._own = inputs.scale_shifts, [tensor.tied_to is None for tensor in tensors]
            return [tensor.array for tensor in tensors if tensor.tied_to is None]

        shapes = {
            path: jax.ShapeDtypeStruct(own_shape(tuple(leaf.shape), axis, group.scan), jnp.uint32)
            for path, leaf, axis in zip(group.paths, group.shapes, group.scan_axes, strict=True)
        }
        self._backward = jax.jit(lambda bits: jax.linear_transpose(forward, shapes)(bits)[0])
        self._shapes = jax.eval_shape(forward, shapes)
        self._check_once(group)

    def __call__(
        self, layer: LayerSlice, entries: tuple[Entry, ...], weights: Mapping[str, Any], types: Mapping[str, Any]
    ) -> Tree:
        bits = []
        for entry in itertools.compress(entries, self._own):
            tensor = _host(weights[entry.name]).astype(types[entry.name], copy=False)
            bits.append(tensor.view(_BITS[tensor.dtype.itemsize]).astype(np.uint32))
        leaves = {}
        for path, leaf in self._on_host(bits).items():
            dtype = types[layer.path(path)]
            leaf = leaf.astype(_BITS[dtype.itemsize]).view(dtype)
            leaves[layer.path(path)] = self._scale_shifts[path].inverse(leaf) if path in self._scale_shifts else leaf
        return leaves

    def _on_host(self, bits: list[np.ndarray]) -> dict[str, np.ndarray]:
        with jax.transfer_guard("allow"):  # host arrays go in and come out, also where a trainer forbids transfers
            return {path: np.asarray(leaf) for path, leaf in self._backward(bits).items()}

    def _check_once(self, group: LayerGroup) -> None:
        """Raises a `LayoutError` unless every element of every leaf is held exactly once."""
        counts = self._on_host([np.ones(shape.shape, np.uint32) for shape in self._shapes])
        wrong = [group.names(path) for path, count in counts.items() if not (count == 1).all()]
        if wrong:
            raise LayoutError(
                f"{', '.join(wrong)}: this layout holds some elements several times, or not at all, so the tree cannot "
                "be read back from it; restore from HuggingFace() or Canonical()"
            )


def _types(entries: Iterable[Entry], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the dtype of every tensor, and of every leaf: one that holds the values of all its tensors."""
    types: dict[str, Any] = {entry.name: np.dtype(weights[entry.name].dtype) for entry in entries}
    links = [(entry.name, source) for entry in entries for source in entry.sources]
    changed = True
    while changed:
        changed = False
        for name, source in links:
            wide = jnp.promote_types(types[name], types.get(source, types[name]))
            changed |= types.get(source) != wide or types[name] != wide
            types[name] = types[source] = wide
    return types


def _check(hooks: Hooks, plan: Plan, weights: Mapping[str, Any]) -> None:
    """Raises a `PlanError` unless the tensors are those of the plan, apart from those that no trainer has."""
    problems = []
    expected = {entry.name: entry for entry in plan.entries}
    for name, entry in expected.items():
        if name not in weights:
            cause = "the checkpoint is of another model, or the config does not describe it"
            if f"{name}_blocks" in weights:
                cause = f"a checkpoint in mxfp4 ({name}_blocks and _scales): dequantise it to bfloat16 first"
            problems.append(Problem(name, "nothing", f"a tensor of shape {list(entry.shape)}", cause))
            continue
        shape, dtype = tuple(weights[name].shape), np.dtype(weights[name].dtype)
        if shape != entry.shape:
            cause = "the config is of another size"
            problems.append(Problem(name, f"shape {list(shape)}", str(list(entry.shape)), cause))
        elif not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize not in _BITS:
            cause = "a quantised checkpoint: take the unquantised one"
            problems.append(Problem(name, f"dtype {dtype}", "float32, bfloat16 or float16", cause))
    outside = plan.entries[: plan.tensors_per_layer[0]]
    for name in weights:
        if name not in expected and not hooks.is_engine_owned(name) and not _repeats(name, outside, weights):
            cause = "the config describes another model (tied or untied, dense or MoE), or these are adapters"
            problems.append(Problem(name, "a tensor that no leaf needs", "only tensors of this model", cause))
    if problems:
        raise PlanError(problems)


def _repeats(name: str, entries: Iterable[Entry], weights: Mapping[str, Any]) -> bool:
    """Tells whether a tensor is a copy of one outside the layers: a tied head that was saved all the same."""
    same = [entry.name for entry in entries if entry.shape == tuple(weights[name].shape) and entry.name in weights]
    return any(_bytes(weights[name]) == _bytes(weights[other]) for other in same)


def _host(array: Any) -> np.ndarray:
    return np.asarray(fetch(array) if isinstance(array, jax.Array) else array[...])


def _bytes(array: Any) -> bytes:
    return _host(array).tobytes()
