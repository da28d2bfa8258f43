"""`Plan`: what will be written from what, known and checked before a byte moves."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from portax.errors import PlanError, Problem
from portax.layouts import Layout, Tensor
from portax.names import family, fold, numbers
from portax.tracing import Hooks, Trace, trace
from portax.trainer_state import Section, TrainerState

PROGRAMS_IN_FLIGHT = 2  # how many layers a conversion works on at a time, beside what is finished


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf of the engine.

    Attributes:
        name: Its full name.
        shape: Its shape.
        dtype: Its dtype.
        spec: How the engine partitions it.
        sources: The trainer leaves that its values come from.
        casts: Casts on the way that lose precision, such as `float32 -> bfloat16`.
        tied_to: The engine leaf whose values it repeats, where the model ties them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    spec: PartitionSpec
    sources: tuple[str, ...]
    casts: tuple[str, ...]
    tied_to: str | None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole, unsharded leaf."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked conversion. `print(plan)` shows a table; `plan.to_json()` is for machines.

    Attributes:
        layout: The layout, in words.
        entries: Every engine leaf that is written, in the order of writing.
        bytes_in: Bytes of the trainer leaves.
        tensors_per_layer: For each section of the trainer's tree, how many entries each of its layers has.
        working_bytes: Bytes in work at a time, beside source and results: the layers in flight.
        ignored: Variables of the trainer's state that are no parameters.
        engine_owned: Leaves of the target that the engine fills itself; empty without a target.
    """

    layout: str
    entries: tuple[Entry, ...]
    tensors_per_layer: tuple[int, ...]
    bytes_in: int
    working_bytes: int
    ignored: tuple[str, ...]
    engine_owned: tuple[str, ...]

    @functools.cached_property
    def bytes_out(self) -> int:
        """Bytes of everything that is written."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def peak_bytes(self) -> int:
        """Planned peak over all devices: source, results, and the layers in work."""
        return self.bytes_in + self.bytes_out + self.working_bytes

    @property
    def casts(self) -> dict[str, list[str]]:
        """Engine leaves by the precision-losing cast that feeds them, e.g. `float32 -> bfloat16`."""
        found: dict[str, list[str]] = {}
        for entry in self.entries:
            for cast in entry.casts:
                found.setdefault(cast, []).append(entry.name)
        return found

    @property
    def ties(self) -> dict[str, str]:
        """Engine leaves that repeat another leaf's values."""
        return {entry.name: entry.tied_to for entry in self.entries if entry.tied_to is not None}

    def __str__(self) -> str:
        from portax import report

        return report.plan_table(self)

    def to_json(self) -> str:
        """All of the plan as one JSON object."""
        entries = {
            entry.name: {
                "shape": entry.shape,
                "dtype": entry.dtype.name,
                "spec": list(entry.spec),
                "bytes": entry.nbytes,
                "sources": entry.sources,
                "casts": entry.casts,
                "tied_to": entry.tied_to,
            }
            for entry in self.entries
        }
        totals = {"bytes_in": self.bytes_in, "bytes_out": self.bytes_out, "peak_bytes": self.peak_bytes}
        lists = {"ignored": self.ignored, "engine_owned": self.engine_owned}
        return json.dumps({"layout": self.layout, **totals, **lists, "entries": entries}, indent=1)


def spec_text(spec: PartitionSpec) -> str:
    """A partitioning as people write it: `P(None, 'model')`."""
    return f"P({', '.join(repr(axis) for axis in spec)})"


def make_plan(
    hooks: Hooks,
    wrapper: str,
    state: TrainerState,
    sections: Sequence[Section],
    *,
    target: Mapping[str, Any] | None,
    strict_dtype: bool,
) -> Plan:
    """Plans a conversion and checks it both ways.

    Args:
        hooks: The converter.
        wrapper: What the engine wraps its language model in.
        state: The trainer's state.
        sections: The state's sections.
        target: The engine's leaves by name (arrays or shapes), if they are known.
        strict_dtype: Whether a cast that loses precision is a problem.

    Raises:
        PlanError: Anything is missing, left over, of another shape or kind; all of it, at once.
    """
    problems: list[Problem] = []
    entries: list[Entry] = []
    tensors_per_layer: list[int] = []
    working = 0
    for section in sections:
        traced = trace(hooks, section)
        problems += _section_problems(section, traced, state.root)
        new = list(_entries(hooks.layout, wrapper, section, traced, state.root))
        working = max(working, sum(entry.nbytes for entry in new) // len(section.layers))
        entries += new
        tensors_per_layer.append(len(traced.tensors))
    problems += _depth_problems(sections, hooks.config.num_decoder_layers, state.root)
    problems += _entry_problems(entries, hooks.layout, strict_dtype)
    owned: tuple[str, ...] = ()
    if target is not None:
        owned, target_problems = _against_target(entries, target, hooks.layout)
        problems += target_problems
    if problems:
        raise PlanError(_folded(problems))
    bytes_in = sum(int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize for leaf in state.leaves.values())
    return Plan(
        layout=repr(hooks.layout),
        entries=tuple(entries),
        tensors_per_layer=tuple(tensors_per_layer),
        bytes_in=bytes_in,
        working_bytes=PROGRAMS_IN_FLIGHT * working,
        ignored=state.ignored,
        engine_owned=owned,
    )


def _entries(layout: Layout, wrapper: str, section: Section, traced: Trace, root: str) -> Iterable[Entry]:
    for layer in section.layers:
        for tensor, sources in zip(traced.tensors, traced.sources, strict=True):
            dtype = np.dtype(tensor.array.dtype)
            tied = tensor.tied_to and layout.path(Tensor(tensor.tied_to, None), layer=layer.index, wrapper=wrapper)
            yield Entry(
                name=layout.path(tensor, layer=layer.index, wrapper=wrapper),
                shape=tuple(tensor.array.shape),
                dtype=dtype,
                spec=tensor.spec,
                sources=tuple(root + layer.path(source) for source in sources),
                casts=tuple(sorted({c for s in sources if (c := _narrowing(layer.leaves[s].dtype, dtype))})),
                tied_to=tied,
            )


def _narrowing(source: Any, target: np.dtype) -> str | None:
    return None if jnp.promote_types(source, target) == target else f"{np.dtype(source)} -> {target}"


def _folded(problems: Iterable[Problem]) -> Iterable[Problem]:
    """One problem where layers differ in nothing but their number."""
    groups: dict[Problem, list[str]] = {}
    for problem in problems:
        groups.setdefault(dataclasses.replace(problem, leaf=family(problem.leaf)), []).append(problem.leaf)
    return [dataclasses.replace(problem, leaf=fold(names)[0]) for problem, names in groups.items()]


def _section_problems(section: Section, traced: Trace, root: str) -> list[Problem]:
    problems = [dataclasses.replace(problem, leaf=root + section.names(problem.leaf)) for problem in traced.problems]
    used = traced.used | {problem.leaf for problem in traced.problems}
    problems += [
        Problem(
            root + section.names(path),
            f"shape {list(section.layers[0].leaves[path].shape)}, which no hook uses",
            "only leaves that this model has",
            "the config describes another model (tied or untied, dense or MoE), or the tree holds adapters",
        )
        for path in section.kind.paths
        if path not in used
    ]
    return problems


def _depth_problems(sections: Sequence[Section], expected: int, root: str) -> list[Problem]:
    found = sorted(layer.index for section in sections for layer in section.layers if layer.index is not None)
    if found == list(range(expected)):
        return []
    if doubled := sorted({index for index in found if found.count(index) > 1}):
        what = f"layers {numbers(doubled)} twice"
    else:
        what = f"{len(found)} layers, {numbers(found)}" if found else "no layers"
    return [
        Problem(
            f"{root}decoder",
            what,
            f"{expected} layers (num_decoder_layers)",
            "the config is of another depth, param_scan_axis is not the trainer's, or layers were lost on the way",
        )
    ]


def _entry_problems(entries: list[Entry], layout: Layout, strict_dtype: bool) -> list[Problem]:
    problems = []
    written: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in written:
            what = "one source for each engine leaf"
            problems.append(Problem(entry.name, "two blocks of this name", what, "two hooks return the same weight"))
        written[entry.name] = entry
        for size, axis in zip(entry.shape, entry.spec, strict=False):
            if axis is not None and size % layout.mesh_axes[axis]:
                problems.append(
                    Problem(
                        entry.name,
                        f"a dimension of {size}",
                        f"one that {axis}={layout.mesh_axes[axis]} divides",
                        "this tensor-parallel size does not fit this model",
                    )
                )
        if strict_dtype and entry.casts:
            cause = "strict_dtype=True; without it the values are rounded to nearest even"
            problems.append(Problem(entry.name, f"a narrowing cast, {', '.join(entry.casts)}", "none", cause))
    return problems


def _against_target(
    entries: list[Entry], target: Mapping[str, Any], layout: Layout
) -> tuple[tuple[str, ...], list[Problem]]:
    problems = _mesh_problems(target, layout)
    planned = {entry.name: entry for entry in entries}
    owned = tuple(name for name in target if name not in planned and layout.owns(name))
    for name in target:
        if name not in planned and name not in owned:
            cause = "the engine runs another model, wrapper, version or implementation than the layout says"
            problems.append(Problem(name, "a leaf of the engine that nothing writes", "a source for it", cause))
    for name, entry in planned.items():
        if name not in target:
            cause = "the engine runs another model, wrapper, version or implementation than the layout says"
            problems.append(Problem(name, "no such leaf in the engine", f"{_leaf_text(entry)}", cause))
        else:
            problems += _leaf_problems(entry, target[name])
    return owned, problems


def _mesh_problems(target: Mapping[str, Any], layout: Layout) -> list[Problem]:
    """An engine of another size may have leaves of the same shapes, in another order."""
    shardings = [getattr(leaf, "sharding", None) for leaf in target.values()]
    meshes = {sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)}
    return [
        Problem(
            "the engine's mesh",
            f"{axis}={mesh.shape.get(axis, 1)} in {dict(mesh.shape)}",
            f"{axis}={size} from the layout",
            "the layout was made for another tensor-parallel size",
        )
        for mesh in meshes
        for axis, size in layout.mesh_axes.items()
        if mesh.shape.get(axis, 1) != size
    ]


def _leaf_text(entry: Entry) -> str:
    return f"{entry.dtype}{list(entry.shape)}"


def _leaf_problems(entry: Entry, leaf: Any) -> Iterable[Problem]:
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    if (shape, dtype) != (entry.shape, entry.dtype):
        cause = "tp, moe_backend, version or dtype of the layout is not the engine's, or the config is of another size"
        yield Problem(entry.name, f"{dtype}{list(shape)} in the engine", f"{_leaf_text(entry)} from the layout", cause)
        return
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and not _same_partitioning(sharding, entry):
        cause = "the layout's tp or moe_backend is not the engine's"
        found = f"{spec_text(sharding.spec)} on {dict(sharding.mesh.shape)} in the engine"
        yield Problem(entry.name, found, f"{spec_text(entry.spec)} from the layout", cause)


def _same_partitioning(sharding: NamedSharding, entry: Entry) -> bool:
    if not {axis for axis in entry.spec if axis is not None} <= {*sharding.mesh.axis_names}:
        return False
    return NamedSharding(sharding.mesh, entry.spec).is_equivalent_to(sharding, len(entry.shape))
