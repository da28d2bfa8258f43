"""The demo: converts shipped MaxText trees and compares every leaf with the real engine's digests."""

import dataclasses
import pathlib
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from portax.config.shipped import nearest, package_folder
from portax.converters import converter_for
from portax.errors import ConfigError
from portax.layouts import Layout
from portax.testing.doctor import Check, examine
from portax.testing.golden import Comparison, Golden, Tree, compare

DEVICES = 8
TENSOR_PARALLEL = (1, 2, 4, 8)
ENGINES = {"tpu-inference": "tpu-inference-0.32.0", "maxtext-vllm": "maxtext-vllm-0.32.0"}
"""Names of the goldens of an engine, by its name: tpu-inference's models on torchax, or MaxText's own."""
_USUAL = ("qwen3-0.6b", "qwen3-8b", "qwen3-30b-a3b", "gemma4-26b")


@dataclasses.dataclass(frozen=True)
class Run:
    """One conversion of the demo.

    Attributes:
        model: MaxText's name of the model.
        tp: Tensor-parallel size of the engine.
        engine: The engine, by name and version.
        rows: The comparison of every leaf with the engine's digest.
        seconds: Seconds to plan, compile and convert.
    """

    model: str
    tp: int
    engine: str
    rows: list[Comparison]
    seconds: float

    @property
    def exact(self) -> bool:
        """True if no leaf differs."""
        return not any(row.difference for row in self.rows)


def goldens(engine: str) -> dict[str, pathlib.Path]:
    """Returns the folders with an engine's goldens, by MaxText's name of the model; of scanned trees, if possible."""
    folders = package_folder("goldens", "tests/golden").iterdir()
    sizes = [f"{ENGINES[engine]}.tp{tp}.json" for tp in TENSOR_PARALLEL]
    trees = sorted((folder for folder in folders if all((folder / size).exists() for size in sizes)), reverse=True)
    return {path.name.rpartition(".")[0]: path for path in sorted(trees, key=lambda path: path.suffix == ".scan")}


def all_models(engine: str) -> list[str]:
    """Returns MaxText's names of all shipped trees that this engine was run with."""
    return sorted(goldens(engine))


def examination(model: str, tp: int, engine: str) -> Iterator[Check]:
    """Runs the doctor on a made-up engine; the last check compares its state with the real engine's digests.

    Args:
        model: MaxText's name of a shipped tree.
        tp: Tensor-parallel size of the engine.
        engine: One of `ENGINES`.

    Raises:
        ConfigError: The model is not shipped.
    """
    tree, golden = _shipped(model, tp, engine)
    devices = np.array(jax.devices()[:DEVICES])
    mesh = _mesh(golden.layout)
    params = {path: _fsdp(leaf, Mesh(devices, ("fsdp",))) for path, leaf in tree.fill().items()}
    converter = converter_for(tree.config, layout=golden.layout)
    state = {
        name: jax.device_put(np.ones(leaf.shape, leaf.dtype), NamedSharding(mesh, leaf.spec or PartitionSpec()))
        for name, leaf in golden.leaves.items()
    }
    state |= {
        name: jax.device_put(np.ones(1, np.float32), NamedSharding(mesh, PartitionSpec()))
        for name in golden.engine_owned
    }
    yield from examine(converter, state, params)
    rows = compare({name: state[name] for name in golden.leaves}, golden)
    wrong = [row.name for row in rows if row.difference]
    found = f"{len(wrong)} of {len(rows)} leaves differ" if wrong else f"{len(rows)} leaves, all exact"
    yield Check(f"the state is what {ENGINES[engine]} holds, by its digests", not wrong, found)


def _shipped(model: str, tp: int, engine: str) -> tuple[Tree, Golden]:
    known = goldens(engine)
    if model not in known:
        raise ConfigError(f"the demo has no tree of {model!r} for {engine}; {nearest(model, all_models(engine))}")
    return Tree.load(known[model] / "source.json"), Golden.load(known[model] / f"{ENGINES[engine]}.tp{tp}.json")


def _mesh(layout: Layout) -> Mesh:
    """Returns a mesh of all devices, with the axes that the layout cuts weights over and one that repeats them."""
    sizes = layout.mesh_axes
    return Mesh(np.array(jax.devices()[:DEVICES]).reshape(-1, *sizes.values()), ("data", *sizes))


def runs(models: list[str], engine: str) -> Iterator[Run]:
    """Converts each model for tp 1, 2, 4 and 8 on eight devices.

    Args:
        models: MaxText's names of shipped trees; none for those of a usual run.
        engine: One of `ENGINES`.

    Raises:
        ConfigError: A model is not shipped.
    """
    devices = np.array(jax.devices()[:DEVICES])
    chosen = [(model, [_shipped(model, tp, engine) for tp in TENSOR_PARALLEL]) for model in models or _USUAL]
    for model, cases in chosen:
        tree, _ = cases[0]
        params = {path: _fsdp(leaf, Mesh(devices, ("fsdp",))) for path, leaf in tree.fill().items()}
        for tp, (_, golden) in zip(TENSOR_PARALLEL, cases, strict=True):
            mesh = _mesh(golden.layout)
            start = time.perf_counter()
            converter = converter_for(tree.config, layout=golden.layout, mesh=mesh)
            weights = jax.block_until_ready(converter.convert(params))
            seconds = time.perf_counter() - start
            yield Run(model, tp, ENGINES[engine], compare(weights, golden), seconds)


def _fsdp(leaf: np.ndarray, mesh: Mesh) -> jax.Array:
    """Cuts a leaf over all devices on its longest axis that they divide."""
    cuttable = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
    spec: list[str | None] = [None] * leaf.ndim
    if cuttable:
        spec[max(cuttable, key=lambda axis: leaf.shape[axis])] = "fsdp"
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))
