"""Pictures of a plan or a diff, for the page that shows them: each leaf, folded, and the leaf that it becomes."""

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from portax._text.names import fold, fold_key, folded_into, parts
from portax._text.tables import plural, size
from portax.analysis.compare import Found
from portax.analysis.diff_report import Diff, LeafDiff, groups
from portax.errors import PlanError, Problem
from portax.planning.plan import Entry, Plan, axes_of
from portax.trainer import param_tree
from portax.trainer.param_tree import Params

Picture: TypeAlias = dict[str, Any]
"""The data of a page; the page's script documents the keys."""

_Card: TypeAlias = dict[str, Any]
_MOST_NUMBERS = 50_000  # leaves for which a diff's page tells how much each one differs


def of_plan(plan: Plan | None, params: Params, *, what: str, problems: Sequence[Problem] = ()) -> Picture:
    """Returns the picture of a plan, or of the problems that prevented it.

    Args:
        plan: The plan; None if there is none to show.
        params: The trainer's tree of the plan, or its shapes.
        what: Words for that tree.
        problems: The problems of a `PlanError`.
    """
    leaves = _leaves(params)
    entries = plan.entries if plan else ()
    bad: dict[str, list[int]] = {}
    unknown: dict[str, list[int]] = {}
    known = [*leaves, *(entry.name for entry in entries)]
    for number, problem in enumerate(problems):
        concerned = [*filter(folded_into(problem.leaf), known)]
        for name in concerned or [problem.leaf]:
            (bad if concerned else unknown).setdefault(name, []).append(number)
    sections = [_section(title, alike, leaves, bad) for title, alike in _alike(entries)]
    used = {source for entry in entries for source in entry.sources}
    loose = [name for name in leaves if name not in used]
    sections += _loose_section(loose, unknown, leaves, bad)
    if plan and plan.engine_owned:
        cards = [_card(names) | {"state": "own"} for names in _families(plan.engine_owned)]
        sections.append(_sides("filled by the engine itself", [], cards))
    return {
        "kind": "plan",
        "what": what,
        "sides": ["trainer", "engine"],
        "facts": _plan_facts(plan) if plan else [["plan", "none: it did not come so far"]],
        "problems": [vars(problem) for problem in problems],
        "sections": sections,
    }


def of_diff(diff: Diff) -> Picture:
    """Returns the picture of a diff."""
    equal = "equal" if diff.values else "equal in shape and dtype"
    cards: dict[str, list[tuple[_Card | None, _Card | None]]] = {
        title: [] for title in ("differ", "only in A", "only in B", equal)
    }
    different = sum(leaf.found is not None and leaf.found.different > 0 for leaf in diff.leaves)
    for leaves in groups(diff.leaves):
        what = ", ".join(leaves[0].differences)
        pair = _pair(leaves, "bad" if what else "good" if diff.values else "", tell=different <= _MOST_NUMBERS)
        cards[what if what in cards else "differ" if what else equal].append(pair)
    sections = []
    for title, pairs in cards.items():
        if pairs:
            left, right = ([pair[side] for pair in pairs if pair[side]] for side in (0, 1))
            links = [[i, i] for i in range(len(left))] if len(left) == len(right) else []
            sections.append(_sides(title, left, right, links))
    facts = [["A", diff.a], ["B", diff.b], ["verdict", diff.verdict]]
    facts += [["beside", line] for line in diff.reasons]
    return {"kind": "diff", "what": "", "sides": ["A", "B"], "facts": facts, "problems": [], "sections": sections}


def _leaves(params: Params) -> Mapping[str, Any]:
    try:
        return param_tree.read(params).rooted
    except PlanError:  # it is among the problems
        return {}


def _plan_facts(plan: Plan) -> list[list[str]]:
    facts = [
        ["layout", plan.layout],
        ["bytes", f"{size(plan.bytes_in)} in, {size(plan.bytes_out)} out"],
        ["planned peak", f"{size(plan.peak_bytes)} over all devices"],
    ]
    facts += [
        ["narrowing cast", f"{cast}: {plural(len(names), 'leaf', 'leaves')}"] for cast, names in plan.casts.items()
    ]
    facts += [["tied", f"{name} repeats {to}"] for name, to in plan.ties.items()]
    if plan.ignored:
        facts.append(["ignored", f"{plural(len(plan.ignored), 'variable')} of the trainer, no parameters"])
    if plan.left:
        facts.append(
            ["left out", f"{plural(len(plan.left), 'leaf', 'leaves')} of the trainer: {', '.join(fold(plan.left))}"]
        )
    return facts


def _alike(entries: Iterable[Entry]) -> Iterator[tuple[str, list[list[Entry]]]]:
    """Groups layers that look the same: their names, and their entries."""
    layers: dict[int | None, dict[Any, list[Entry]]] = {}
    for entry in entries:
        numbers = parts(entry.name)[1]
        layers.setdefault(numbers[0] if numbers else None, {}).setdefault(_look(entry), []).append(entry)
    alike: dict[Any, list[int | None]] = {}
    for layer, looks in layers.items():
        alike.setdefault(frozenset(looks), []).append(layer)
    for same in alike.values():
        title = "outside the layers" if same == [None] else "layer " if len(same) == 1 else f"{len(same)} layers: "
        title += ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in _ranges([n for n in same if n is not None]))
        yield title, [[entry for layer in same for entry in layers[layer][look]] for look in layers[same[0]]]


def _look(entry: Entry) -> tuple[Any, ...]:
    sources = tuple(sorted({fold_key(source) for source in entry.sources}))
    tied = entry.tied_to and fold_key(entry.tied_to)
    return fold_key(entry.name), entry.shape, entry.dtype, entry.spec, entry.casts, tied, sources


def _section(
    title: str, groups: Iterable[Sequence[Entry]], leaves: Mapping[str, Any], bad: Mapping[str, Sequence[int]]
) -> Picture:
    """Returns the engine leaves of one kind of layer, their sources, and the arrows between them."""
    rows = [sorted(group, key=lambda entry: parts(entry.name)[1]) for group in groups]
    named = dict.fromkeys(source for row in rows for entry in row for source in entry.sources)
    left = [*_families(named, leaves)]
    place = {name: (i, j) for i, names in enumerate(left) for j, name in enumerate(names)}
    links = [[i, j] for j, row in enumerate(rows) for i in sorted({place[s][0] for e in row for s in e.sources})]
    right = []
    for row in rows:
        sources = [[place[source] for source in entry.sources] for entry in row]
        right.append(_entry_card(row, bad) | {"from": _runs(sources)})
    return _sides(title, [_leaf_card(names, leaves, bad) for names in left], right, links)


def _loose_section(
    loose: Sequence[str],
    unknown: Mapping[str, Sequence[int]],
    leaves: Mapping[str, Any],
    bad: Mapping[str, Sequence[int]],
) -> list[Picture]:
    """Returns trainer leaves that feed nothing, and leaves of problems that are on neither side."""
    left = [_leaf_card(names, leaves, bad) for names in _families(loose, leaves)]
    ghosts = {
        name: {"name": [name], "columns": [], "count": 1, "state": "ghost", "problems": numbers}
        for name, numbers in unknown.items()
    }
    left += [card for name, card in ghosts.items() if "/" in name]
    right = [card for name, card in ghosts.items() if "/" not in name]
    return [_sides("not connected", left, right)] if left or right else []


def _sides(title: str, left: Sequence[Any], right: Sequence[Any], links: Sequence[list[int]] = ()) -> Picture:
    return {"title": title, "left": left, "right": right, "links": links}


def _families(names: Iterable[str], leaves: Mapping[str, Any] | None = None) -> Iterator[list[str]]:
    """Groups names that differ in numbers alone (and, if leaves are given, not in shape or dtype), in order."""
    found: dict[Any, list[str]] = {}
    for name in names:
        leaf = leaves[name] if leaves else None
        look = (tuple(leaf.shape), np.dtype(leaf.dtype)) if leaf is not None else None
        found.setdefault((fold_key(name), look), []).append(name)
    for group in found.values():
        yield sorted(group, key=lambda name: parts(name)[1])


def _card(names: Sequence[str]) -> _Card:
    """Returns a folded name: the texts around its numbers, and the numbers of each column, or of each name."""
    around = parts(names[0])[0]
    rows = [parts(name)[1] for name in names]
    columns = [sorted({*column}) for column in zip(*rows, strict=True)]
    card: _Card = {"name": around, "columns": [_ranges(column) for column in columns], "count": len(names)}
    if len(names) != math.prod(map(len, columns)):
        card["rows"] = rows
    return card


def _ranges(numbers: Sequence[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


def _spec(shape: Collection[int], dtype: Any, count: int) -> _Card:
    return {
        "shape": [*shape],
        "dtype": np.dtype(dtype).name,
        "bytes": math.prod(shape) * np.dtype(dtype).itemsize * count,
    }


def _marks(names: Iterable[str], bad: Mapping[str, Sequence[int]]) -> _Card:
    numbers = sorted({number for name in names for number in bad.get(name, ())})
    return {"state": "bad", "problems": numbers} if numbers else {}


def _leaf_card(names: Sequence[str], leaves: Mapping[str, Any], bad: Mapping[str, Sequence[int]]) -> _Card:
    leaf = leaves[names[0]]
    return _card(names) | _spec(leaf.shape, leaf.dtype, len(names)) | _marks(names, bad)


def _entry_card(row: Sequence[Entry], bad: Mapping[str, Sequence[int]]) -> _Card:
    first, names = row[0], [entry.name for entry in row]
    card = _card(names) | _spec(first.shape, first.dtype, len(row)) | _marks(names, bad)
    card["cuts"] = [list(axes_of(cut)) for cut in first.spec]
    if first.casts:
        card["casts"] = first.casts
    if not first.sources:
        card["state"] = "bad"
        card.setdefault("problems", [])
    if first.tied_to:
        card["tied"] = fold(entry.tied_to for entry in row if entry.tied_to)[0]
    return card


def _runs(sources: Iterable[list[tuple[int, int]]]) -> list[list[Any]]:
    """Returns the sources of each leaf; once for a run of leaves with the same ones."""
    return [[same, len([*run])] for same, run in itertools.groupby(sources)]


def _pair(leaves: Sequence[LeafDiff], state: str, *, tell: bool) -> tuple[_Card | None, _Card | None]:
    """Returns a leaf's card on each side."""
    leaves = sorted(leaves, key=lambda leaf: parts(leaf.name)[1])
    first = leaves[0]
    names = _card([leaf.name for leaf in leaves]) | {"state": state}
    left, right = (
        None if side is None else names | _spec(side.shape, side.dtype, len(leaves)) for side in (first.a, first.b)
    )
    told = right or left or {}
    told["verdict"] = ", ".join(first.differences)
    found = [leaf.found for leaf in leaves if leaf.found is not None]
    if found:
        total = sum(found, Found())
        told["found"] = total.to_dict() | {"elements": sum(leaf.elements for leaf in leaves)}
        if tell and total.different and len(leaves) > 1:
            each = [leaf.to_dict() for leaf in found]
            told["each"] = [[leaf["different"] for leaf in each], [_short(leaf["largest"]) for leaf in each]]
    return left, right


def _short(number: float | str | None) -> float | str | None:
    return float(f"{number:.3g}") if isinstance(number, float) else number
