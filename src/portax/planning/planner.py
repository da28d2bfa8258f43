"""Makes a plan and checks it both ways: trainer against hooks, and layout against a live engine."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from portax._text.names import fold, fold_key, numbers
from portax._text.tables import plural
from portax.config.model_config import ModelConfig
from portax.errors import PlanError, Problem
from portax.layouts import Layout, Tensor
from portax.planning import causes
from portax.planning.plan import PROGRAMS_IN_FLIGHT, Entry, Plan, axes_of, spec_text
from portax.planning.trace import Hooks, Trace, trace
from portax.trainer.flatten import Leaf
from portax.trainer.padding import padded_leaves
from portax.trainer.param_tree import ParamTree
from portax.trainer.scan import LayerGroup

_OTHER_ENGINE = "the engine runs another model, module_prefix, version or implementation than the layout says"


def make_plan(
    hooks: Hooks,
    module_prefix: str,
    tree: ParamTree,
    groups: Sequence[LayerGroup],
    *,
    target: Mapping[str, Leaf] | None,
    strict_dtype: bool,
) -> Plan:
    """Plans a conversion and checks it both ways.

    Args:
        hooks: The converter.
        module_prefix: The module around the engine's language model.
        tree: The trainer's tree.
        groups: The tree's groups.
        target: The engine's leaves by name (arrays or shapes), if they are known.
        strict_dtype: True makes a cast that loses precision a problem.

    Raises:
        PlanError: Leaves are missing, left over, or of another shape or dtype. Lists all of them.
    """
    traces = [(group, trace(hooks, group)) for group in groups]
    made = [[*_entries(hooks.layout, module_prefix, group, traced, tree.root)] for group, traced in traces]
    entries = [entry for of_group in made for entry in of_group]
    problems = [found for group, traced in traces for found in _group_problems(group, traced, tree, hooks.config)]
    problems += _depth_problems(groups, hooks.config.num_decoder_layers, tree.root, problems)
    problems += _entry_problems(entries, hooks.layout, strict_dtype)
    owned: tuple[str, ...] = ()
    if target is not None:
        owned, target_problems = _against_target(entries, target, hooks)
        problems += target_problems
    plan = Plan(
        layout=repr(hooks.layout),
        definition=hooks.layout.definition,
        entries=tuple(entries),
        tensors_per_layer=tuple(len(traced.tensors) for _, traced in traces),
        bytes_in=sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in tree.leaves.values()),
        working_bytes=PROGRAMS_IN_FLIGHT * max(map(_layer_bytes, groups, made), default=0),
        ignored=tree.ignored,
        engine_owned=owned,
        left=tree.left,
        padded=tuple(tree.root + path for path in padded_leaves(groups, hooks.config)),
    )
    if problems:
        raise PlanError(_folded(problems), plan)
    return plan


def _layer_bytes(group: LayerGroup, entries: Sequence[Entry]) -> int:
    return sum(entry.nbytes for entry in entries) // len(group.layers)


def _entries(layout: Layout, module_prefix: str, group: LayerGroup, traced: Trace, root: str) -> Iterable[Entry]:
    for layer in group.layers:
        name = functools.partial(
            layout.full_name, layer=layer.index, unscanned=layer.unscanned, module_prefix=module_prefix
        )
        for tensor, sources in zip(traced.tensors, traced.sources, strict=True):
            dtype = np.dtype(tensor.array.dtype)
            tied = tensor.tied_to and name(Tensor(tensor.tied_to, None))
            yield Entry(
                name=name(tensor),
                shape=tuple(tensor.array.shape),
                dtype=dtype,
                spec=tensor.spec,
                sources=tuple(root + layer.path(source) for source in sources),
                casts=_casts((layer.leaves[source].dtype for source in sources), dtype, tensor),
                tied_to=tied,
                refuses_values=tensor.refuses_values,
            )


def _casts(sources: Iterable[np.dtype], dtype: np.dtype, tensor: Tensor) -> tuple[str, ...]:
    """Returns every step that loses precision, in order; quantisation starts with a cast to bfloat16."""
    cast_to = np.dtype(jnp.bfloat16) if tensor.lossy else np.dtype(tensor.rounded_to or dtype)
    return tuple(sorted({step for source in sources if (step := _narrowing(source, cast_to))})) + tensor.lossy


@functools.cache
def _narrowing(source: np.dtype, target: np.dtype) -> str | None:
    if source.itemsize == 1:  # quantised, which is a problem of its own
        return None
    return None if jnp.promote_types(source, target) == target else f"{np.dtype(source)} -> {target}"


def _folded(problems: Iterable[Problem]) -> Iterable[Problem]:
    """Merges problems of layers that differ in nothing but their number."""
    groups: dict[Problem, list[str]] = {}
    for problem in problems:
        groups.setdefault(dataclasses.replace(problem, leaf=fold_key(problem.leaf)), []).append(problem.leaf)
    return [dataclasses.replace(problem, leaf=fold(names)[0]) for problem, names in groups.items()]


def _group_problems(group: LayerGroup, traced: Trace, tree: ParamTree, config: ModelConfig) -> list[Problem]:
    layer = group.layers[0]
    used = traced.used | {problem.leaf for problem in traced.problems}
    unused = [
        Problem(
            path,
            f"shape {list(layer.leaves[path].shape)}, which no hook uses",
            "only leaves that this model has",
            causes.OTHER_MODEL,
        )
        for path in group.paths
        if path not in used
    ]

    def finished(problem: Problem) -> Problem:
        path = problem.leaf
        named = dataclasses.replace(problem, leaf=tree.root + group.names(path))
        if path not in layer.leaves and path not in traced.expected:
            return named  # of a block, not of a leaf
        suspect = causes.Suspect(
            path=layer.path(path),
            found=tuple(layer.leaves[path].shape) if path in layer.leaves else None,
            expected=traced.expected.get(path),
            types=group.types,
            config=config,
            tree=tree.leaves.keys(),
            left=tree.left,
        )
        return dataclasses.replace(named, cause=causes.likely_cause(suspect) or problem.cause)

    return [finished(problem) for problem in (*traced.problems, *unused)]


def _depth_problems(groups: Sequence[LayerGroup], expected: int, root: str, others: Sequence[Problem]) -> list[Problem]:
    found = sorted(layer.index for group in groups for layer in group.layers if layer.index is not None)
    if found == list(range(expected)):
        return []
    if doubled := sorted({index for index in found if found.count(index) > 1}):
        what = f"layers {numbers(doubled)} twice"
    else:
        what = f"{plural(len(found), 'layer')}, {numbers(found)}" if found else "no layers"
    cause = causes.of_depth(problem.cause for problem in others)
    return [Problem(f"{root}decoder", what, f"{plural(expected, 'layer')} (num_decoder_layers)", cause)]


def _entry_problems(entries: list[Entry], layout: Layout, strict_dtype: bool) -> list[Problem]:
    problems = []
    written: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in written:
            what = "one source for each engine leaf"
            problems.append(Problem(entry.name, "two blocks of this name", what, "two hooks return the same weight"))
        written[entry.name] = entry
        problems += _cut_problems(entry, layout)
        if strict_dtype and entry.casts:
            cause = "strict_dtype=True; without it the values are rounded to nearest even"
            problems.append(Problem(entry.name, f"a narrowing cast, {', '.join(entry.casts)}", "none", cause))
    return problems


def _cut_problems(entry: Entry, layout: Layout) -> Iterable[Problem]:
    for size, cut in zip(entry.shape, entry.spec, strict=False):
        axes = {axis: layout.mesh_axes[axis] for axis in axes_of(cut)}
        if size % math.prod(axes.values()):
            factors = " * ".join(f"{axis}={count}" for axis, count in axes.items() if count > 1)
            cause = "this tensor-parallel size does not fit this model"
            yield Problem(entry.name, f"a dimension of {size}", f"one that {factors} divides", cause)


def _against_target(
    entries: list[Entry], target: Mapping[str, Leaf], hooks: Hooks
) -> tuple[tuple[str, ...], list[Problem]]:
    problems = _mesh_problems(target, hooks.layout)
    planned = {entry.name: entry for entry in entries}
    owned = tuple(name for name in target if name not in planned and hooks.is_engine_owned(name))
    for name in target:
        if name not in planned and name not in owned:
            cause = hooks.layout.cause_of_stranger(name) or _OTHER_ENGINE
            problems.append(Problem(name, "a leaf of the engine that nothing writes", "a source for it", cause))
    for name, entry in planned.items():
        if name not in target:
            problems.append(Problem(name, "no such leaf in the engine", f"{_leaf_text(entry)}", _OTHER_ENGINE))
        else:
            problems += _leaf_problems(entry, target[name])
    return owned, problems


def _mesh_problems(target: Mapping[str, Leaf], layout: Layout) -> list[Problem]:
    """Checks the sizes of the mesh: an engine of another size may have leaves of the same shapes, in another order."""
    shardings = [getattr(leaf, "sharding", None) for leaf in target.values()]
    meshes = {sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)}
    return [
        Problem(
            "the engine's mesh",
            f"{axis}={mesh.shape.get(axis, 1)} in {dict(mesh.shape)}",
            f"{axis}={size} from the layout",
            "the layout was made for another tensor-parallel size, or another attention_dp",
        )
        for mesh in meshes
        for axis, size in layout.mesh_axes.items()
        if mesh.shape.get(axis, 1) != size
    ]


def _leaf_text(entry: Entry) -> str:
    return f"{entry.dtype}{list(entry.shape)}"


def _leaf_problems(entry: Entry, leaf: Leaf) -> Iterable[Problem]:
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    if (shape, dtype) != (entry.shape, entry.dtype):
        cause = "tp, moe_backend, attention_dp, version or dtype is not the engine's, or the config is of another size"
        yield Problem(entry.name, f"{dtype}{list(shape)} in the engine", f"{_leaf_text(entry)} from the layout", cause)
        return
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and not _same_partitioning(sharding, entry):
        cause = "the layout's tp, moe_backend or attention_dp is not the engine's"
        found = f"{spec_text(sharding.spec)} on {dict(sharding.mesh.shape)} in the engine"
        yield Problem(entry.name, found, f"{spec_text(entry.spec)} from the layout", cause)


def _same_partitioning(sharding: NamedSharding, entry: Entry) -> bool:
    if not {axis for cut in entry.spec for axis in axes_of(cut)} <= {*sharding.mesh.axis_names}:
        return False
    wanted = NamedSharding(sharding.mesh, entry.spec, memory_kind=sharding.memory_kind)
    return wanted.is_equivalent_to(sharding, len(entry.shape))
