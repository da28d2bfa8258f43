"""Where MaxText keeps layers: shows every layer of a flat state, scanned or not, with its number and its kind."""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from portax._text.names import fold, natural_order
from portax.errors import PlanError, Problem
from portax.trainer.param_tree import ParamTree

LayerTypes: TypeAlias = frozenset[str]
"""What sets one layer apart from the others of its model, e.g. `{"global"}`; the config says so, not the tree."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """Where the weights of one layer, or of the model outside its layers, are.

    Attributes:
        index: Number of the layer in the model; None for the global weights.
        container: Path of the layer or of its stack, e.g. `decoder/layers`; empty for the global weights.
        leaves: Its arrays, or the stacks that it is a slice of, by path relative to the container.
        scan: Size of each scan axis of `leaves`; empty for a layer with arrays of its own.
        position: Index of this layer on each scan axis.
    """

    index: int | None
    container: str
    leaves: Mapping[str, Any]
    scan: tuple[int, ...] = ()
    position: tuple[int, ...] = ()

    def path(self, leaf: str) -> str:
        """Full path of one leaf, below the root."""
        return f"{self.container}/{leaf}" if self.container else leaf

    @property
    def unscanned(self) -> str:
        """Path of the layer in a tree that is not scanned; empty for the global weights."""
        if self.index is None or _UNSCANNED.fullmatch(f"{self.container}/*"):
            return self.container
        if self.container.rpartition("/")[2] in _OF_ONE_KIND:
            return f"{self.container}_{self.position[0]}"
        return f"decoder/layers_{self.index}"

    def place(self, scan_axis: int) -> Any:
        """Where in its leaves this layer is, as an index: all of them, or a slice of a stack.

        Args:
            scan_axis: First scan axis of stacked leaves.
        """
        return (slice(None),) * scan_axis + self.position if self.scan else ...


@dataclasses.dataclass(frozen=True)
class Kind:
    """What one compiled program is made for; the shapes and dtypes of the arrays come on top.

    Attributes:
        is_global: Whether this is the model outside its layers.
        types: What the config says of these layers.
        paths: The leaves' paths, relative to the layer.
        scan: Size of each scan axis of the leaves.
    """

    is_global: bool
    types: LayerTypes
    paths: tuple[str, ...]
    scan: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """Layers of one kind, whose leaves have the same shapes and dtypes.

    Attributes:
        kind: What they have in common.
        layers: The layers, in order.
    """

    kind: Kind
    layers: tuple[Layer, ...]

    def arrays(self, layer: Layer) -> tuple[Any, ...]:
        """The leaves of one of the layers, in the order of the kind's paths."""
        return tuple(layer.leaves[path] for path in self.kind.paths)

    def names(self, path: str) -> str:
        """Path of one leaf in all the layers, folded: `decoder/layers_{0...3}/mlp/wo/kernel`."""
        return ", ".join(fold(sorted({layer.path(path) for layer in self.layers}, key=natural_order)))


@dataclasses.dataclass(frozen=True)
class ScanPattern:
    """How a MaxText decoder stacks its layers when it scans them.

    Attributes:
        block: Path of the stacks; every leaf there has an axis that counts repetitions of the cycle.
        slots: What is below it: leaves of one stack (`one`), a stack for each layer of the cycle (`layer_` and
            `layers_`, which are followed by a number), or `nested`: a stack with a second scan axis for all layers of
            the cycle but the last, and a stack for the last one.
    """

    block: Literal["decoder/layers", "decoder/scanned_blocks"] = "decoder/layers"
    slots: Literal["one", "layer_", "layers_", "nested"] = "one"

    def stacks(self, depth: int, cycle: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """Container, size of each scan axis, and number of the first layer, of each stack of a scanned model.

        Args:
            depth: Layers of the model.
            cycle: Layers after which the kinds of layer repeat.
        """
        repeats, rest = divmod(depth, cycle)
        if repeats:
            for name, inner, slot in self._slots(cycle, cycle):
                yield f"{self.block}{name}", (repeats, *inner), slot
        for name, inner, slot in self._slots(rest, cycle):
            yield f"decoder/layers_remainder{name}", inner, repeats * cycle + slot

    def _slots(self, count: int, cycle: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
        if self.slots == "one":
            yield from [("", (), 0)] * count
        elif self.slots == "nested":
            local = min(count, cycle - 1)
            yield from [("/local_layers", (local,), 0)] * (local > 0)
            yield from [("/global_layer", (), local)] * (count == cycle)
        else:
            yield from ((f"/{self.slots}{slot}", (), slot) for slot in range(count))


def unscanned(depth: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """As `ScanPattern.stacks`, for a model whose layers each have arrays of their own."""
    return ((f"decoder/layers_{index}", (), index) for index in range(depth))


_OF_ONE_KIND = ("dense_layers", "moe_layers")  # DeepSeek's: first all dense layers, each kind counted from 0
_UNSCANNED = re.compile(r"(?P<container>decoder/(?P<block>(dense_|moe_)?layers)[_/](?P<index>\d+))/(?P<leaf>.+)")
_SCANNED = re.compile(
    r"decoder/(?P<block>layers|scanned_blocks|dense_layers|moe_layers|layers_remainder)/"
    r"((?P<slot>layers?[_/]\d+|local_layers|global_layer)/)?(?P<leaf>.+)"
)
_REMAINDER, _LOCAL = "layers_remainder", "local_layers"
_AFTER_OTHERS = ("moe_layers", _REMAINDER)


def sections(
    state: ParamTree, scan_axis: int, types: Callable[[Sequence[Layer]], Sequence[LayerTypes]]
) -> tuple[Section, ...]:
    """Groups a state into the global weights and the layers of each kind.

    Layers are told apart by their leaves and types, never by their numbers: how many programs a model needs does not
    depend on its depth.

    Args:
        state: The flat state.
        scan_axis: First scan axis of stacked leaves (MaxText's `param_scan_axis`).
        types: Says what is special about each of the layers.

    Raises:
        PlanError: Stacks of two forms are mixed.
    """
    outside, layers = _split(state, scan_axis)
    kinds: dict[Any, list[Layer]] = {}
    for layer, special in zip([outside, *layers], [frozenset[str](), *types(layers)], strict=True):
        kind = Kind(layer.index is None, special, tuple(sorted(layer.leaves)), layer.scan)
        shapes = tuple((layer.leaves[path].shape, np.dtype(layer.leaves[path].dtype)) for path in kind.paths)
        kinds.setdefault((kind, shapes), []).append(layer)
    return tuple(Section(kind, tuple(layers)) for (kind, _), layers in kinds.items())


def _split(state: ParamTree, scan_axis: int) -> tuple[Layer, list[Layer]]:
    outside: dict[str, Any] = {}
    single: dict[str, dict[tuple[int, str], dict[str, Any]]] = {}
    blocks: dict[str, dict[str, dict[str, Any]]] = {}
    for path, leaf in state.leaves.items():
        if match := _UNSCANNED.fullmatch(path):
            numbered = single.setdefault(match["block"], collections.defaultdict(dict))
            numbered[int(match["index"]), match["container"]][match["leaf"]] = leaf
        elif match := _SCANNED.fullmatch(path):
            slots = blocks.setdefault(match["block"], collections.defaultdict(dict))
            slots[match["slot"] or ""][match["leaf"]] = leaf
        else:
            outside[path] = leaf
    layers: list[Layer] = []
    for block in sorted({*single, *blocks}, key=lambda block: (block in _AFTER_OTHERS, block == _REMAINDER)):
        first = 1 + max((layer.index or 0 for layer in layers), default=-1) if block in _AFTER_OTHERS else 0
        layers += [Layer(first + index, at, leaves) for (index, at), leaves in single.get(block, {}).items()]
        if block in blocks:
            layers += _unstack(f"decoder/{block}", blocks[block], scan_axis, block != _REMAINDER, first, state.root)
    return Layer(None, "", outside), sorted(layers, key=lambda layer: layer.index or 0)


def _unstack(
    block: str, slots: dict[str, dict[str, Any]], scan_axis: int, repeated: bool, first: int, root: str
) -> Iterator[Layer]:
    """The layers of one block: all that its cycle holds, as often as it is repeated."""
    if len({_form(slot) for slot in slots}) > 1:
        raise PlanError([_mixed(root + block, slots)])
    depths = {slot: repeated + (slot == _LOCAL) for slot in slots}
    scans = {slot: _lengths(leaves.values(), scan_axis, depths[slot]) for slot, leaves in slots.items()}
    local = scans[_LOCAL][-1] if _LOCAL in slots else 0
    places = {
        slot: int(slot.replace("/", "_").rpartition("_")[2]) if slot[-1:].isdigit() else local
        for slot in slots
        if slot != _LOCAL
    }
    cycle = max([local - 1, *places.values()]) + 1
    for slot, leaves in slots.items():
        container = f"{block}/{slot}" if slot else block
        for position in np.ndindex(scans[slot]):
            repeat = position[0] if repeated else 0
            place = position[-1] if slot == _LOCAL else places[slot]
            yield Layer(first + repeat * cycle + place, container, leaves, scans[slot], position)


def _form(slot: str) -> str:
    return "nested" if slot in (_LOCAL, "global_layer") else slot.rstrip("0123456789")


def _lengths(leaves: Any, scan_axis: int, depth: int) -> tuple[int, ...]:
    """The size of each scan axis that most of the leaves have."""
    found = [leaf.shape[scan_axis : scan_axis + depth] for leaf in leaves if leaf.ndim >= scan_axis + depth]
    return tuple(collections.Counter(found).most_common(1)[0][0]) if found else (0,) * depth


def _mixed(block: str, slots: Mapping[str, Any]) -> Problem:
    stacks = sorted(fold(f"{block}/{slot}/" if slot else f"{block}/*" for slot in slots))
    return Problem(
        block,
        f"stacks of several forms, {', '.join(stacks)}",
        "one form: a single stack, layers_0, layers_1, ..., or local_layers and global_layer",
        "trees of two MaxText versions were merged, or a checkpoint was restored into the other one's tree",
    )
