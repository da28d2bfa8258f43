"""Eight simulated devices, the goldens, and a counter of compilations."""

import contextlib
import functools
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from portax.cli.main import main
from portax.testing.golden import Tree

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

GOLDEN = pathlib.Path(__file__).parent / "golden"
CHECKPOINTS = pathlib.Path(__file__).parent / "checkpoints"
TREES = sorted(path.parent.name for path in GOLDEN.glob("*/tpu-inference-0.32.0.tp2.json"))


@functools.cache
def tree(name: str) -> Tree:
    return Tree.load(GOLDEN / name / "source.json")


@functools.cache
def filled(name: str) -> dict[str, np.ndarray]:
    return tree(name).fill()


def mesh(**axes: int) -> Mesh:
    count = int(np.prod(list(axes.values())))
    return Mesh(np.array(jax.devices()[:count]).reshape(tuple(axes.values())), tuple(axes))


def engine_mesh(tp: int, attention_dp: int | None = None) -> Mesh:
    """As tpu-inference makes it: of two axes, or, with NEW_MODEL_DESIGN=1, of seven."""
    if attention_dp is None:
        return mesh(data=8 // tp, model=tp)
    model = tp // attention_dp
    return mesh(data=8 // tp, attn_dp=attention_dp, attn_dp_expert=1, expert=1, model=model, dcp=1, pcp=1)


def sharded(params: dict[str, np.ndarray], on: Mesh) -> dict[str, jax.Array]:
    """Every leaf cut on as many of the mesh's axes as its dimensions permit, last dimensions first."""

    def put(leaf):
        axes = list(on.shape.items())
        spec = [None] * leaf.ndim
        for i in reversed(range(leaf.ndim)):
            if axes and leaf.shape[i] % axes[-1][1] == 0:
                spec[i] = axes.pop()[0]
        return jax.device_put(leaf, NamedSharding(on, PartitionSpec(*spec)))

    return {path: put(leaf) for path, leaf in params.items()}


def nested(flat: dict) -> dict:
    root: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return root


def command(*args) -> int:
    """Runs `portax` in this process and returns its exit code."""
    try:
        return main([*map(str, args)])
    except SystemExit as stop:  # argparse's own way out
        return stop.code


class Compilations:
    """Counts programs that the backend compiles, and those that JAX finds on disk instead."""

    def __init__(self):
        self.count = self.from_disk = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        jax.monitoring.register_event_listener(self._look)

    def _listen(self, event: str, duration: float, **_):
        self.count += event.endswith("backend_compile_duration")

    def _look(self, event: str, **_):
        self.from_disk += event.endswith("compilation_cache/cache_hits")

    @contextlib.contextmanager
    def measured(self):
        before = self.count
        box = []
        yield box
        box.append(self.count - before)


@pytest.fixture(scope="session")
def compilations():
    return Compilations()
