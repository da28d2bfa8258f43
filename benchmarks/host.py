"""What a sync costs the host: the processor time of the calling thread, which on an accelerator runs beside the work.

    python benchmarks/host.py                (1, 8 and 64 simulated devices, some four minutes)

A Qwen3-MoE of 94 layers (849 leaves) so small that its bytes cost next to nothing, synced in place. Beside it, in the
same process: portax's own programs in a bare loop, whose arguments are at hand, and 94 jitted casts of nine small
arrays each, from float32 into donated bfloat16 buffers. "Thread" is the processor time of the calling thread, until
all is ready; "wall" is of simulated devices, which share the processors with it. Medians of calls that took turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import record
from rich import box
from rich.console import Console
from rich.table import Table

TP = 4
LAYERS = 94
CONFIG = {
    "decoder_block": "qwen3_moe",
    "num_decoder_layers": LAYERS,
    "emb_dim": 64,
    "num_query_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 16,
    "mlp_dim": 32,
    "moe_mlp_dim": 32,
    "num_experts": 8,
    "vocab_size": 512,
}
CONTENDERS = ("sync in place", "its programs, in a bare loop", "jitted casts, in a bare loop")


def contenders(devices: int) -> dict[str, Callable[[], None]]:
    """The three, ready to be called."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import portax

    tp = min(TP, devices)
    trainer = Mesh(np.array(jax.devices()), ("fsdp",))
    engine = Mesh(np.array(jax.devices()).reshape(-1, tp), ("data", "model"))
    converter = portax.converter_for(CONFIG, layout=portax.layouts.TpuInference(version="0.32", tp=tp))
    params = {}
    for path, leaf in converter.expected_tree(dtype=np.float32).items():
        cut = next((i for i, size in enumerate(leaf.shape) if size == CONFIG["emb_dim"]), None)
        spec = PartitionSpec() if cut is None else PartitionSpec(*[None] * cut, "fsdp")
        params[path] = jax.device_put(np.ones(leaf.shape, leaf.dtype), NamedSharding(trainer, spec))
    state = dict(converter.on(engine).convert(params))
    sync = portax.WeightSync(converter, state, params=params)
    return dict(
        zip(CONTENDERS, (lambda: sync(params), _programs(converter, params, dict(state)), _casts(trainer)), strict=True)
    )


def _programs(converter, params, state) -> Callable[[], None]:
    """The programs of a sync, called with arguments that are at hand; one is in work while the next one is called."""
    import jax
    import jax.numpy as jnp

    held = {name: jnp.copy(leaf) for name, leaf in state.items()}
    conversion = converter.conversion(params)
    mesh = next(iter(held.values())).sharding.mesh
    calls = []
    for call in conversion.calls(2**30):
        targets = tuple(held[name].sharding for name in call.names)
        inputs = conversion.inputs(mesh)
        prepared = conversion.prepare(call, targets, donating=True)
        calls.append((call.names, prepared.program, inputs.arrays(call), prepared.position))

    def run() -> None:
        before: tuple = ()
        for names, program, arrays, position in calls:
            outputs = program(arrays, position, tuple(held[name] for name in names))
            held.update(zip(names, outputs, strict=True))
            jax.block_until_ready(before)
            before = outputs
        jax.block_until_ready(before)

    return run


def _casts(mesh) -> Callable[[], None]:
    """As many casts of as many arrays; nothing is checked, planned or moved."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    sources, held = (
        [[jax.device_put(jnp.ones((64, 16), dtype), sharding) for _ in range(9)] for _ in range(LAYERS)]
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    cast = jax.jit(
        lambda arrays, donors: [array.astype(jnp.bfloat16) for array in arrays],
        donate_argnums=1,
        keep_unused=True,
        out_shardings=[sharding] * 9,
    )

    def run() -> None:
        held[:] = [cast(arrays, donors) for arrays, donors in zip(sources, held, strict=True)]
        jax.block_until_ready(held)

    return run


def measure(devices: int, repeat: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the calling thread, and of the wall, for each contender."""
    runs = contenders(devices)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(repeat + 2):  # two to warm up
        for name, run in runs.items():
            wall, thread = time.perf_counter(), time.thread_time()
            run()
            if turn >= 2:
                times[name].append((time.thread_time() - thread, time.perf_counter() - wall))
    medians = {name: [1e3 * statistics.median(row) for row in zip(*rows, strict=True)] for name, rows in times.items()}
    return {name: {"thread_ms": thread, "wall_ms": wall} for name, (thread, wall) in medians.items()}


def child(devices: int, repeat: int) -> dict[str, dict[str, float]]:
    """The figures of one process, in which so many devices are simulated."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", str(devices), "--repeat", str(repeat)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    """Runs a process for each number of devices and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64], help="default: 1 8 64")
    parser.add_argument("--repeat", type=int, default=9, help="calls of each; default: %(default)s")
    record.add_json(parser)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.repeat)))
        return
    rows = {}
    with Console(stderr=True).status("measuring"):
        for devices in args.devices:
            rows[devices] = child(devices, args.repeat)
    shown = Table(box=box.SIMPLE_HEAD, title=f"{LAYERS} layers, milliseconds; {record.machine()}")
    for column in ("devices", "", "thread", "x casts", "wall"):
        shown.add_column(column, justify="left" if column == "" else "right")
    for devices, found in rows.items():
        least = found[CONTENDERS[-1]]["thread_ms"]
        for name, row in found.items():
            cells = f"{row['thread_ms']:.1f}", f"{row['thread_ms'] / least:.1f}", f"{row['wall_ms']:.0f}"
            shown.add_row(str(devices), name, *cells)
    Console(width=120).print(shown)
    record.write(args.json, {"layers": LAYERS, "repeat": args.repeat, "rows": rows})


if __name__ == "__main__":
    main()
