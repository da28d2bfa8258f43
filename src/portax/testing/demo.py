"""The main job on shipped data: real MaxText trees, converted and held against the real engine's digests."""

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
from portax.testing.doctor import Check, examine
from portax.testing.golden import Comparison, Golden, Tree, compare

DEVICES = 8
TENSOR_PARALLEL = (1, 2, 4, 8)
_ENGINE = "tpu-inference-0.32.0"
_USUAL = ("qwen3-0.6b", "qwen3-8b", "qwen3-30b-a3b", "gemma4-26b")


@dataclasses.dataclass(frozen=True)
class Run:
    """One conversion of the demo.

    Attributes:
        model: MaxText's name of the model.
        tp: Tensor-parallel size of the engine.
        engine: The engine, by name and version.
        rows: Every leaf against the engine's digest.
        seconds: Time to plan, compile and convert.
    """

    model: str
    tp: int
    engine: str
    rows: list[Comparison]
    seconds: float

    @property
    def exact(self) -> bool:
        """Whether no leaf differs."""
        return not any(row.difference for row in self.rows)


def goldens() -> dict[str, pathlib.Path]:
    """Folders with `source.json` and engine goldens, by MaxText's name of the model; scanned, if it can be."""
    found = package_folder("goldens", "tests/golden").glob(f"*/{_ENGINE}.tp2.json")
    trees = sorted((golden.parent for golden in found), reverse=True)
    return {path.name.rpartition(".")[0]: path for path in sorted(trees, key=lambda path: path.suffix == ".scan")}


def all_models() -> list[str]:
    """MaxText's names of all shipped trees."""
    return sorted(goldens())


def examination(model: str, tp: int) -> Iterator[Check]:
    """Lets the doctor look at a made-up engine; whether it holds what the real one does, by its digests, comes last.

    Args:
        model: MaxText's name of a shipped tree.
        tp: Tensor-parallel size of the engine.

    Raises:
        ConfigError: The model is not shipped.
    """
    tree, golden = _shipped(model, tp)
    devices = np.array(jax.devices()[:DEVICES])
    mesh = Mesh(devices.reshape(-1, tp), ("data", "model"))
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
    yield Check(f"the state is what {_ENGINE} holds, by its digests", not wrong, found)


def _shipped(model: str, tp: int) -> tuple[Tree, Golden]:
    known = goldens()
    if model not in known:
        raise ConfigError(f"the demo has no tree of {model!r}; {nearest(model, all_models())}")
    return Tree.load(known[model] / "source.json"), Golden.load(known[model] / f"{_ENGINE}.tp{tp}.json")


def runs(models: list[str]) -> Iterator[Run]:
    """Converts each model for tp 1, 2, 4 and 8 on eight devices.

    Args:
        models: MaxText's names of shipped trees; none for those of a usual run.

    Raises:
        ConfigError: A model is not shipped.
    """
    devices = np.array(jax.devices()[:DEVICES])
    chosen = [(model, [_shipped(model, tp) for tp in TENSOR_PARALLEL]) for model in models or _USUAL]
    for model, cases in chosen:
        tree, _ = cases[0]
        params = {path: _fsdp(leaf, Mesh(devices, ("fsdp",))) for path, leaf in tree.fill().items()}
        for tp, (_, golden) in zip(TENSOR_PARALLEL, cases, strict=True):
            mesh = Mesh(devices.reshape(-1, tp), ("data", "model"))
            start = time.perf_counter()
            converter = converter_for(tree.config, layout=golden.layout, mesh=mesh)
            weights = jax.block_until_ready(converter.convert(params))
            seconds = time.perf_counter() - start
            yield Run(model, tp, _ENGINE, compare(weights, golden), seconds)


def _fsdp(leaf: np.ndarray, mesh: Mesh) -> jax.Array:
    """A leaf cut over all devices on its longest axis that they divide."""
    cuttable = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
    spec: list[str | None] = [None] * leaf.ndim
    if cuttable:
        spec[max(cuttable, key=lambda axis: leaf.shape[axis])] = "fsdp"
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))
