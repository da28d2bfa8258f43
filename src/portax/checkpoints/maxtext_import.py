"""`import_checkpoint`: writes a checkpoint for MaxText from the hub's tensors."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from portax._text.report import Progress, Report, no_progress
from portax._text.tables import plural, size, text_lines
from portax.checkpoints.atomic_dir import atomic_dir, check_space, refuse_existing
from portax.checkpoints.dequantised import dequantised, is_quantised
from portax.checkpoints.orbax_writer import ITEM, NewArray, Stores, chunk_shape, write_checkpoint
from portax.converters.base import BaseConverter
from portax.errors import CheckpointError
from portax.execution.inverse import Restoration
from portax.trainer.flatten import Leaf

if TYPE_CHECKING:
    from rich.console import RenderableType

_ROOT = "params/params/"  # under which MaxText 0.2.5 writes parameters, and looks for them


@dataclasses.dataclass(frozen=True)
class Import(Report):
    """The report of an import.

    Attributes:
        folder: The folder of the import.
        items: The folder for MaxText's `load_parameters_path`.
        leaves: Number of leaves.
        nbytes: Bytes of all leaves, before compression.
        seconds: Duration of the import.
    """

    folder: str
    items: str
    leaves: int
    nbytes: int
    seconds: float

    def __rich__(self) -> "RenderableType":
        return text_lines(
            [
                f"{plural(self.leaves, 'leaf', 'leaves')}, {size(self.nbytes)}, written to {self.folder}",
                f"{self.seconds:.1f} s, {size(round(self.nbytes / self.seconds))}/s",
                f"for MaxText: load_parameters_path={pathlib.Path(self.items).absolute()}",
            ]
        )


def import_checkpoint(
    converter: BaseConverter,
    weights: Mapping[str, Leaf],
    folder: str | os.PathLike,
    *,
    scanned: bool = True,
    dtype: Any = None,
    dequantize: bool = False,
    progress: Progress = no_progress,
) -> Import:
    """Restores the trainer's tree and writes it as an Orbax checkpoint for MaxText, a layer at a time.

    Each chunk of a stack holds one layer, so that layers are written, and read, separately. The output gets its final
    name only when it is complete; until then it grows in a folder beside it, `.NAME.unfinished`, which is removed after
    an error.

    Args:
        converter: The converter, with the layout of `weights`, such as `HuggingFace()`.
        weights: As for `converter.restore`: a dict, or a `Checkpoint` of safetensors.
        folder: The folder to write; must not exist.
        scanned: True stacks the layers, as MaxText does with `scan_layers=true`.
        dtype: Dtype of the leaves; None keeps that of the tensors.
        dequantize: True turns quantised weights into the bfloat16 products of values and scales; otherwise they are
            refused.
        progress: Called with the number of bytes written since its last call, and the total.

    Returns:
        A report.

    Raises:
        PlanError: As `converter.restore`; before anything is written.
        LayoutError: As `converter.restore`.
        CheckpointError: The weights are quantised without `dequantize`, or the reverse; the folder exists or cannot be
            written, the disk has no space, `weights` cannot be read, or Orbax is not installed.

    Example:
        >>> hub = portax.converter_for(config, layout=portax.layouts.HuggingFace())
        >>> portax.import_checkpoint(hub, hub.convert(params), "qwen3-maxtext").items
        'qwen3-maxtext/items'
    """
    start = time.perf_counter()
    folder = pathlib.Path(folder)
    refuse_existing(folder)
    restoration = converter.restoration(unquantised(weights, dequantize=dequantize), scanned=scanned, dtype=dtype)

    def fill(stores: Stores) -> None:
        for layer, leaves in restoration:
            stores.write({_ROOT + path: (restoration.at(layer, path), leaf) for path, leaf in leaves.items()})
            progress(sum(leaf.nbytes for leaf in leaves.values()), restoration.nbytes)

    with atomic_dir(folder, None) as unfinished:
        check_space(unfinished, restoration.nbytes)
        write_checkpoint(unfinished, new_arrays(restoration), fill, {"scan_layers": scanned})
    seconds = time.perf_counter() - start
    return Import(str(folder), str(folder / ITEM), len(restoration.leaves), restoration.nbytes, seconds)


def unquantised(weights: Mapping[str, Any], *, dequantize: bool) -> Mapping[str, Any]:
    """Returns the weights of a checkpoint, none of them quantised.

    Args:
        weights: As for `import_checkpoint`.
        dequantize: Likewise.

    Raises:
        CheckpointError: They are quantised and are not to be dequantised, or the reverse.
    """
    if dequantize:
        return dequantised(weights)
    if is_quantised(weights):
        raise CheckpointError(
            "the weights of this checkpoint are quantised, and a trainer wants them as they were before: take that "
            "checkpoint, or pass dequantize=True (--dequantize) for bfloat16 products of values and scales"
        )
    return weights


def new_arrays(restoration: Restoration) -> tuple[NewArray, ...]:
    """Returns the arrays of an import, under MaxText's names, with their chunks on disk."""
    return tuple(
        NewArray(_ROOT + path, leaf.shape, leaf.dtype, chunk_shape(leaf.shape, leaf.dtype, restoration.scan_axes[path]))
        for path, leaf in restoration.leaves.items()
    )
