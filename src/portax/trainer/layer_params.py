"""What a hook sees: the leaves of one layer, read by path, checked against the config, sliced on read."""

import functools
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int, Shaped

from portax.config.model_config import ModelConfig
from portax.errors import Problem
from portax.weights import bits, kernels
from portax.weights.scale_shift import ScaleShift

NOWHERE = np.zeros(1, np.int32)

Axes: TypeAlias = tuple[tuple[str, int], ...]
"""What the config calls each axis of a leaf, `layers` for a scan axis, and its size."""


class LayerParams:
    """The trainer's leaves of one layer, or of the model outside its layers.

    Reading one states what it must be: `layer.read("mlp/wo/kernel", "mlp_dim emb_dim")`. A leaf that is missing or of
    another shape or kind is recorded in `problems` and read as zeros of the right shape, so that one pass over all
    hooks finds everything that is wrong; nothing runs while there are problems.

    Attributes:
        config: Where the sizes of the axes come from.
        problems: What has been found wrong so far; leaves are named relative to the layer.
        expected: Axes, in the trainer's form, of every leaf that has been asked for.
        types: What the config says of this layer and not of all the others, e.g. `{"global"}`.
    """

    def __init__(
        self,
        arrays: Mapping[str, Any],
        config: ModelConfig,
        *,
        types: frozenset[str] = frozenset(),
        scan: tuple[int, ...] = (),
        position: Int[Array | np.ndarray, " depth"] = NOWHERE,
        shardings: Mapping[str, NamedSharding] | None = None,
    ):
        """Makes a view.

        Args:
            arrays: The leaves, or the stacks that they are slices of, by path relative to the layer.
            config: The model's configuration.
            types: What is special about the layer.
            scan: Size of each scan axis of the stacks.
            position: Index on each scan axis; `[0]` without one.
            shardings: How the layer's own slice of each leaf is partitioned, where leaves are spread over devices.
        """
        self.config = config
        self.types = types
        self.problems: list[Problem] = []
        self.expected: dict[str, Axes] = {}
        self._arrays = arrays
        self._scan = scan
        self._position = position
        self._shardings = shardings or {}
        self._read: dict[int, tuple[Any, NamedSharding]] = {}

    def __contains__(self, path: str) -> bool:
        """Whether the tree has this leaf; what that decides, the config must permit."""
        return path in self._arrays

    @property
    def paths(self) -> tuple[str, ...]:
        """The leaves that the tree has, whatever the config says."""
        return tuple(self._arrays)

    def take(self, path: str) -> Shaped[Array, "..."]:
        """One leaf of this layer as it is, for who moves it without knowing what it means; bfloat16 as its bits.

        Args:
            path: Path of a leaf that the tree has.
        """
        leaf = self._arrays[path]
        at = self.config.param_scan_axis
        expected = (*leaf.shape[:at], *self._scan, *leaf.shape[at + len(self._scan) :])
        if problem := _problem(path, leaf, expected, f"of a stack of {list(self._scan)} layers on axis {at}"):
            self.problems.append(problem)
            dtype = leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.float32
            own = expected[:at] + expected[at + len(self._scan) :]
            return jnp.broadcast_to(0 * jnp.asarray(leaf).astype(dtype).sum(), own)
        return self._own(path)

    def read(self, path: str, axes: str, scale_shift: ScaleShift | None = None) -> Shaped[Array, "..."]:
        """One leaf of this layer, without its scan axes; bfloat16 comes `bits.to_bits`, for moving, not for arithmetic.

        Args:
            path: Path relative to the layer, e.g. `self_attention/query/kernel`.
            axes: What the config calls the size of each axis, e.g. `emb_dim num_query_heads 2*head_dim`.
            scale_shift: What makes the hub's values of the trainer's, where they differ.
        """
        names = axes.split()
        shape = tuple(self.config.size(name) for name in names)
        at = self.config.param_scan_axis
        sized = [*zip(names, shape, strict=True)]
        sized[at:at] = [("layers", size) for size in self._scan]
        self.expected[path] = tuple(sized)
        expected = tuple(size for _, size in sized)
        leaf = self._arrays.get(path)
        labels = [f"{name}={size}" for name, size in sized]
        kind = f" in a {', '.join(sorted(self.types))} layer" if self.types else ""
        if problem := _problem(path, leaf, expected, f"[{', '.join(labels)}]{kind}"):
            self.problems.append(problem)
            dtype = leaf.dtype if leaf is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.float32
            if leaf is None:
                return jnp.zeros(shape, dtype)
            return jnp.broadcast_to(0 * jnp.asarray(leaf).astype(dtype).sum(), shape)  # a trace shows what it feeds
        return self._own(path, scale_shift)

    def _own(self, path: str, scale_shift: ScaleShift | None = None) -> Shaped[Array, "..."]:
        own = bits.to_bits(jnp.asarray(self._arrays[path]))
        if self._scan:
            at = self.config.param_scan_axis
            own = kernels.unscan(own, self._position, axes=tuple(range(at, at + len(self._scan))))
        if path in self._shardings:  # else XLA may communicate before the cast to bits, and then does it in float32
            own = lax.with_sharding_constraint(own, self._shardings[path])
        own = bits.pin_bits(scale_shift(own) if scale_shift else own, self.zero)
        if path in self._shardings:
            self._read[id(own)] = own, self._shardings[path]
        return own

    def partitioning(self, array: Any) -> NamedSharding | None:
        """How an array is spread over devices; None unless it is a leaf, as it was read, of which that is known."""
        _, sharding = self._read.get(id(array), (None, None))
        return sharding

    @functools.cached_property
    def zero(self) -> Bool[Array, ""]:
        """False, in a way that no compiler can know; see `bits.pin_bits`."""
        return self._position[0] < 0


def _problem(path: str, leaf: Any, expected: tuple[int, ...], labels: str) -> Problem | None:
    if leaf is None:
        return Problem(
            path,
            "nothing",
            f"a leaf of shape {labels}",
            "the tree is of another model or MaxText version, or the config does not describe it",
        )
    if leaf.shape != expected:
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
            "a quantised or packed checkpoint: dequantise it, its scales are not part of this conversion",
        )
    return None
