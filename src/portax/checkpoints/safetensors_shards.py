"""Shards of a planned checkpoint: names, headers and offsets, all known before a byte is written."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping

from portax.checkpoints.safetensors_reader import CODES
from portax.planning.plan import Entry

_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes:
        name: Its name: `model-00001-of-00004.safetensors`.
        header: Its first bytes: the length of the header, and the header.
        offsets: Position of each tensor in the file, in bytes.
        nbytes: Bytes of the whole file.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int

    @property
    def tensor_bytes(self) -> int:
        """Bytes of its tensors."""
        return self.nbytes - len(self.header)

    def is_whole(self, folder: pathlib.Path) -> bool:
        """Tells whether a folder holds the complete file: its header, and all of its bytes."""
        path = folder / self.name
        if not path.is_file() or path.stat().st_size != self.nbytes:
            return False
        with path.open("rb") as file:
            return file.read(len(self.header)) == self.header


def make_shards(entries: Iterable[Entry], shard_bytes: int) -> tuple[Shard, ...]:
    """Cuts a checkpoint into files, in the order in which its tensors are made.

    Args:
        entries: Its tensors.
        shard_bytes: Most bytes of tensors in a file; a larger tensor has a file of its own.
    """
    cuts = [*_cut(entries, shard_bytes)]
    return tuple(_shard(f"model-{i:05}-of-{len(cuts):05}.safetensors", cut) for i, cut in enumerate(cuts, 1))


def index(shards: Iterable[Shard]) -> str:
    """Returns the content of `model.safetensors.index.json`."""
    shards = tuple(shards)
    total = sum(shard.tensor_bytes for shard in shards)
    weight_map = {name: shard.name for shard in shards for name in shard.offsets}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def _cut(entries: Iterable[Entry], most: int) -> Iterator[list[Entry]]:
    cut: list[Entry] = []
    size = 0
    for entry in entries:
        if cut and size + entry.nbytes > most:
            yield cut
            cut, size = [], 0
        cut.append(entry)
        size += entry.nbytes
    if cut:
        yield cut


def _shard(name: str, entries: list[Entry]) -> Shard:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):  # so that every tensor is aligned
        starts[entry.name], end = end, end + entry.nbytes
        offsets = [starts[entry.name], end]
        header[entry.name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    first = len(text).to_bytes(8, "little") + text
    return Shard(name, first, {tensor: len(first) + start for tensor, start in starts.items()}, len(first) + end)
