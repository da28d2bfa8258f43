"""Exporting a checkpoint to the hub's format: time and memory, beside a plain copy of the same files.

    python benchmarks/export.py --folder /big/disk       (6 GB; some 20 GB of disk while it runs, and 10 GB of memory)

The checkpoint is that of a dense Qwen3 of scanned layers in float32, saved by Orbax from 16 simulated devices, fully
sharded as trainers do it: every chunk holds a piece of every layer. Each row runs in a process of its own with none of
its files in the page cache, and ends when all is on disk; rows take turns. Memory is the most that was resident, above
an interpreter with the same modules; pages that the system keeps of files for itself are not in it.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import record
from rich import box
from rich.console import Console
from rich.table import Table

DEVICES = 16
CONFIG = {
    "decoder_block": "qwen3",
    "num_decoder_layers": 28,
    "emb_dim": 2048,
    "num_query_heads": 16,
    "num_kv_heads": 8,
    "head_dim": 128,
    "mlp_dim": 6144,
    "vocab_size": 32768,
    "logits_via_embedding": True,
}


ROWS = {"cp -r": None, "export, float32": "float32", "export, bfloat16": "bfloat16"}  # a dtype, or none


def save(path: pathlib.Path, config: dict) -> None:
    """Writes the checkpoint, as a trainer on `DEVICES` devices would."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    import numpy as np
    import orbax.checkpoint as ocp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import portax

    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    rng = np.random.default_rng(0)
    params: dict = {}
    for name, leaf in portax.converter_for(config, layout=portax.layouts.HuggingFace()).expected_tree().items():
        axis = leaf.shape.index(config["emb_dim"]) if config["emb_dim"] in leaf.shape else None
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "fsdp")
        *parents, last = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.device_put(rng.random(leaf.shape, np.float32), NamedSharding(mesh, spec))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(save_concurrent_gb=2)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave({"params": {"params": params}}))


def export(source: pathlib.Path, out: pathlib.Path, config: dict, dtype: str) -> dict[str, float]:
    """Exports in this process and measures it."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    import orbax.checkpoint  # noqa: F401 - the interpreter has it
    import tensorstore  # noqa: F401

    import portax

    jax.numpy.zeros(3).block_until_ready()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    converter = portax.converter_for(config, layout=portax.layouts.HuggingFace(dtype=dtype))
    portax.export(converter, portax.open_checkpoint(source, scratch=out.parent), out)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    memory = (used.ru_maxrss - before) * 1024
    return {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "memory": memory}


def copy(source: pathlib.Path, out: pathlib.Path) -> dict[str, float]:
    """The same with `cp`, waiting for the disk."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)  # noqa: S607
    subprocess.run(["sync", "-f", out], check=True)  # noqa: S607
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu": cpu, "memory": 0}


def forget(folder: pathlib.Path) -> None:
    """Drops the files of a folder from the page cache."""
    subprocess.run(["sync", "-f", folder], check=True)  # noqa: S607
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(what: str, *args: object) -> dict[str, float]:
    """Runs one function of this file in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps([what, *map(str, args)])],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Runs all rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--layers", type=int, default=CONFIG["num_decoder_layers"], help="default: %(default)s, 6 GB")
    parser.add_argument("--vocabulary", type=int, default=CONFIG["vocab_size"], help="default: %(default)s rows")
    parser.add_argument("--rounds", type=int, default=3, help="the median of how many; default: %(default)s")
    record.add_json(parser)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, *rest = json.loads(args.child)
        config = {**CONFIG, "num_decoder_layers": int(rest[-2]), "vocab_size": int(rest[-1])}
        paths = [pathlib.Path(path) for path in rest[:2]]
        if what == "save":
            save(paths[0], config)
        elif what == "export":
            print(json.dumps(export(*paths, config, rest[2])))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measured(pathlib.Path(folder), (args.layers, args.vocabulary), args.rounds)
    Console(width=100).print(table(rows))
    record.write(args.json, {"layers": args.layers, "vocabulary": args.vocabulary, "rows": rows})


def measured(folder: pathlib.Path, sizes: tuple[int, int], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Rounds of a copy, and of exports in each dtype of so many layers and rows of the vocabulary."""
    source, out = folder / "checkpoint", folder / "out"
    made = json.dumps(["save", str(source), *map(str, sizes)])
    subprocess.run([sys.executable, __file__, "--child", made], check=True)
    nbytes = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    rows: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name, dtype in ROWS.items():
            forget(source)
            run = child("export", source, out, dtype, *sizes) if dtype else copy(source, out)
            written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            rows.setdefault(name, []).append({**run, "bytes": nbytes + written})
            forget(out)
            shutil.rmtree(out)
    return rows


def table(rows: dict[str, list[dict[str, float]]]) -> Table:
    """The median round of each row, and the most memory of any."""
    shown = Table("", "seconds", "CPU s", "read + written, GB/s", "x cp", "memory, GB", box=box.SIMPLE_HEAD)
    baseline = 0.0
    for name, runs in rows.items():
        middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
        seconds = middle["seconds"]
        baseline = baseline or seconds
        rate = middle["bytes"] / seconds / 1e9
        memory = max(run["memory"] for run in runs) / 1e9
        shown.add_row(
            name, f"{seconds:.1f}", f"{middle['cpu']:.1f}", f"{rate:.2f}", f"{seconds / baseline:.2f}", f"{memory:.2f}"
        )
    return shown


if __name__ == "__main__":
    main()
