"""Syncs of several real processes under `jax.distributed`, each with its part of every array."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest

WORKER = pathlib.Path(__file__).parent / "process_worker.py"
DENSE, MOE = "qwen3-8b.scan", "qwen3-30b-a3b.scan"


def run(count, cases):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", WORKER, str(rank), str(count), str(port), *cases],
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
    ("count", "cases"),
    [
        (2, {f"{MOE}:together": 39, f"{DENSE}:apart": 35}),
        (4, {f"{DENSE}:together": None, f"{DENSE}:apart": None, f"{DENSE}:many to few": None}),
    ],
)
def test_trainer_and_engine_on_the_same_processes_and_on_different_ones(count, cases):
    clean = {"version": 2, "wrong": [], "compiled again": 0, "elsewhere": []}
    verified = [leaves and f"{leaves} leaves, all equal" for leaves in cases.values()]
    good = [{**clean, "verified": str(text)} for text in verified]
    assert run(count, cases) == [good] * count
