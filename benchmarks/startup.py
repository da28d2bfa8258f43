"""What is paid once: imports, the plan of 94 layers, and the first conversion, whose programs JAX can keep on disk.

    python benchmarks/startup.py       (some six minutes)

Every figure is the median of processes of their own, taken in turn. The first conversion is that of a Qwen3-MoE of
4 and of 94 layers with the same weights in each (D 256, 8 experts of width 128, vocabulary 4096), for tp 4 on one
device and on eight; its compile time is what JAX reports of the backend. "From disk" is the same in a new process that
finds the programs of an earlier one in JAX's persistent cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import record
from rich import box
from rich.console import Console
from rich.table import Table

TP = 4
CONFIG = {
    "decoder_block": "qwen3_moe",
    "emb_dim": 256,
    "num_query_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 64,
    "mlp_dim": 128,
    "moe_mlp_dim": 128,
    "num_experts": 8,
    "vocab_size": 4096,
}
CACHE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def first_conversion(layers: int, devices: int) -> dict[str, float]:
    """Figures of this process's first conversion."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import portax

    compiled: list[float] = []
    events: list[str] = []
    layout = portax.layouts.TpuInference(version="0.32", tp=TP)
    mesh = Mesh(np.array(jax.devices()).reshape(-1, TP), ("data", "model")) if devices > 1 else None
    converter = portax.converter_for({**CONFIG, "num_decoder_layers": layers}, layout=layout, mesh=mesh)
    trainer = Mesh(np.array(jax.devices()), ("fsdp",))
    params = {}
    for path, leaf in converter.expected_tree(dtype=jax.numpy.bfloat16).items():
        cut = leaf.shape.index(CONFIG["emb_dim"]) if CONFIG["emb_dim"] in leaf.shape else None
        spec = PartitionSpec() if cut is None else PartitionSpec(*[None] * cut, "fsdp")
        params[path] = jax.device_put(np.ones(leaf.shape, leaf.dtype), NamedSharding(trainer, spec))
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(seconds) if event.endswith("backend_compile_duration") else None
    )
    start = time.perf_counter()
    jax.block_until_ready(converter.convert(params))
    seconds = time.perf_counter() - start
    programs, compile_s = len(compiled), sum(compiled)
    start = time.perf_counter()
    jax.block_until_ready(converter.convert(params))
    return {
        "first_s": seconds,
        "second_s": time.perf_counter() - start,
        "compile_s": compile_s,
        "programs": programs,
        "from_disk": sum(event.endswith("/cache_hits") for event in events),
    }


def plan() -> dict[str, float]:
    """Seconds to plan Qwen3-235B-A22B, from nothing but its configuration, and again."""
    import portax
    from portax.config.shipped import config_path

    config = config_path("qwen3-235b-a22b")
    converter = portax.converter_for(config, layout=portax.layouts.TpuInference(version="0.32", tp=8))
    tree = converter.expected_tree()
    start = time.perf_counter()
    entries = len(converter.plan(tree).entries)
    first = time.perf_counter() - start
    start = time.perf_counter()
    converter.plan(tree)
    return {"entries": entries, "first_s": first, "second_s": time.perf_counter() - start}


def imports() -> dict[str, float]:
    """Seconds to import JAX, and portax beyond it."""
    start = time.perf_counter()
    import jax  # noqa: F401

    between = time.perf_counter()
    import portax  # noqa: F401

    return {"jax_s": between - start, "portax_s": time.perf_counter() - between}


def child(what: str, *numbers: int, cache: str | None = None) -> dict[str, float]:
    """The figures of one process."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    if cache is not None:
        environment |= {**CACHE, "JAX_COMPILATION_CACHE_DIR": cache}
    command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps([what, *numbers])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians of figures of the same names."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def measured(repeat: int) -> dict[str, dict[str, float]]:
    """All rows."""
    rows: dict[str, list[dict[str, float]]] = {}
    child("imports")  # reads the files from disk, and compiles them to bytecode
    with Console(stderr=True).status("measuring"):
        for _ in range(repeat):
            rows.setdefault("imports", []).append(child("imports"))
            rows.setdefault("plan", []).append(child("plan"))
            for devices in (1, 8):
                for layers in (4, 94):
                    with tempfile.TemporaryDirectory() as cache:
                        for form, where in (("compiled", None), ("kept", cache), ("from disk", cache)):
                            found = child("first_conversion", layers, devices, cache=where)
                            rows.setdefault(f"{devices} devices, {layers} layers, {form}", []).append(found)
    return {row: medians(runs) for row, runs in rows.items()}


def main() -> None:
    """Runs all rows and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="processes for each figure; default: %(default)s")
    record.add_json(parser)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, *numbers = json.loads(args.child)
        print(json.dumps({"imports": imports, "plan": plan, "first_conversion": first_conversion}[what](*numbers)))
        return
    rows = measured(args.repeat)
    console = Console(width=120)
    console.print(f"{record.machine()}; medians of {args.repeat}")
    found = rows["imports"]
    console.print(f"import jax {found['jax_s']:.2f} s, portax beyond it {found['portax_s']:.2f} s")
    found = rows["plan"]
    console.print(
        f"plan of Qwen3-235B-A22B, 94 layers, {found['entries']:.0f} leaves: {found['first_s']:.2f} s, "
        f"again {found['second_s'] * 1e3:.0f} ms"
    )
    shown = Table(box=box.SIMPLE_HEAD)
    for column in ("first conversion", "first s", "compile s", "programs", "of them from disk", "second s"):
        shown.add_column(column, justify="left" if column == "first conversion" else "right")
    for row, found in rows.items():
        if "layers" in row:
            seconds = [f"{found['first_s']:.2f}", f"{found['compile_s']:.2f}"]
            counts = [f"{found['programs']:.0f}", f"{found['from_disk']:.0f}"]
            shown.add_row(row, *seconds, *counts, f"{found['second_s']:.3f}")
    console.print(shown)
    record.write(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
