"""Warm conversion of a 2 GB Qwen3-MoE tree: portax, MaxText's converters and a plain copy, in one run.

    python benchmarks/convert.py

Every converter runs in processes of its own, in turn, MaxText's in an environment that is made on the first run (it
needs a Python 3.12 and some 700 MB). The copy is `np.copyto` of as many bytes into touched memory, in the same process.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

from rich import box
from rich.console import Console
from rich.table import Table

HERE = pathlib.Path(__file__).parent
PEER = ["maxtext==0.2.5"]
PEER_NEEDS = ["jax==0.11.1", "flax==0.12.9", "jaxtyping"]  # what its converters import
ROWS = (
    ("portax", 1, False),
    ("maxtext", 1, False),
    ("maxtext-table", 1, False),
    ("portax", 8, False),
    ("maxtext", 8, False),
    ("maxtext-table", 8, False),
    ("portax", 8, True),
)


def peer_python(python: str) -> str:
    """The interpreter of MaxText's environment, which is made if it is not there."""
    home = HERE / ".venv-maxtext"
    inside = home / "bin" / "python"
    if not inside.exists():
        subprocess.run([python, "-m", "venv", home], check=True)
        pip = [inside, "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "--no-deps", *PEER], check=True)
        subprocess.run([*pip, *PEER_NEEDS], check=True)
    return str(inside)


def measure(python: str, converter: str, devices: int, engine_mesh: bool, repeat: int) -> dict:
    """Figures of one process."""
    command = [python, "-W", "ignore", str(HERE / "measure.py"), converter, "--devices", str(devices)]
    command += ["--repeat", str(repeat), *(["--engine-mesh"] if engine_mesh else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(results: list[dict]) -> Table:
    """One row per converter and number of devices."""
    shown = Table(box=box.SIMPLE_HEAD, title="Qwen3-MoE, 8 layers, 32 experts, D 1024, F 768, bfloat16, tp 4")
    for column in ("devices", "converter", "results on", "first s", "compile s", "programs", "warm s", "GB/s"):
        shown.add_column(column, justify="left" if column in ("converter", "results on") else "right")
    for column in ("x copy", "x portax", "peak extra / output"):
        shown.add_column(column, justify="right")
    own = {
        r["devices"]: statistics.median(r["warm_s"]) for r in results if r["converter"] == "portax" and not r["mesh"]
    }
    for r in results:
        warm, copy = statistics.median(r["warm_s"]), statistics.median(r["copy_s"])
        shown.add_row(
            str(r["devices"]),
            r["converter"],
            "engine's mesh" if r["mesh"] else "trainer's mesh",
            f"{r['first_s']:.1f}",
            f"{r['compile_s']:.1f}",
            f"{r['programs']} + {r['programs_later']}",
            f"{warm:.2f} ({min(r['warm_s']):.2f}-{max(r['warm_s']):.2f})",
            f"{r['output_bytes'] / warm / 1e9:.2f}",
            f"{warm / copy:.1f}",
            f"{warm / own[r['devices']]:.1f}",
            f"{r['peak_extra_bytes'] / r['output_bytes']:.2f}",
        )
    return shown


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", default="python3.12", help="Python 3.12 or newer to make MaxText's environment with"
    )
    parser.add_argument("--repeat", type=int, default=5, help="warm calls of each converter")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write all figures here")
    args = parser.parse_args()
    interpreters = {"portax": sys.executable}
    console = Console(width=170)
    results = []
    for converter, devices, mesh in ROWS:
        if converter not in interpreters:
            interpreters[converter] = peer_python(args.python)
        with Console(stderr=True).status(f"{converter}, {devices} devices"):
            figures = measure(interpreters[converter], converter, devices, mesh, args.repeat)
        results.append({"converter": converter, "devices": devices, "mesh": mesh, **figures})
    console.print(f"{os.cpu_count()} cores of {platform.machine()}, {platform.platform()}; medians of {args.repeat}")
    console.print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
