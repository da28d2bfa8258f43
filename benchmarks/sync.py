"""Syncs of a tree of over 2 GB into an engine's buffers, and a thousand syncs of a tiny one.

    python benchmarks/sync.py [--model gemma4]       (more than five minutes)

Every row runs in a process of its own. Extra memory is the highest resident size sampled during a warm sync, less what
the process held before it: trainer and engine, both. The copy is `np.copyto` of what the engine holds, copies on
several devices included, into touched memory, in the same process.
"""

import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import record
from jax.sharding import Mesh, NamedSharding
from measure import TP, _resident, timed
from rich import box
from rich.console import Console
from rich.table import Table
from trees import MODELS, random_tree

import portax
from portax.testing.golden import Tree

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden"
ROWS = {  # devices, the engine's first one, whether a sync is atomic
    "in place, 4 devices": (4, 0, False),
    "in place, 8 devices": (8, 0, False),
    "4 devices to 4 others": (8, 4, False),
    "atomic, 8 devices": (8, 0, True),
}
TINY, TIMES = "qwen3-0.6b.scan", 1000


def engine_state(converter, on):
    """Ones, as the engine holds its weights."""
    entries = converter.plan(converter.expected_tree(dtype=jnp.bfloat16)).entries
    ones = {entry.name: (entry.shape, entry.dtype, NamedSharding(on, entry.spec)) for entry in entries}
    return {
        name: jax.jit(lambda shape=shape, dtype=dtype: jnp.ones(shape, dtype), out_shardings=sharding)()
        for name, (shape, dtype, sharding) in ones.items()
    }


def measured(row, model, repeat):
    """Figures of one row."""
    devices, first, atomic = ROWS[row]
    jax.config.update("jax_num_cpu_devices", devices)
    engine = jax.devices()[first:]
    on = Mesh(np.array(engine).reshape(-1, TP), ("data", "model"))
    layout = portax.layouts.TpuInference(version="0.32", tp=TP)
    converter = portax.converter_for(model.config, layout=layout)
    state = engine_state(converter, on)
    params = random_tree(model, jax.devices()[: first or devices])
    sync = portax.WeightSync(converter, state, atomic=atomic)
    report, once, _ = timed(1, lambda: sync(params))
    report, warm, peaks = timed(repeat, lambda: sync(params))
    sizes = [shard.data.size for leaf in state.values() for shard in leaf.addressable_shards]
    buffers = [(np.ones(n, np.uint16), np.ones(n, np.uint16)) for n in sizes]
    _, copies, _ = timed(repeat, lambda: [np.copyto(to, source) for to, source in buffers])
    return {
        "first_s": once[0],
        "warm_s": warm,
        "copy_s": copies,
        "written_bytes": sum(to.nbytes for to, _ in buffers),
        "moved_bytes": report.bytes_moved,
        "extra_bytes": max(peaks),
        "job_bytes": max(job.nbytes for job in converter.conversion(params).calls(2**30)),
    }


def many():
    """Seconds and memory over many syncs of a tiny model on one device."""
    tree = Tree.load(GOLDEN / TINY / "source.json")
    converter = portax.converter_for(tree.config, layout=portax.layouts.TpuInference(version="0.32", tp=1))
    state = engine_state(converter, Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model")))
    params = jax.device_put(tree.fill())
    sync, seconds, resident = portax.WeightSync(converter, state), [], []
    for _ in range(TIMES + 1):
        seconds.append(sync(params).total_seconds)
        resident.append(_resident())
    return {"seconds": seconds[1:], "resident": resident[1:], "arrays": len(jax.live_arrays())}


def child(*arguments):
    """The figures of one process."""
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Measures as told on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-moe")
    parser.add_argument("--repeat", type=int, default=5)
    record.add_json(parser)
    parser.add_argument("--row", choices=[*ROWS, "many"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if args.row:
        print(json.dumps(many() if args.row == "many" else measured(args.row, MODELS[args.model], args.repeat)))
        return
    rows = {row: child("--row", row, "--model", args.model, "--repeat", str(args.repeat)) for row in ROWS}
    tiny = child("--row", "many")
    shown = Table(box=box.SIMPLE, title=f"{MODELS[args.model].title}, bfloat16, tp {TP}")
    for column in ("sync", "first s", "warm s", "x copy", "GB written", "GB between devices", "extra GB", "job GB"):
        shown.add_column(column, justify="left" if column == "sync" else "right")
    for row, found in rows.items():
        warm, copy = statistics.median(found["warm_s"]), statistics.median(found["copy_s"])
        sizes = [found[f"{what}_bytes"] / 1e9 for what in ("written", "moved", "extra", "job")]
        shown.add_row(row, f"{found['first_s']:.2f}", f"{warm:.2f}", f"{warm / copy:.1f}", *(f"{x:.2f}" for x in sizes))
    console = Console(width=120)
    console.print(shown)
    early, late = (statistics.median(part) * 1e3 for part in (tiny["seconds"][:100], tiny["seconds"][-100:]))
    growth = (tiny["resident"][-1] - tiny["resident"][99]) / 1e6
    console.print(
        f"{TIMES} syncs of {TINY}, one device: {early:.2f} ms each at first, {late:.2f} ms at last (medians of 100); "
        f"resident memory grew by {growth:.1f} MB from the 100th to the last"
    )
    console.print(f"{record.machine()}, JAX {jax.__version__}, Python {platform.python_version()}")
    record.write(args.json, {"model": args.model, "rows": rows, "many": tiny})


if __name__ == "__main__":
    main()
