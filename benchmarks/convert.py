"""Warm conversion of a tree of over 2 GB: portax, its peers, numpy by hand and a plain copy, in one run.

    python benchmarks/convert.py --model qwen3-moe       (about a quarter of an hour)
    python benchmarks/convert.py --model gemma4

Every converter runs in processes of its own, in turn, a peer's in an environment that is made on the first run, with a
Python 3.12: MaxText's of 700 MB for Qwen3, and 4 GB, by `uv`, for Gemma4, whose converter calls tpu-inference; Tunix's
of 1.3 GB. The copy is `np.copyto` of as many bytes into touched memory, in the same process. "numpy" is that layout by
hand: copies between views of raw bits, on one thread (`by_hand.py`). "portax-stream" makes buckets of 268 MB and drops
each. "portax-fp8" is what an engine holds that loaded fp8 blocks and quantised them again. "tunix" is the transfer that
Tunix makes of MaxText's weights to MaxText's model inside vLLM, which has w13 fused and padded, and q, k and v apart.

Each row is measured twice. "Kept" is with a malloc that keeps what is freed, as the allocators of accelerators do.
"Fresh" is with memory handed back between calls: then the system's page faults, the same for every converter, take
more time than the conversion. The peak is from there.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

import record
from rich import box
from rich.console import Console
from rich.table import Table
from trees import MODELS

HERE = pathlib.Path(__file__).parent
PEER = ["maxtext==0.2.5"]
PEER_NEEDS = ["jax==0.11.1", "flax==0.12.9", "jaxtyping"]  # what its converters import
TUNIX = ["google-tunix==0.1.7"]
KEEP_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000:glibc.malloc.arena_max=1"
ROWS = {  # converter, devices, whether results go onto the engine's mesh
    "qwen3-moe": (
        ("portax", 1, False),
        ("portax-stream", 1, False),
        ("portax-fp8", 1, False),
        ("numpy", 1, False),
        ("maxtext", 1, False),
        ("maxtext-table", 1, False),
        ("tunix", 1, False),
        ("portax", 8, False),
        ("portax-stream", 8, False),
        ("maxtext", 8, False),
        ("maxtext-table", 8, False),
        ("portax", 8, True),
    ),
    "gemma4": (
        ("portax", 1, False),
        ("portax-stream", 1, False),
        ("numpy", 1, False),
        ("maxtext", 1, False),
        ("portax", 8, False),
        ("portax-stream", 8, False),
        ("maxtext", 8, False),
    ),
}


def working_python(name: str) -> str:
    """An interpreter of this name that can make environments: on PATH, or one of pyenv's; not a shim of none."""
    versions = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv")) / "versions"
    pyenv = sorted(versions.glob(f"{name.removeprefix('python')}*/bin/{name}")) if name.startswith("python") else []
    for candidate in (name, *map(str, pyenv)):
        found = shutil.which(candidate)
        if found and not subprocess.run([found, "-c", "import venv"], check=False, capture_output=True).returncode:
            return found
    raise SystemExit(f"no working {name} found, to make the peers' environments with: name another one, --python")


def environment(converter: str, model: str) -> pathlib.Path:
    """Where a peer's environment is, or will be."""
    name = "tunix" if converter == "tunix" else "engine" if model == "gemma4" else "maxtext"
    return HERE / f".venv-{name}"


def peer_python(converter: str, model: str, python: str) -> str:
    """The interpreter of a peer's environment, which is made if it is not there."""
    home = environment(converter, model)
    name = home.name.removeprefix(".venv-")
    inside = home / "bin" / "python"
    if inside.exists():
        return str(inside)
    if name == "engine":
        uv = ["uv", "pip", "install", "-q", "--python", inside]
        steps = [[HERE.parent / "oracle" / "install_engine.sh", home, "0.32.0"], [*uv, "--no-deps", *PEER]]
    else:
        pip = [inside, "-m", "pip", "install", "-q"]
        packages = [TUNIX] if name == "tunix" else [["--no-deps", *PEER], PEER_NEEDS]
        steps = [[working_python(python), "-m", "venv", home], *([*pip, *what] for what in packages)]
    for step in steps:
        subprocess.run(step, check=True)
    return str(inside)


def check_tools(peers: set[str], model: str, python: str) -> None:
    """Ends the benchmark before it begins, if a peer's environment has to be made and cannot be."""
    missing = {environment(peer, model) for peer in peers if not (environment(peer, model) / "bin/python").exists()}
    if HERE / ".venv-engine" in missing and shutil.which("uv") is None:
        raise SystemExit("no uv found, which makes the engine's environment: https://docs.astral.sh/uv")
    if missing - {HERE / ".venv-engine"}:
        working_python(python)


def measure(python: str, model: str, row: tuple[str, int, bool], repeat: int, *, keep: bool) -> dict:
    """Figures of one process."""
    converter, devices, engine_mesh = row
    command = [python, "-W", "ignore", str(HERE / "measure.py"), converter, "--model", model, "--devices", str(devices)]
    command += ["--repeat", str(repeat), *(["--engine-mesh"] if engine_mesh else [])]
    environment = {**os.environ, "GLIBC_TUNABLES": KEEP_MEMORY} if keep else None
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def median(result: dict, memory: str, what: str = "warm_s") -> float:
    """Median of one figure, under one kind of memory."""
    return statistics.median(result[memory][what])


def table(model: str, results: list[dict]) -> Table:
    """One row per converter and number of devices."""
    shown = Table(box=box.SIMPLE_HEAD, title=f"{MODELS[model].title}, bfloat16, tp 4")
    for column in ("devices", "converter", "results on", "first s", "compile s", "programs"):
        shown.add_column(column, justify="left" if column in ("converter", "results on") else "right")
    for memory in ("kept", "fresh"):
        for column in ("warm s", "x copy", "x portax"):
            shown.add_column(f"{memory}: {column}", justify="right")
    shown.add_column("peak extra / output", justify="right")
    own = {r["devices"]: r for r in results if r["converter"] == "portax" and not r["mesh"]}
    for r in results:
        cells = [str(r["devices"]), r["converter"], "engine's mesh" if r["mesh"] else "trainer's mesh"]
        cells += [f"{r['fresh']['first_s']:.1f}", f"{r['fresh']['compile_s']:.1f}"]
        cells += [f"{r['fresh']['programs']} + {r['fresh']['programs_later']}"]
        for memory in ("kept", "fresh"):
            warm, seconds = median(r, memory), r[memory]["warm_s"]
            cells += [f"{warm:.2f} ({min(seconds):.2f}-{max(seconds):.2f})"]
            ours = own.get(r["devices"])
            cells += [
                f"{warm / median(r, memory, 'copy_s'):.1f}",
                f"{warm / median(ours, memory):.1f}" if ours else "-",
            ]
        shown.add_row(*cells, f"{r['fresh']['peak_extra_bytes'] / r['fresh']['output_bytes']:.2f}")
    return shown


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=ROWS, default="qwen3-moe")
    parser.add_argument(
        "--python", default="python3.12", help="Python 3.12 or newer to make the peers' environments with"
    )
    parser.add_argument(
        "--converters",
        nargs="+",
        default=["portax", "portax-stream", "portax-fp8", "numpy", "maxtext", "maxtext-table", "tunix"],
        metavar="NAME",
    )
    parser.add_argument("--repeat", type=int, default=5, help="warm calls of each converter")
    record.add_json(parser)
    args = parser.parse_args()
    interpreters = dict.fromkeys(("portax", "portax-stream", "portax-fp8", "numpy"), sys.executable)
    peers = {row[0] for row in ROWS[args.model] if row[0] in args.converters} - interpreters.keys()
    check_tools(peers, args.model, args.python)
    console = Console(width=210)
    results = []
    for converter, devices, mesh in (row for row in ROWS[args.model] if row[0] in args.converters):
        if converter not in interpreters:
            interpreters[converter] = peer_python(converter, args.model, args.python)
        with Console(stderr=True).status(f"{converter}, {devices} devices"):
            python = interpreters[converter]
            kept = measure(python, args.model, (converter, devices, mesh), args.repeat, keep=True)
            fresh = measure(python, args.model, (converter, devices, mesh), args.repeat, keep=False)
        results.append({"converter": converter, "devices": devices, "mesh": mesh, "kept": kept, "fresh": fresh})
    console.print(f"{record.machine()}; medians of {args.repeat}")
    console.print(table(args.model, results))
    record.write(args.json, {"model": args.model, "rows": results})


if __name__ == "__main__":
    main()
