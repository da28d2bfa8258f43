"""`TpuEngine`: common to the layouts of tpu-inference's two implementations."""

import dataclasses
import functools
import importlib.metadata
import re
from typing import Any, ClassVar, TypeAlias, TypeVar

from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from portax.errors import LayoutError
from portax.layouts.base import Layout
from portax.weights import blocks, kernels

Release: TypeAlias = tuple[int, int]
Axes: TypeAlias = str | tuple[str, ...]

_Engine = TypeVar("_Engine", bound="TpuEngine")

AXIS = "model"
_EXPERT_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class TpuEngine(Layout):
    """A version of tpu-inference on a mesh with an axis `model`; subclasses have `moe_backend` and `allow_untested`.

    Attributes:
        version: tpu-inference's version, e.g. `0.32` or `0.32.0`.
        tp: Tensor-parallel size, as the engine is asked for it.
        oldest: The first release whose layout is known.
        newest: The last one.
        moe_backends: The kernels for experts whose layout is known.
    """

    version: str
    tp: int
    oldest: ClassVar[Release]
    newest: ClassVar[Release]
    moe_backends: ClassVar[tuple[str, ...]]

    @classmethod
    def installed(cls: type[_Engine], *, tp: int, **options: Any) -> _Engine:
        """Returns the layout of the tpu-inference that is installed here.

        Args:
            tp: Tensor-parallel size.
            **options: Other attributes.

        Raises:
            LayoutError: tpu-inference is not installed, or its version is not in the table.
        """
        example = f'{cls.__name__}(version="{release_text(cls.newest)}", tp={tp})'
        return cls(version=installed_version("tpu-inference", example), tp=tp, **options)

    def _check(self, *, moe_backend: str, allow_untested: bool) -> None:
        """Raises a `LayoutError` for a version, size or backend that is unknown."""
        must_be_positive("tp", self.tp)
        if moe_backend not in self.moe_backends:
            raise LayoutError(f"moe_backend={moe_backend!r} is unknown; known: {', '.join(self.moe_backends)}")
        newer = self._release > self.newest
        if self._release < self.oldest or (newer and not allow_untested):
            raise LayoutError(self._out_of_table(newer=newer))

    @functools.cached_property
    def _release(self) -> Release:
        match = re.match(r"(\d+)\.(\d+)(\.|\D|$)", self.version) if isinstance(self.version, str) else None
        if match is None:
            example = release_text(self.newest)
            raise LayoutError(f"version={self.version!r} is not a version of tpu-inference, such as {example!r}")
        return int(match[1]), int(match[2])

    def _out_of_table(self, *, newer: bool) -> str:
        oldest, newest = release_text(self.oldest), release_text(self.newest)
        table = f"the known layouts, {oldest} to {newest}" if oldest != newest else f"those of this layout, {newest}"
        known = f"tpu-inference {self.version} is not among {table}"
        if not newer:
            return f"{known}; older engines hold weights in other ways: upgrade the engine"
        return (
            f"{known}; it may hold weights differently. Pin the engine (pip install 'tpu-inference=={newest}.*'), "
            "upgrade portax, or pass allow_untested=True to use the newest known layout"
        )

    def _spec(self, *axes: Axes | None) -> PartitionSpec:
        return PartitionSpec() if self.tp == 1 else PartitionSpec(*axes)

    def _fused_w13(self, block: blocks.FusedMoE, *, shards: int) -> Shaped[Array, "experts in fused"]:
        """Gate and up side by side for each shard, as the grouped matrix product wants them."""
        if block.gate.shape[2] % shards:
            raise LayoutError(f"{block.name}: MoE width {block.gate.shape[2]} is not divisible by tp={self.tp}")
        return kernels.fuse_w13(block.gate, block.up, shards=shards, multiple=_EXPERT_MULTIPLE)


def installed_version(package: str, example: str) -> str:
    """Returns the version of an engine's package.

    Args:
        package: Its name.
        example: A layout that names the version, for the error.

    Raises:
        LayoutError: The package is not installed.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise LayoutError(
            f"{package} is not installed here, so its version cannot be read; install it, or name the version of the "
            f"engine: {example}"
        ) from None


def must_be_positive(what: str, value: Any) -> None:
    """Raises a `LayoutError` unless the value is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LayoutError(f"{what}={value!r} is not a positive integer")


def release_text(release: Release) -> str:
    """Writes a release: `0.32`."""
    return f"{release[0]}.{release[1]}"
