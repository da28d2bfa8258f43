"""Reports of a sync: versions, seconds of each phase, bytes, and the remains of a failed one."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from portax._text.names import fold
from portax._text.report import Report
from portax._text.tables import new_table, plural, size, text_lines

if TYPE_CHECKING:
    from rich.console import RenderableType

PHASES = ("plan", "compile", "convert", "transfer", "assign", "verify")


@dataclasses.dataclass(frozen=True)
class Torn(Report):
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

    def __rich__(self) -> "RenderableType":
        counts = ", ".join(f"{len(getattr(self, what))} {what}" for what in ("new", "old", "lost"))
        lost = f"; lost: {', '.join(fold(self.lost))}" if self.lost else ""
        return text_lines([f"torn ({counts}) by {self.cause}{lost}"])


@dataclasses.dataclass(frozen=True)
class Verification(Report):
    """A comparison of the engine's leaves with those that a trainer's parameters give.

    Attributes:
        leaves: Number of compared leaves.
        different: Names of those that differ.
    """

    leaves: int
    different: tuple[str, ...]

    def __rich__(self) -> "RenderableType":
        if not self.different:
            return text_lines([f"{self.leaves} leaves, all equal"])
        names = ", ".join(fold(self.different))
        return text_lines([f"{len(self.different)} of {self.leaves} leaves differ: {names}"])


@dataclasses.dataclass(frozen=True)
class SyncReport(Report):
    """One completed sync. Printed, it is a table.

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
        standstill: Seconds in which the engine's leaves did not belong together, so that it could not serve: of the
            whole writing in place, of the switch alone if the sync is atomic.
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
    standstill: float
    left: tuple[str, ...] = ()

    @property
    def total_seconds(self) -> float:
        """Seconds of all phases together."""
        return sum(self.seconds.values())

    @property
    def gb_per_s(self) -> float:
        """Bytes written, in GB (powers of ten), per second of convert, transfer and assign."""
        spent = writing_seconds(self.seconds)
        return self.bytes_written / spent / 1e9 if spent else 0.0

    def __rich__(self) -> "RenderableType":
        from rich.console import Group

        table = new_table("phase", ("seconds", "right"))
        for phase, seconds in self.seconds.items():
            table.add_row(phase, f"{seconds:.3f}")
        lines = [
            f"version    {self.version}, {self.leaves} leaves",
            f"bytes      {size(self.bytes_read)} read, {size(self.bytes_written)} written, "
            f"{size(self.bytes_moved)} moved between devices; {self.gb_per_s:.2f} GB/s written",
            f"standstill {self.standstill:.3f} s",
        ]
        if self.peak_bytes is not None:
            lines.append(f"peak       {size(self.peak_bytes)} on one device")
        if self.left:
            lines.append(
                f"left out   {plural(len(self.left), 'leaf', 'leaves')} of the trainer: {', '.join(fold(self.left))}"
            )
        if self.verification is not None:
            lines.append(f"verified   {self.verification}")
        return Group(table, text_lines(lines))

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as values for JSON."""
        return super().to_dict() | {"gb_per_s": self.gb_per_s}


def writing_seconds(seconds: Mapping[str, float]) -> float:
    """Returns the seconds of the phases that make weights and write them."""
    return sum(seconds[phase] for phase in ("convert", "transfer", "assign"))


def peak_bytes(devices: Iterable[jax.Device]) -> int | None:
    """Returns the highest memory use of any of these devices so far; None if the backend does not tell."""
    stats = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
    peaks = [found["peak_bytes_in_use"] for found in stats if found and "peak_bytes_in_use" in found]
    return max(peaks, default=None)
