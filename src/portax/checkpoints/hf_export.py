"""`export`: a converted model on disk, as sharded safetensors that transformers and every engine load."""

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jaxtyping import Array, Shaped

from portax._text.report import Progress, Report, no_progress
from portax._text.tables import plural, size, text_lines
from portax._text.version import portax_version
from portax.checkpoints import config_json, vocab_chunks
from portax.checkpoints.atomic_dir import atomic_dir, check_space, refuse_existing
from portax.checkpoints.file_io import consume_behind, write_text
from portax.checkpoints.reading import Checkpoint
from portax.checkpoints.safetensors_reader import INDEX
from portax.checkpoints.safetensors_shards import Shard, index, make_shards
from portax.checkpoints.safetensors_writer import Part, ShardWriter
from portax.converters.base import BaseConverter
from portax.execution.byte_counts import byte_count
from portax.execution.schedule import schedule
from portax.planning.jax_context import fetch
from portax.planning.plan import Entry, Plan
from portax.trainer.param_tree import Params

if TYPE_CHECKING:
    from rich.console import RenderableType

SHARD_BYTES = 5 * 10**9
BUCKET_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class Export(Report):
    """The report of an export.

    Attributes:
        folder: The folder of the export.
        tensors: Number of tensors.
        shards: Number of files.
        resumed: Number of files that were complete already, from an interrupted export.
        nbytes: Bytes of all tensors.
        seconds: Duration of the export.
        left: Leaves of the trainer that `leave=` leaves out.
    """

    folder: str
    tensors: int
    shards: int
    resumed: int
    nbytes: int
    seconds: float
    left: tuple[str, ...] = ()

    def __rich__(self) -> "RenderableType":
        kept = f", {self.resumed} of them from before" if self.resumed else ""
        files = f"{plural(self.shards, 'file')}{kept}"
        what = f"{plural(self.tensors, 'tensor')}, {size(self.nbytes)} in {files}, written to {self.folder}"
        return text_lines([what, f"{self.seconds:.1f} s, {size(round(self.nbytes / self.seconds))}/s"])


def export(
    converter: BaseConverter,
    params: Params,
    folder: str | os.PathLike,
    *,
    hub_config: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    bucket_bytes: int = BUCKET_BYTES,
    progress: Progress = no_progress,
) -> Export:
    """Converts a model and writes sharded safetensors, their index and a given `config.json`, in bounded memory.

    It needs memory for three buckets and the layer in work; a vocabulary on disk that is larger than a bucket goes in
    pieces. Tensors are written in the order of the trainer's stacks on disk, around the page cache if the file system
    permits. The output gets its final name only when it is complete; until then it grows in a folder beside it,
    `.NAME.unfinished`. Rerun an interrupted export to resume it.

    Args:
        converter: The converter, with the layout of the output.
        params: As for `converter.convert`. Only the export of a `Checkpoint` can be resumed.
        folder: The folder to write; must not exist.
        hub_config: The content of this model's hub `config.json`; it is checked against the plan.
            `quantization_config` is added to it for quantised tensors.
        shard_bytes: Most bytes of tensors in one file.
        bucket_bytes: Bytes to convert and write at a time.
        progress: Called with the number of bytes written since its last call, and the total.

    Returns:
        A report.

    Raises:
        PlanError: As `converter.plan`; before anything is written.
        ConfigError: `hub_config` is of another model, or a size in bytes is invalid.
        QuantizationError: Values cannot be quantised.
        CheckpointError: The folder exists or cannot be written, the disk has no space, or `params` cannot be read.

    Example:
        >>> hub = portax.converter_for(config, layout=portax.layouts.HuggingFace())
        >>> portax.export(hub, portax.open_checkpoint("checkpoint"), "qwen3-hf").shards
        1
    """
    start = time.perf_counter()
    bucket_bytes, shard_bytes = byte_count("bucket_bytes", bucket_bytes), byte_count("shard_bytes", shard_bytes)
    folder = pathlib.Path(folder)
    refuse_existing(folder)
    plan = converter.plan(params)
    if hub_config is not None:
        config_json.check(hub_config, converter, plan)
    work = _Work(converter, params, bucket_bytes)
    shards = make_shards(work.order(), shard_bytes)
    with atomic_dir(folder, _manifest(converter, params, plan, shards)) as unfinished:
        todo = [shard for shard in shards if not shard.is_whole(unfinished)]
        check_space(unfinished, sum(shard.nbytes for shard in todo))
        progress(sum(shard.tensor_bytes for shard in shards if shard not in todo), plan.bytes_out)
        with ShardWriter(unfinished, todo, lambda done: progress(done, plan.bytes_out)) as writer:
            parts = work.parts({name for shard in todo for name in shard.offsets})
            consume_behind(parts, lambda bucket: writer.write(fetch(bucket)))
        write_text(unfinished / INDEX, index(shards))
        if hub_config is not None:
            told = config_json.with_quantization(config_json.with_dtype(hub_config, plan), converter.layout, plan)
            write_text(unfinished / "config.json", json.dumps(told, indent=2) + "\n")
    seconds = time.perf_counter() - start
    resumed = len(shards) - len(todo)
    return Export(str(folder), len(plan.entries), len(shards), resumed, plan.bytes_out, seconds, plan.left)


def _manifest(
    converter: BaseConverter, params: Params, plan: Plan, shards: tuple[Shard, ...]
) -> Mapping[str, Any] | None:
    if not isinstance(params, Checkpoint):
        return None
    return {
        "portax": portax_version(),
        "layout": repr(converter.layout),
        "converter": f"{type(converter).__module__}.{type(converter).__qualname__}",
        "module_prefix": converter.module_prefix,
        "config": dataclasses.asdict(converter.config),
        "source": params.identity,
        "plan": hashlib.sha256(plan.to_json().encode()).hexdigest(),
        "shards": {shard.name: shard.nbytes for shard in shards},
    }


class _Work:
    """The tensors to make, in order: stack by stack, so that only one stack at a time is in the scratch."""

    def __init__(self, converter: BaseConverter, params: Params, bucket_bytes: int):
        self._converter = converter
        self._params = params
        self._bucket_bytes = bucket_bytes
        self._conversion = converter.conversion(params)
        self._in_pieces = vocab_chunks.in_pieces(converter, params, bucket_bytes)

    def order(self) -> Iterator[Entry]:
        """Yields the tensors, in the order in which they are made."""
        whole = {entry.name for entry in self._conversion.plan.entries} - {entry.name for entry in self._in_pieces}
        leaves = self._conversion.tree.leaves
        for call in schedule(
            self._conversion.plan, self._conversion.groups, self._bucket_bytes, whole, stacks_of=leaves
        ):
            yield from call.entries
        yield from self._in_pieces

    def parts(self, names: set[str]) -> Iterator[dict[Part, Shaped[Array, "..."]]]:
        """Yields tensors of these names, a bucket at a time."""
        in_pieces = [entry for entry in self._in_pieces if entry.name in names]
        whole = names.difference(entry.name for entry in in_pieces)
        for bucket in self._conversion.buckets(self._bucket_bytes, whole, by_stack=True):
            yield {(name, 0): leaf for name, leaf in bucket.items()}
        for entry in in_pieces:
            for first, piece in vocab_chunks.pieces(self._converter, self._params, entry, self._bucket_bytes):
                yield {(entry.name, first * entry.nbytes // entry.shape[0]): piece}
            for source in entry.sources:
                self._conversion.tree.rooted[source].release()
