"""A model at its real size on one accelerator: convert, stream and sync in place, against a copy on the device.

    python benchmarks/accelerator.py --model qwen3-30b-a3b --layers 24        (on 80 GB)
    python benchmarks/accelerator.py --model gemma4-26b --layers 2 --experts 4 --vocabulary 8192      (small, on a CPU)

Weights are random bits, made on the device in bfloat16; the layout is that of tpu-inference for tp 1. Source and result
are there together, so a device holds about half of its memory's worth of layers. Every figure is the median of warm
calls; GB/s are of what is written, and the copy is `jnp.copy` of every leaf of the result, one program for each shape.
"""

import argparse
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import record
from rich import box
from rich.console import Console
from rich.table import Table

import portax
from portax.config.shipped import config_path, configs

COPIES = 8  # that are there at a time
SMALLER = {"layers": "num_decoder_layers", "experts": "num_experts", "vocabulary": "vocab_size"}


def random_tree(converter: portax.BaseConverter) -> dict[str, jax.Array]:
    """Every leaf of the trainer's tree, of numbers below 2."""

    def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint16) & 0x3FFF, jnp.bfloat16)

    make = jax.jit(bits, static_argnums=1)
    shapes = converter.expected_tree(dtype=jnp.bfloat16)
    return {path: make(jax.random.key(i), leaf.shape) for i, (path, leaf) in enumerate(shapes.items())}


def timed(repeat: int, function: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of the first call, and of warm ones."""
    seconds = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return {"first_s": seconds[0], "warm_s": seconds[1:]}


def peak() -> int | None:
    """Most bytes that were in use on the device so far, where its allocator counts them."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def measured(config: portax.ModelConfig, bucket_bytes: int, repeat: int) -> dict[str, Any]:
    """All rows; those that need least memory come first, because the peak only rises."""
    converter = portax.converter_for(config, layout=portax.layouts.TpuInference(version="0.32", tp=1))
    params = jax.block_until_ready(random_tree(converter))
    plan = converter.plan(params)
    rows: dict[str, dict[str, Any]] = {}

    def stream() -> None:
        for bucket in converter.stream(params, bucket_bytes=bucket_bytes):
            jax.block_until_ready(bucket)

    rows["stream"] = timed(repeat, stream) | {"peak_bytes": peak()}
    rows["convert"] = timed(repeat, lambda: jax.block_until_ready(converter.convert(params))) | {"peak_bytes": peak()}
    state = converter.convert(params)
    sync = portax.WeightSync(converter, state, bucket_bytes=bucket_bytes)
    rows["sync in place"] = timed(repeat, lambda: sync(params)) | {"peak_bytes": peak()}
    copy = jax.jit(jnp.copy)
    leaves = list(state.values())

    def copy_all() -> None:
        for start in range(0, len(leaves), COPIES):
            jax.block_until_ready([copy(leaf) for leaf in leaves[start : start + COPIES]])

    rows["copy"] = timed(repeat, copy_all)
    rows["copy"]["peak_bytes"] = peak()
    return {"rows": rows, "bytes_in": plan.bytes_in, "bytes_out": plan.bytes_out}


def table(found: dict[str, Any]) -> Table:
    """One line for each row."""
    shown = Table(box=box.SIMPLE_HEAD)
    for column in ("", "first s", "warm ms", "GB/s written", "x copy", "peak / (source + result)"):
        shown.add_column(column, justify="right" if column else "left")
    copy = statistics.median(found["rows"]["copy"]["warm_s"])
    for name, row in found["rows"].items():
        warm = statistics.median(row["warm_s"])
        most = row["peak_bytes"]
        share = "not counted" if most is None else f"{most / (found['bytes_in'] + found['bytes_out']):.2f}"
        rate = f"{found['bytes_out'] / warm / 1e9:.1f}"
        shown.add_row(name, f"{row['first_s']:.2f}", f"{warm * 1e3:.1f}", rate, f"{warm / copy:.2f}", share)
    return shown


def main() -> None:
    """Runs all rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [path.stem for path in configs()]
    parser.add_argument("--model", choices=known, default="qwen3-30b-a3b", metavar="NAME", help="one of configs/")
    for name in SMALLER:
        parser.add_argument(f"--{name}", type=int, help="default: the model's")
    parser.add_argument("--bucket-bytes", type=int, default=2**30)
    parser.add_argument("--repeat", type=int, default=5, help="warm calls of each row")
    record.add_json(parser)
    args = parser.parse_args()
    sizes = {field: getattr(args, name) for name, field in SMALLER.items() if getattr(args, name) is not None}
    config = dataclasses.replace(portax.ModelConfig.of(config_path(args.model)), **sizes)
    found = measured(config, args.bucket_bytes, args.repeat)
    device = jax.devices()[0]
    where = f"{device.platform} {device.device_kind}, {record.machine()}"
    versions = f"JAX {jax.__version__}, Python {platform.python_version()}"
    console = Console(width=120)
    gigabytes = f"{found['bytes_in'] / 1e9:.2f} GB in, {found['bytes_out'] / 1e9:.2f} GB out"
    console.print(f"{args.model} {sizes or 'at its real size'}, {gigabytes}; {where}; {versions}")
    console.print(table(found))
    record.write(args.json, {"model": args.model, "sizes": sizes, "device": device.device_kind, **found})


if __name__ == "__main__":
    main()
