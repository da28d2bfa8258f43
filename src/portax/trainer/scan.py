"""The layers of a flat trainer's tree, scanned or not, each with its number and its types."""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from portax._text.names import fold, natural_order
from portax.errors import PlanError, Problem

LayerTypes: TypeAlias = frozenset[str]
"""Names that set a layer apart from others of its model, e.g. `{"global"}`; they come from the config, not the tree."""


@dataclasses.dataclass(frozen=True, eq=False)
class LayerSlice:
    """The place of one layer's weights, or of the weights outside the layers, in a trainer's tree.

    Attributes:
        index: Number of the layer in the model; None for the global weights.
        container: Path of the layer or of its stack, e.g. `decoder/layers`; empty for the global weights.
        leaves: Shapes of its leaves, or of the stacks that it is a slice of, by path relative to the container.
        scan: Size of each scan axis of the leaves; empty for a layer with leaves of its own.
        position: Index of this layer on each scan axis.

    Example:
        >>> shape = jax.ShapeDtypeStruct((128, 36, 64), np.float32)
        >>> layer = LayerSlice(3, "decoder/layers", {"mlp/wo/kernel": shape}, scan=(36,), position=(3,))
        >>> layer.path("mlp/wo/kernel"), layer.at(1)
        ('decoder/layers/mlp/wo/kernel', (slice(None, None, None), 3))
    """

    index: int | None
    container: str
    leaves: Mapping[str, Any]
    scan: tuple[int, ...] = ()
    position: tuple[int, ...] = ()

    def path(self, leaf: str) -> str:
        """Returns the full path of one leaf, below the root."""
        return f"{self.container}/{leaf}" if self.container else leaf

    @property
    def unscanned(self) -> str:
        """Path of the layer in a tree that is not scanned; empty for the global weights."""
        if self.index is None or _UNSCANNED.fullmatch(f"{self.container}/*"):
            return self.container
        if self.container.rpartition("/")[2] in _OF_ONE_KIND:
            return f"{self.container}_{self.position[0]}"
        return f"decoder/layers_{self.index}"

    def at(self, scan_axis: int) -> tuple[int | slice, ...]:
        """Returns this layer's place in a leaf, as an index: empty for a leaf of its own, or a slice of a stack.

        Args:
            scan_axis: First scan axis of the leaf.
        """
        return (slice(None),) * scan_axis + self.position if self.scan else ()


@dataclasses.dataclass(frozen=True, eq=False)
class LayerGroup:
    """Layers that one compiled program converts: of the same types, with leaves of the same shapes and dtypes.

    Attributes:
        is_global: True for the model outside its layers.
        types: The layers' types, as the config says.
        paths: Paths of the leaves, relative to the layer.
        scan: Size of each scan axis of the leaves.
        scan_axes: First scan axis of each leaf.
        layers: The layers, in order.
    """

    is_global: bool
    types: LayerTypes
    paths: tuple[str, ...]
    scan: tuple[int, ...]
    scan_axes: tuple[int, ...]
    layers: tuple[LayerSlice, ...]

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Shapes of the leaves, in the order of the paths."""
        return tuple(self.layers[0].leaves[path] for path in self.paths)

    def scan_axis(self, path: str) -> int:
        """Returns the first scan axis of one leaf."""
        return dict(zip(self.paths, self.scan_axes, strict=True)).get(path, self.scan_axes[0] if self.scan_axes else 0)

    def names(self, path: str) -> str:
        """Returns the path of one leaf in all the layers, folded: `decoder/layers_{0...3}/mlp/wo/kernel`."""
        return ", ".join(fold(sorted({layer.path(path) for layer in self.layers}, key=natural_order)))


@dataclasses.dataclass(frozen=True)
class ScanPattern:
    """The way in which a MaxText decoder stacks its layers when it scans them.

    Attributes:
        block: Path of the stacks; every leaf there has an axis that counts repetitions of the cycle.
        slots: The form below it: leaves of one stack (`one`), a stack for each layer of the cycle (`layer_` and
            `layers_`, which are followed by a number), or `nested`: a stack with a second scan axis for all layers of
            the cycle but the last, and a stack for the last one.

    Example:
        >>> list(ScanPattern("decoder/layers", "layers_").stacks(depth=4, cycle=2))
        [('decoder/layers/layers_0', (2,), 0), ('decoder/layers/layers_1', (2,), 1)]
    """

    block: Literal["decoder/layers", "decoder/scanned_blocks"] = "decoder/layers"
    slots: Literal["one", "layer_", "layers_", "nested"] = "one"

    def stacks(self, depth: int, cycle: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """Yields the stacks of a scanned model: container, size of each scan axis, number of the first layer.

        Args:
            depth: Layers of the model.
            cycle: Number of layers after which the kinds of layer repeat.
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


def dense_then_moe(depth: int, dense: int, *, scanned: bool) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """As `ScanPattern.stacks`, for a model whose dense layers and mixtures of experts are each counted from 0.

    Args:
        depth: Layers of the model.
        dense: The first ones of them, which are dense.
        scanned: True for one stack of each kind.
    """
    for kind, count, first in (("dense_layers", dense, 0), ("moe_layers", depth - dense, dense)):
        if scanned:
            yield from [(f"decoder/{kind}", (count,), first)] * (count > 0)
        else:
            yield from ((f"decoder/{kind}_{index}", (), first + index) for index in range(count))


_OF_ONE_KIND = ("dense_layers", "moe_layers")  # DeepSeek's: first all dense layers, each kind counted from 0
_UNSCANNED = re.compile(r"(?P<container>decoder/(?P<block>(dense_|moe_)?layers)[_/](?P<index>\d+))/(?P<leaf>.+)")
_SCANNED = re.compile(
    r"decoder/(?P<block>layers|scanned_blocks|dense_layers|moe_layers|layers_remainder)/"
    r"((?P<slot>layers?[_/]\d+|local_layers|global_layer)/)?(?P<leaf>.+)"
)
_REMAINDER, _LOCAL = "layers_remainder", "local_layers"
_AFTER_OTHERS = ("moe_layers", _REMAINDER)


def layer_groups(
    leaves: Mapping[str, Any],
    root: str,
    scan_axis: Callable[[str], int],
    types: Callable[[Sequence[LayerSlice]], Sequence[LayerTypes]],
) -> tuple[LayerGroup, ...]:
    """Groups the leaves of a tree into the global weights and layers that are alike.

    Layers are told apart by their leaves and types, never by their numbers: the number of programs that a model needs
    does not depend on its depth.

    Args:
        leaves: Shapes of the tree's leaves, by path below the root.
        root: Prefix of every path.
        scan_axis: First scan axis of a stacked leaf, by its path relative to the layer.
        types: The types of each of the layers.

    Raises:
        PlanError: Stacks of two forms are mixed.
    """
    outside, layers = _split(leaves, root, scan_axis)
    found: dict[Any, list[LayerSlice]] = {}
    for layer, kind in zip([outside, *layers], [frozenset[str](), *types(layers)], strict=True):
        paths = tuple(sorted(layer.leaves))
        shapes = tuple((layer.leaves[path].shape, np.dtype(layer.leaves[path].dtype)) for path in paths)
        found.setdefault((layer.index is None, kind, paths, layer.scan, shapes), []).append(layer)
    return tuple(
        LayerGroup(is_global, kind, paths, scan, tuple(scan_axis(path) for path in paths), tuple(alike))
        for (is_global, kind, paths, scan, _), alike in found.items()
    )


def _split(
    leaves: Mapping[str, Any], root: str, scan_axis: Callable[[str], int]
) -> tuple[LayerSlice, list[LayerSlice]]:
    outside: dict[str, Any] = {}
    single: dict[str, dict[tuple[int, str], dict[str, Any]]] = {}
    blocks: dict[str, dict[str, dict[str, Any]]] = {}
    for path, leaf in leaves.items():
        if match := _UNSCANNED.fullmatch(path):
            numbered = single.setdefault(match["block"], collections.defaultdict(dict))
            numbered[int(match["index"]), match["container"]][match["leaf"]] = leaf
        elif match := _SCANNED.fullmatch(path):
            slots = blocks.setdefault(match["block"], collections.defaultdict(dict))
            slots[match["slot"] or ""][match["leaf"]] = leaf
        else:
            outside[path] = leaf
    layers: list[LayerSlice] = []
    for block in sorted({*single, *blocks}, key=lambda block: (block in _AFTER_OTHERS, block == _REMAINDER)):
        first = 1 + max((layer.index or 0 for layer in layers), default=-1) if block in _AFTER_OTHERS else 0
        layers += [LayerSlice(first + index, at, leaves) for (index, at), leaves in single.get(block, {}).items()]
        if block in blocks:
            layers += _unstack(f"decoder/{block}", blocks[block], scan_axis, block != _REMAINDER, first, root)
    return LayerSlice(None, "", outside), sorted(layers, key=lambda layer: layer.index or 0)


def _unstack(
    block: str,
    slots: dict[str, dict[str, Any]],
    scan_axis: Callable[[str], int],
    repeated: bool,
    first: int,
    root: str,
) -> Iterator[LayerSlice]:
    """The layers of one block: all that its cycle holds, as often as it is repeated."""
    if len({_form(slot) for slot in slots}) > 1:
        raise PlanError([_mixed(root + block, slots)])
    depths = {slot: repeated + (slot == _LOCAL) for slot in slots}
    scans = {slot: _lengths(leaves, scan_axis, depths[slot]) for slot, leaves in slots.items()}
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
            yield LayerSlice(first + repeat * cycle + place, container, leaves, scans[slot], position)


def _form(slot: str) -> str:
    return "nested" if slot in (_LOCAL, "global_layer") else slot.rstrip("0123456789")


def _lengths(leaves: Mapping[str, Any], scan_axis: Callable[[str], int], depth: int) -> tuple[int, ...]:
    """The size of each scan axis that most of the leaves have."""
    axes = {path: scan_axis(path) for path in leaves}
    found = [
        tuple(leaf.shape[axes[path] : axes[path] + depth])
        for path, leaf in leaves.items()
        if len(leaf.shape) >= axes[path] + depth
    ]
    return collections.Counter(found).most_common(1)[0][0] if found else (0,) * depth


def _mixed(block: str, slots: Mapping[str, Any]) -> Problem:
    stacks = sorted(fold(f"{block}/{slot}/" if slot else f"{block}/*" for slot in slots))
    return Problem(
        block,
        f"stacks of several forms, {', '.join(stacks)}",
        "one form: a single stack, layers_0, layers_1, ..., or local_layers and global_layer",
        "trees of two MaxText versions were merged, or a checkpoint was restored into the other one's tree",
    )
