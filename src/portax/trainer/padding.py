"""Padding in a trainer's tree: the leaves that are wider than the model, and the places of the padding in them."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from jax import lax

from portax.config.model_config import ModelConfig
from portax.trainer.scan import LayerGroup

Shape = tuple[int, ...]

_VOCABULARY = {"token_embedder/embedding": 0, "decoder/logits_dense/kernel": 1}
_EXPERTS = re.compile(r"(.*/)?(?P<kernel>wi|wi_0|wi_1|wo)")


@dataclasses.dataclass(frozen=True)
class Padding:
    """The end of each of the parts that lie side by side on one axis of a leaf.

    Attributes:
        axis: The axis.
        parts: Number of parts, all of one size: 2 if gate and up are one leaf.
        held: Size of each part with its padding.
        true: Size of each part without.
    """

    axis: int
    parts: int
    held: int
    true: int

    def stacked(self, scan_axis: int, count: int) -> "Padding":
        """Returns the same for a stack of such leaves.

        Args:
            scan_axis: First scan axis of the stack.
            count: Number of scan axes.
        """
        return dataclasses.replace(self, axis=self.axis + count if self.axis >= scan_axis else self.axis)

    def held_shape(self, shape: Shape) -> Shape:
        """Returns the padded shape of a leaf, given the shape without; any other shape is returned unchanged."""
        if shape[self.axis : self.axis + 1] != (self.parts * self.true,):
            return shape
        return (*shape[: self.axis], self.parts * self.held, *shape[self.axis + 1 :])

    def cut(self, leaf: Any) -> Any:
        """Returns a leaf without the padding."""
        pieces = [self._slice(leaf, part * self.held, part * self.held + self.true) for part in range(self.parts)]
        return pieces[0] if len(pieces) == 1 else lax.concatenate(pieces, self.axis)

    @property
    def places(self) -> tuple[tuple[slice, ...], ...]:
        """The index of the padding in each part."""
        ends = [(part * self.held + self.true, (part + 1) * self.held) for part in range(self.parts)]
        return tuple((*[slice(None)] * self.axis, slice(*end)) for end in ends)

    def _slice(self, leaf: Any, start: int, stop: int) -> Any:
        return lax.slice_in_dim(leaf, start, stop, axis=self.axis)


def padding_of(path: str, shape: Shape, config: ModelConfig) -> Padding | None:
    """Returns the padding of one layer's own leaf; None if it is as wide as the model, or no rule knows it.

    Experts are padded to `padded_base_moe_mlp_dim`; the vocabulary is, where the leaf has more rows than `vocab_size`.

    Args:
        path: Path relative to the layer, or below the root.
        shape: Shape of the leaf.
        config: Says the true sizes.
    """
    if (axis := _VOCABULARY.get(path)) is not None and len(shape) == 2:
        held, true = shape[axis], config.vocab_size
        return Padding(axis, 1, held, true) if held > true else None
    match = _EXPERTS.fullmatch(path)
    held, true = config.padded_base_moe_mlp_dim, config.moe_mlp_dim
    if match is None or len(shape) != 3 or held <= true:
        return None
    axis, parts = 1 if match["kernel"] == "wo" else 2, 2 if match["kernel"] == "wi" else 1
    return Padding(axis, parts, held, true) if shape[axis] == parts * held else None


def padded_leaves(groups: Iterable[LayerGroup], config: ModelConfig) -> dict[str, Padding]:
    """Returns the padding of every leaf that has one, stacks as they are, by path below the root.

    Args:
        groups: The trainer's tree.
        config: Says the true sizes.
    """
    found: dict[str, Padding] = {}
    for group in groups:
        for path, leaf, axis in zip(group.paths, group.shapes, group.scan_axes, strict=True):
            count = len(group.scan)
            own = tuple(leaf.shape[:axis]) + tuple(leaf.shape[axis + count :])
            if padding := padding_of(path, own, config):
                found |= {layer.path(path): padding.stacked(axis, count) for layer in group.layers}
    return found
