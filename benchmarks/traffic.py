"""Bytes between devices, read off compiled programs, against the least that any algorithm must move; nothing is timed.

    python benchmarks/traffic.py                   (four pairs of meshes on 8 simulated devices, a minute or two)
    python benchmarks/traffic.py --devices 256     (the same at 256: some minutes)
    python benchmarks/traffic.py --fp8             (to engines that loaded a checkpoint of fp8 blocks)

One layer and the vocabulary of a Qwen3-MoE (D 512, 16 experts of width 256, 16 heads, 8 KV heads, vocabulary 4096),
bfloat16. The trainer's weights are spread as MaxText spreads them. The least is the elements that a device is to hold
and has not. "Written" is what the engine holds; temporaries are the largest program's, beside arguments and results.
"""

import argparse
import math
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import jax
import jax.numpy as jnp
import record
from jax.sharding import NamedSharding
from rich import box
from rich.console import Console
from rich.table import Table

import portax
from portax.analysis.cost_model import estimate, least_bytes, simulated_mesh
from portax.trainer.logical_axes import partition

CONFIG = {
    "decoder_block": "qwen3_moe",
    "num_decoder_layers": 1,
    "emb_dim": 512,
    "num_query_heads": 16,
    "num_kv_heads": 8,
    "head_dim": 64,
    "mlp_dim": 256,
    "moe_mlp_dim": 256,
    "num_experts": 16,
    "vocab_size": 4096,
}
PAIRS = (  # the trainer's mesh, less its fsdp axis; tp; how experts are held
    ({}, 4, "gmm_tp"),
    ({}, 8, "gmm_tp"),
    ({"tensor": 2}, 8, "gmm_tp"),
    ({"expert": 4}, 4, "gmm_ep"),
)


FP8 = portax.layouts.Quantization(checkpoint="fp8-block", scale_form="narrow")


def measure(devices: int, quantization: object, other: dict[str, int], tp: int, backend: str) -> dict:
    """Figures of one pair, per device."""
    cut = next(iter(other.values()), 1)
    trainer, engine = {"fsdp": devices // cut, **other}, {"data": devices // tp, "model": tp}
    layout = portax.layouts.TpuInference(version="0.32", tp=tp, moe_backend=backend, quantization=quantization)
    converter = portax.converter_for(CONFIG, layout=layout)
    source, target = simulated_mesh(trainer), simulated_mesh(engine)
    cost = estimate(converter, source, target, dtype=jnp.bfloat16)
    least = None  # of what is computed no element can be followed
    if quantization is None:
        params = converter.expected_tree(dtype=jnp.bfloat16, partition=partition(source))
        entries = converter.plan(params).entries
        least = least_bytes(converter, params, {entry.name: NamedSharding(target, entry.spec) for entry in entries})
    return {
        "trainer": trainer,
        "engine": engine,
        "moe_backend": backend,
        "least": least and least / devices,
        "received": cost.received_bytes,
        "written": cost.output_bytes,
        "temporaries": max(row.temporary_bytes for row in cost.costs),
        "temporaries_of_output": max(row.temporary_bytes / row.output_bytes for row in cost.costs),
    }


def table(rows: list[dict]) -> Table:
    """One row per pair."""
    shown = Table(box=box.SIMPLE_HEAD, title="MB per device")
    for column in ("trainer", "engine", "experts"):
        shown.add_column(column)
    for column in ("least", "received", "x least", "written", "x written", "temporaries", "x the program's output"):
        shown.add_column(column, justify="right")
    for row in rows:
        meshes = [", ".join(f"{axis} {size}" for axis, size in row[side].items()) for side in ("trainer", "engine")]
        least, received, written = row["least"] or math.nan, row["received"], row["written"]
        cells = [f"{least / 1e6:.3f}", f"{received / 1e6:.3f}", f"{received / least:.2f}", f"{written / 1e6:.3f}"]
        cells += [f"{received / written:.2f}", f"{row['temporaries'] / 1e6:.3f}", f"{row['temporaries_of_output']:.2f}"]
        shown.add_row(*meshes, row["moe_backend"], *cells)
    return shown


def main() -> None:
    """Compiles everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8, help="how many to simulate (default: %(default)s)")
    parser.add_argument("--fp8", action="store_true", help="quantise, as an engine does")
    record.add_json(parser)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    with Console(stderr=True).status("compiling ..."):
        rows = [measure(args.devices, FP8 if args.fp8 else None, *pair) for pair in PAIRS]
    console = Console(width=180)
    console.print(f"{args.devices} simulated devices, JAX {jax.__version__}")
    console.print(table(rows))
    record.write(args.json, {"devices": args.devices, "rows": rows})


if __name__ == "__main__":
    main()
