"""The way back: a trainer's tree from the tensors that a converter makes of it."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from portax.arithmetic import Affine
from portax.errors import LayoutError, PlanError, Problem
from portax.layers import Layer, Section
from portax.leaves import Leaves
from portax.plan import Entry, Plan
from portax.tracing import Hooks

Tree: TypeAlias = dict[str, Shaped[np.ndarray, "..."]]

_BITS: dict[int, Any] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


class _Inputs(Leaves):
    """Leaves that are handed to the hooks as they are, so that what the hooks do is linear in them."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.affines: dict[str, Affine] = {}

    def read(self, path: str, axes: str, affine: Affine | None = None) -> Any:
        if affine is not None:
            self.affines[path] = affine
        return self._arrays[path]


def restore(hooks: Hooks, plan: Plan, sections: Iterable[Section], weights: Mapping[str, Any], dtype: Any) -> Tree:
    """Fills a trainer's tree.

    Nothing is written a second time: the hooks and the layout only move elements, which is linear, so the transpose of
    what they do is its inverse. Values that the hooks scale or shift are computed back, see `Affine.inverse`.

    Args:
        hooks: The converter.
        plan: A plan of these sections.
        sections: The trainer's tree, as shapes.
        weights: The tensors, by the names of the plan; read one layer at a time.
        dtype: Dtype of the leaves; None for that of the tensors.

    Returns:
        The leaves by path.

    Raises:
        PlanError: A tensor is missing, left over, or of another shape.
        LayoutError: The layout holds elements more than once, or not at all.
    """
    _check(hooks, plan, weights)
    tree: Tree = {}
    entries = iter(plan.entries)
    for section, count in zip(sections, plan.tensors_per_layer, strict=True):
        inverse = _Inverse(hooks, section)
        for layer in section.layers:
            mine = tuple(itertools.islice(entries, count))
            for path, leaf in inverse(layer, mine, weights).items():
                _put(tree, hooks.config.param_scan_axis, layer, path, leaf if dtype is None else leaf.astype(dtype))
    return tree


class _Inverse:
    """From the tensors of one layer to its leaves, for all layers of one section."""

    def __init__(self, hooks: Hooks, section: Section):
        self._affines: dict[str, Affine] = {}
        self._own: list[bool] = []  # tensors that are no copies of others
        kind, axis = section.kind, hooks.config.param_scan_axis

        def forward(leaves: dict[str, Any]) -> list[Any]:
            inputs = _Inputs(leaves, hooks.config, traits=kind.traits)
            blocks = hooks.global_weights(inputs) if kind.is_global else hooks.layer_blocks(inputs)
            tensors = [tensor for block in blocks for tensor in hooks.layout.arrange(block)]
            self._affines, self._own = inputs.affines, [tensor.tied_to is None for tensor in tensors]
            return [tensor.array for tensor in tensors if tensor.tied_to is None]

        def own(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape[:axis] + shape[axis + len(kind.scan) :], jnp.uint32)

        layer = section.layers[0]
        shapes = {path: own(layer.leaves[path].shape) for path in kind.paths}
        self._backward = jax.jit(lambda bits: jax.linear_transpose(forward, shapes)(bits)[0])
        self._shapes = jax.eval_shape(forward, shapes)
        self._check_once(section)

    def __call__(self, layer: Layer, entries: tuple[Entry, ...], weights: Mapping[str, Any]) -> Tree:
        entries = tuple(itertools.compress(entries, self._own))
        types = _types(entries, weights)
        bits = []
        for entry in entries:
            tensor = np.asarray(weights[entry.name][...]).astype(types[entry.name], copy=False)
            bits.append(tensor.view(_BITS[tensor.dtype.itemsize]).astype(np.uint32))
        leaves = {}
        for path, leaf in self._backward(bits).items():
            dtype = types[layer.path(path)]
            leaf = np.asarray(leaf).astype(_BITS[dtype.itemsize]).view(dtype)
            leaves[path] = self._affines[path].inverse(leaf) if path in self._affines else leaf
        return leaves

    def _check_once(self, section: Section) -> None:
        """Raises a `LayoutError` unless every element of every leaf is held exactly once."""
        counts = self._backward([np.ones(shape.shape, np.uint32) for shape in self._shapes])
        wrong = [section.names(path) for path, count in counts.items() if not (np.asarray(count) == 1).all()]
        if wrong:
            raise LayoutError(
                f"{', '.join(wrong)}: this layout holds some elements several times, or not at all, so the tree cannot "
                "be read back from it; restore from HuggingFace() or Canonical()"
            )


def _types(entries: Iterable[Entry], weights: Mapping[str, Any]) -> dict[str, Any]:
    """The dtype of every tensor, and of every leaf: the one that holds the values of all tensors it is made of."""
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


def _put(tree: Tree, axis: int, layer: Layer, path: str, leaf: Shaped[np.ndarray, "..."]) -> None:
    full = layer.path(path)
    if not layer.scan:
        tree[full] = leaf
        return
    if full not in tree:
        tree[full] = np.empty((*leaf.shape[:axis], *layer.scan, *leaf.shape[axis:]), leaf.dtype)
    tree[full][(slice(None),) * axis + layer.position] = leaf


def _check(hooks: Hooks, plan: Plan, weights: Mapping[str, Any]) -> None:
    """Raises a `PlanError` unless the tensors are those of the plan, but for such as the trainer has nothing for."""
    problems = []
    expected = {entry.name: entry for entry in plan.entries}
    for name, entry in expected.items():
        if name not in weights:
            cause = "the checkpoint is of another model, or the config does not describe it"
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
        if name not in expected and not hooks.layout.owns(name) and not _repeats(name, outside, weights):
            cause = "the config describes another model (tied or untied, dense or MoE), or these are adapters"
            problems.append(Problem(name, "a tensor that no leaf needs", "only tensors of this model", cause))
    if problems:
        raise PlanError(problems)


def _repeats(name: str, entries: Iterable[Entry], weights: Mapping[str, Any]) -> bool:
    """Whether a tensor is a copy of one outside the layers: a tied head that was saved all the same."""
    same = [entry.name for entry in entries if entry.shape == tuple(weights[name].shape) and entry.name in weights]
    return any(_bytes(weights[name]) == _bytes(weights[other]) for other in same)


def _bytes(array: Any) -> bytes:
    return np.asarray(array[...]).tobytes()
