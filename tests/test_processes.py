"""Syncs of several real processes under `jax.distributed`, each with its part of every array."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest

WORKER = pathlib.Path(__file__).parent / "process_worker.py"


DENSE, MOE = "qwen3-8b.scan", "qwen3-30b-a3b.scan"


def run(where, count, name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", WORKER, name, where, str(rank), str(count), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [worker.communicate(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * count, outputs[0][1][-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.parametrize(
    ("where", "count", "name"),
    [("together", 2, MOE), ("together", 4, DENSE), ("apart", 2, MOE), ("apart", 4, DENSE), ("many to few", 4, DENSE)],
)
def test_trainer_and_engine_on_the_same_processes_and_on_different_ones(where, count, name):
    verified = "39 leaves, all equal" if count == 2 else "None"
    good = {"version": 2, "verified": verified, "wrong": [], "compiled again": 0, "elsewhere": []}
    assert run(where, count, name) == [good] * count
