"""The cost of a sync on other devices than these: its programs, compiled ahead of time from shapes alone."""

import collections
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from rich.console import Group, RenderableType

from portax._text.report import Report
from portax._text.tables import new_table, plural, size, text_lines
from portax.analysis.hlo_collectives import received_bytes
from portax.converters.base import BaseConverter
from portax.execution.byte_counts import byte_count
from portax.execution.schedule import ProgramCall
from portax.trainer.logical_axes import partition


@dataclasses.dataclass(frozen=True)
class Chip:
    """The best speeds of one accelerator.

    Attributes:
        name: Its name.
        memory_bytes: Its memory.
        memory_bandwidth: Bytes that it reads and writes per second.
        wire_bandwidth: Bytes that it receives from others of its pod or node per second.
    """

    name: str
    memory_bytes: int
    memory_bandwidth: float
    wire_bandwidth: float


# As their makers publish them; what a program reaches is less.
CHIPS = (
    Chip("TPU v5p", 95 * 10**9, 2765e9, 600e9),
    Chip("TPU v6e", 32 * 10**9, 1600e9, 400e9),
    Chip("H200", 141 * 10**9, 4800e9, 450e9),
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one program; bytes are of one device, in one call.

    Attributes:
        what: Names of the leaves that it makes.
        calls: Number of calls in a sync.
        compile_seconds: Seconds to compile it, on this machine.
        output_bytes: Bytes that it writes.
        received_bytes: Bytes that it receives from other devices, the mean of all; None if they cannot be read.
        temporary_bytes: Bytes that it needs beside arguments and results.
    """

    what: str
    calls: int
    compile_seconds: float
    output_bytes: int
    received_bytes: int | None
    temporary_bytes: int


@dataclasses.dataclass(frozen=True)
class Estimate(Report):
    """Cost of one sync in place; bytes are of one device.

    Attributes:
        trainer: Size of each axis of the trainer's mesh.
        engine: Size of each axis of the engines' mesh, on the same devices.
        source_bytes: Bytes of the trainer's weights.
        costs: Cost of each program.
    """

    trainer: Mapping[str, int]
    engine: Mapping[str, int]
    source_bytes: int
    costs: tuple[Cost, ...]

    @property
    def compile_seconds(self) -> float:
        """Seconds to compile all programs, on this machine."""
        return sum(cost.compile_seconds for cost in self.costs)

    @property
    def output_bytes(self) -> int:
        """Bytes of the engine's weights."""
        return sum(cost.calls * cost.output_bytes for cost in self.costs)

    @property
    def received_bytes(self) -> int | None:
        """Bytes received from other devices, the mean of all; None if they cannot be read."""
        received = [cost.received_bytes and cost.calls * cost.received_bytes for cost in self.costs]
        known = [nbytes for nbytes in received if nbytes is not None]
        return sum(known) if len(known) == len(received) else None

    @property
    def peak_bytes(self) -> int:
        """Bytes of all weights of trainer and engine, and of one program's temporaries: programs run one at a time."""
        return self.source_bytes + self.output_bytes + max(cost.temporary_bytes for cost in self.costs)

    def seconds(self, chip: Chip) -> tuple[float, float | None]:
        """Returns the least seconds for memory, reading and writing everything once, and for the wire."""
        received = self.received_bytes
        wire = None if received is None else received / chip.wire_bandwidth
        return (self.source_bytes + self.output_bytes) / chip.memory_bandwidth, wire

    def __rich__(self) -> RenderableType:
        columns = ("calls", "compile s", "written", "received", "temporaries")
        programs = new_table("program, per device and call", *((column, "right") for column in columns))
        for cost in self.costs:
            programs.add_row(
                cost.what,
                str(cost.calls),
                f"{cost.compile_seconds:.1f}",
                size(cost.output_bytes),
                _or_unknown(cost.received_bytes, size),
                size(cost.temporary_bytes),
            )
        chips = new_table("chip", *((column, "right") for column in ("its memory", "memory ms", "wire ms")))
        for chip in CHIPS:
            memory, wire = self.seconds(chip)
            chips.add_row(chip.name, size(chip.memory_bytes), _milliseconds(memory), _or_unknown(wire, _milliseconds))
        lines = (
            f"trainer       {_axes(self.trainer)}",
            f"engines       {_axes(self.engine)}, on the same devices",
            f"compile       {self.compile_seconds:.1f} s, {plural(len(self.costs), 'program')}",
            f"per device    {size(self.source_bytes)} of the trainer, {size(self.output_bytes)} of the engine, "
            f"peak {size(self.peak_bytes)}; {_or_unknown(self.received_bytes, size)} received",
            "at best, by the bandwidth that each chip's maker publishes:",
        )
        return Group(programs, text_lines(lines), chips)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it, as values for JSON."""
        totals = {
            name: getattr(self, name) for name in ("compile_seconds", "output_bytes", "received_bytes", "peak_bytes")
        }
        chips = {chip.name: dict(zip(("memory_s", "wire_s"), self.seconds(chip), strict=True)) for chip in CHIPS}
        return json.loads(json.dumps({**dataclasses.asdict(self), **totals, "at_best": chips}))


def estimate(
    converter: BaseConverter, trainer: Mesh, engine: Mesh, *, bucket_bytes: int = 2**30, dtype: Any = np.float32
) -> Estimate:
    """Compiles every program of a sync in place.

    Args:
        converter: The converter for the engine.
        trainer: The trainer's mesh; weights are spread over it as MaxText does.
        engine: The engines' mesh, of the same devices.
        bucket_bytes: As for `WeightSync`.
        dtype: Of the trainer's weights.

    Raises:
        ConfigError: `bucket_bytes` is no number of bytes.
        PlanError: The layout cannot hold this model.
    """
    bucket_bytes = byte_count("bucket_bytes", bucket_bytes)
    params = converter.expected_tree(dtype=dtype, partition=partition(trainer))
    conversion = converter.conversion(params)
    source = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in params.values())
    costs = []
    for calls in _alike(conversion.calls(bucket_bytes)):
        call = calls[0]
        targets = tuple(NamedSharding(engine, entry.spec) for entry in call.entries)
        start = time.perf_counter()
        compiled = conversion.compile(call, targets, donating=True)
        seconds = time.perf_counter() - start
        written = sum(
            math.prod(target.shard_shape(entry.shape)) * entry.dtype.itemsize
            for target, entry in zip(targets, call.entries, strict=True)
        )
        everywhere = received_bytes(compiled.as_text() or "", engine.size)
        received = None if everywhere is None else everywhere // engine.size
        memory: Any = compiled.memory_analysis()
        costs.append(Cost(_what(calls), len(calls), seconds, written, received, memory.temp_size_in_bytes))
    return Estimate(dict(trainer.shape), dict(engine.shape), source, tuple(costs))


def least_bytes(
    converter: BaseConverter, params: Mapping[str, jax.ShapeDtypeStruct], targets: Mapping[str, NamedSharding]
) -> int:
    """Returns the bytes of the elements that each device needs and lacks: no algorithm moves fewer.

    Args:
        converter: The converter, which maps the trainer's elements to the engine's.
        params: Shapes of the trainer's weights with their shardings; of less than 2**24 elements.
        targets: Shardings of the engine's leaves, by name.

    Raises:
        ValueError: There are more elements than float32 can number.
    """
    numbered, count = {}, 1
    for path, leaf in params.items():
        numbered[path] = np.arange(count, count + leaf.size, dtype=np.float32).reshape(leaf.shape)
        count += leaf.size
    if count > 2**24:
        raise ValueError(f"{count} elements; numbers are exact below 2**24: take a model of fewer layers, or narrower")
    held: dict[jax.Device, np.ndarray] = collections.defaultdict(lambda: np.zeros(count, bool))
    for path, leaf in params.items():
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            held[device][numbered[path][index].astype(np.int64)] = True
    layout: Any = converter.layout
    numbers = type(converter)(converter.config, layout=dataclasses.replace(layout, dtype=np.float32)).convert(numbered)
    missing = 0
    for name, target in targets.items():
        origin = np.asarray(numbers[name]).astype(np.int64)
        for device, index in target.devices_indices_map(origin.shape).items():
            wanted = np.zeros(count, bool)
            wanted[origin[index]] = True
            wanted[0] = False  # pads
            missing += int(np.count_nonzero(wanted & ~held[device]))
    return missing * np.dtype(layout.dtype).itemsize


def simulated_mesh(axes: Mapping[str, int]) -> Mesh:
    """Makes a mesh of simulated devices."""
    return Mesh(np.array(jax.devices("cpu")[: math.prod(axes.values())]).reshape([*axes.values()]), tuple(axes))


def _alike(calls: Iterable[ProgramCall]) -> list[list[ProgramCall]]:
    """Groups calls of one program."""
    found: dict[Any, list[ProgramCall]] = {}
    for call in calls:
        found.setdefault((id(call.group), call.tensors.start), []).append(call)
    return [*found.values()]


def _what(calls: list[ProgramCall]) -> str:
    first = calls[0]
    part = (
        ""
        if first.tensors.start == 0 and first.last
        else f", tensors {first.tensors.start} to {first.tensors.stop - 1}"
    )
    if first.layer.index is None:
        return f"outside the layers{part}"
    others = f" and {len(calls) - 1} like it" if len(calls) > 1 else ""
    return f"layer {first.layer.index}{others}{part}"


def _or_unknown(value: Any, shown: Callable[[Any], str]) -> str:
    return "?" if value is None else shown(value)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def _axes(sizes: Mapping[str, int]) -> str:
    return f"{math.prod(sizes.values())} devices, {' x '.join(f'{axis} {count}' for axis, count in sizes.items())}"
