"""Reports of a sync: versions, seconds of each phase, bytes, and the remains of a failed one."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from portax._text.names import fold
from portax._text.tables import new_table, plural, render, size

PHASES = ("plan", "compile", "convert", "transfer", "assign", "verify")


class _Report:
    """Common to all reports: the form for machines."""

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it, as plain values by name."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def to_json(self) -> str:
        """Returns all of it, as one JSON object."""
        return json.dumps(self.to_dict(), indent=1)


@dataclasses.dataclass(frozen=True)
class Torn(_Report):
    """The state that a failed sync left behind; the next complete one mends it.

    Attributes:
        new: Leaves that hold the weights of the failed sync.
        old: Leaves that hold the weights of an earlier sync, or were never written.
        lost: Leaves without usable values: freed, given to a program that did not finish, or found wrong.
        cause: The error that ended the sync.
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
    """A comparison of the engine's leaves with those that a trainer's parameters give.

    Attributes:
        leaves: Number of compared leaves.
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
        version: Number of completed syncs, this one included.
        leaves: Number of written leaves.
        seconds: Time of each phase: plan, compile, convert, transfer, assign, verify. If buckets move while others
            convert, transfer is the additional wait.
        bytes_read: Bytes of the trainer's leaves.
        bytes_written: Bytes of the engine's leaves.
        bytes_moved: Bytes that devices had to receive from each other, estimated from the shardings of both sides; see
            `received_bytes` in `portax.sync.transfer`.
        peak_bytes: Highest memory use of any device since the process began; None if the backend does not tell.
        verification: The comparison afterwards; None without `verify`.
        left: Leaves of the trainer that `leave=` leaves out.

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
        """Seconds of all phases together."""
        return sum(self.seconds.values())

    @property
    def gb_per_s(self) -> float:
        """Bytes written, in GB (powers of ten), per second of convert, transfer and assign."""
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
        """Returns all of it, as plain values by name."""
        return super().to_dict() | {"gb_per_s": self.gb_per_s}


def peak_bytes(devices: Iterable[jax.Device]) -> int | None:
    """Returns the highest memory use of any of these devices so far; None if the backend does not tell."""
    stats = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
    peaks = [found["peak_bytes_in_use"] for found in stats if found and "peak_bytes_in_use" in found]
    return max(peaks, default=None)
