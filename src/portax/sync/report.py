"""What a sync did: versions, seconds of each phase, bytes, and what it left behind if it failed."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from portax._text.names import fold
from portax._text.tables import new_table, plural, render, size

PHASES = ("plan", "compile", "convert", "transfer", "assign", "verify")


class _Report:
    """What reports have in common: their form for machines."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, as plain values by name."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def to_json(self) -> str:
        """All of it, as one JSON object."""
        return json.dumps(self.to_dict(), indent=1)


@dataclasses.dataclass(frozen=True)
class Torn(_Report):
    """What a sync that failed half-way left behind; the next complete one mends it.

    Attributes:
        new: Leaves that hold the weights of the failed sync.
        old: Leaves that hold those of an earlier one, or what no sync wrote.
        lost: Leaves that hold nothing of use: freed, or given to a program that did not finish, or found wrong.
        cause: What went wrong.
    """

    new: tuple[str, ...]
    old: tuple[str, ...]
    lost: tuple[str, ...]
    cause: str

    def __str__(self) -> str:
        counts = ", ".join(f"{len(getattr(self, what))} {what}" for what in ("new", "old", "lost"))
        lost = f"; lost: {', '.join(fold(self.lost))}" if self.lost else ""
        return f"torn ({counts}) by {self.cause}{lost}"


@dataclasses.dataclass(frozen=True)
class Verification(_Report):
    """The engine's leaves held against what a trainer's parameters give.

    Attributes:
        leaves: How many were compared.
        different: Names of those that differ.
    """

    leaves: int
    different: tuple[str, ...]

    def __str__(self) -> str:
        if not self.different:
            return f"{self.leaves} leaves, all equal"
        return f"{len(self.different)} of {self.leaves} leaves differ: {', '.join(fold(self.different))}"


@dataclasses.dataclass(frozen=True)
class SyncReport(_Report):
    """One completed sync. Its `str` is a table.

    Attributes:
        version: How many syncs have been completed, this one included.
        leaves: How many leaves were written.
        seconds: Time of each phase, waited for: plan, compile, convert, transfer, assign, verify. Where buckets move
            while others convert, transfer is what was waited for on top.
        bytes_read: Bytes of the trainer's leaves.
        bytes_written: Bytes of the engine's leaves.
        bytes_moved: Bytes that devices had to receive from each other, by how the leaves of both sides are partitioned:
            an estimate, see `received_bytes` in `portax.sync.transfer`.
        peak_bytes: Highest use of any device's memory since the process began, where the backend tells.
        verification: The comparison afterwards; None if none was asked for.
        left: Leaves of the trainer that were left out, as asked for (`leave=`).

    Example:
        >>> report = portax.WeightSync(converter, converter.convert(params))(params)
        >>> report.version, report.leaves
        (1, 19)
    """

    version: int
    leaves: int
    seconds: Mapping[str, float]
    bytes_read: int
    bytes_written: int
    bytes_moved: int
    peak_bytes: int | None
    verification: Verification | None
    left: tuple[str, ...] = ()

    @property
    def total_seconds(self) -> float:
        """All phases together."""
        return sum(self.seconds.values())

    @property
    def gb_per_s(self) -> float:
        """Bytes written over all seconds but those of plan, compile and verify, in GB (powers of ten)."""
        spent = sum(self.seconds[phase] for phase in ("convert", "transfer", "assign"))
        return self.bytes_written / spent / 1e9 if spent else 0.0

    def __str__(self) -> str:
        table = new_table("phase", ("seconds", "right"))
        for phase, seconds in self.seconds.items():
            table.add_row(phase, f"{seconds:.3f}")
        lines = [
            f"version    {self.version}, {self.leaves} leaves",
            f"bytes      {size(self.bytes_read)} read, {size(self.bytes_written)} written, "
            f"{size(self.bytes_moved)} moved between devices; {self.gb_per_s:.2f} GB/s written",
        ]
        if self.peak_bytes is not None:
            lines.append(f"peak       {size(self.peak_bytes)} on one device")
        if self.left:
            lines.append(
                f"left out   {plural(len(self.left), 'leaf', 'leaves')} of the trainer: {', '.join(fold(self.left))}"
            )
        if self.verification is not None:
            lines.append(f"verified   {self.verification}")
        return render(table) + "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as plain values by name."""
        return super().to_dict() | {"gb_per_s": self.gb_per_s}


def peak_bytes(devices: Iterable[jax.Device]) -> int | None:
    """Highest use of any of these devices' memory so far; None where the backend does not tell."""
    stats = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
    peaks = [found["peak_bytes_in_use"] for found in stats if found and "peak_bytes_in_use" in found]
    return max(peaks, default=None)
