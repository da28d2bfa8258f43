"""Syncs of several real processes under `jax.distributed`, each with its part of every array."""

import json
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import filled, tree
from safetensors.numpy import save_file

import portax

WORKER = pathlib.Path(__file__).parent / "process_worker.py"
TP2 = portax.layouts.TpuInference(version="0.32", tp=2)
DENSE, MOE = "qwen3-8b.scan", "qwen3-30b-a3b.scan"


def run(count, folder, cases):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", WORKER, str(rank), str(count), str(port), folder, *cases],
            stdout=subprocess.DEVNULL,  # Gloo writes to it, too, at any time
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * count, errors[0][-3000:]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.parametrize(
    ("count", "cases"),
    [
        (2, {f"{MOE}:together": 39, f"{DENSE}:apart": 35}),
        (4, {f"{DENSE}:together": None, f"{DENSE}:apart": None, f"{DENSE}:many to few": None}),
    ],
)
def test_trainer_and_engine_on_the_same_processes_and_on_different_ones(count, cases, tmp_path):
    for name in {case.partition(":")[0] for case in cases}:
        weights = portax.converter_for(tree(name).config, layout=TP2).convert(filled(name))
        save_file({leaf: np.asarray(array) for leaf, array in weights.items()}, tmp_path / f"{name}.safetensors")
    clean = {"version": 2, "wrong": [], "compiled again": 0, "elsewhere": []}
    verified = [leaves and f"{leaves} leaves, all equal" for leaves in cases.values()]
    good = [{**clean, "verified": str(text)} for text in verified]
    assert run(count, tmp_path, cases) == [good] * count
