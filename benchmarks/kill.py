"""Kills exports at moments spread at random over their writing, and looks at what they leave.

    python benchmarks/kill.py [--times 10]      (runs the command twice as often; exit code 1 if a trial fails)

After each kill there must be no folder of the final name, nothing unfinished may load unless all of it is there, and
the same command must go on to exactly the files of an export that nobody disturbed. The checkpoint is tiny.
"""

import argparse
import hashlib
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import portax

CHECKPOINT = pathlib.Path(__file__).parents[1] / "tests" / "checkpoints" / "qwen3-30b-a3b.scan"


def start(out: pathlib.Path) -> subprocess.Popen:
    """The command, in a process of its own; many small files make many moments."""
    options = ("--layout", "hf", "--shard-bytes", "20000", "--bucket-bytes", "20000", "--out", out)
    command = [
        sys.executable,
        "-m",
        "portax",
        "convert",
        CHECKPOINT / "orbax",
        "--config",
        CHECKPOINT / "hf_config.json",
    ]
    return subprocess.Popen([*map(str, (*command, *options))], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def digests(folder: pathlib.Path) -> dict[str, str]:
    """What is in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def wait_for(path: pathlib.Path, process: subprocess.Popen) -> None:
    """Returns when there is such a path."""
    while not path.exists():
        if process.poll() is not None:
            raise SystemExit("the export ended before it began to write")
        time.sleep(0.001)


def loads(folder: pathlib.Path) -> int:
    """How many tensors a folder gives to who opens it."""
    try:
        return len(portax.open_checkpoint(folder))
    except portax.CheckpointError:
        return 0


def trial(work: pathlib.Path, seconds: float, reference: dict[str, str], tensors: int) -> bool:
    """Kills one export so long after it began to write, and starts it again."""
    out, unfinished = work / "out", work / ".out.unfinished"
    process = start(out)
    wait_for(unfinished, process)
    time.sleep(seconds)
    process.kill()
    killed = process.wait() < 0
    there, kept = out.exists(), len([*unfinished.glob("*.safetensors")]) if unfinished.exists() else 0
    honest = loads(unfinished) in (0, tensors) and (not there or digests(out) == reference)
    if not there:
        start(out).wait()
    same = digests(out) == reference and not unfinished.exists()
    sys.stdout.write(
        f"{'killed' if killed else 'ended '} after {seconds:5.2f} s: {kept:3} files whole, final name "
        f"{'there' if there else 'not there'}; {'ok' if honest and same else 'WRONG'}\n"
    )
    shutil.rmtree(out)
    return honest and same


def main() -> int:
    """Runs all trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, metavar="N", help="how often (default: %(default)s)")
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        process = start(work / "out")
        wait_for(work / ".out.unfinished", process)
        begin = time.perf_counter()
        process.wait()
        window = time.perf_counter() - begin
        reference, tensors = digests(work / "out"), loads(work / "out")
        shutil.rmtree(work / "out")
        moments = [window * (i + random.random()) / times for i in range(times)]  # noqa: S311 - no secret
        results = [trial(work, moment, reference, tensors) for moment in moments]
        return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
