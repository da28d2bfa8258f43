"""One of several processes that sync together: `test_processes.py` starts them. Writes what it found as JSON to FOLDER."""

import functools
import json
import os
import pathlib
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import portax
from portax.testing.golden import Tree

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def spread(leaves, mesh, specs):
    """Global arrays of which every process holds its part, in buffers of its own."""
    shardings = {path: NamedSharding(mesh, spec) for path, spec in specs.items()}
    placed = {
        path: jax.make_array_from_callback(
            leaf.shape, shardings[path], lambda at, leaf=leaf: leaf[at], dtype=leaf.dtype
        )
        for path, leaf in leaves.items()
    }
    if mesh.local_devices:  # else there is nothing here that could be copied
        placed = jax.jit(lambda leaves: jax.tree.map(jnp.copy, leaves), out_shardings=shardings)(placed)
    return placed


def cut(leaf, mesh):
    axes, spec = list(mesh.shape.items()), [None] * leaf.ndim
    for i in reversed(range(leaf.ndim)):
        if axes and leaf.shape[i] % axes[-1][1] == 0:
            spec[i] = axes.pop()[0]
    return PartitionSpec(*spec)


def places(leaf):
    return [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]


@functools.cache
def case(name):
    """A converter and a tree."""
    tree = Tree.load(GOLDEN / name / "source.json")
    layout = portax.layouts.TpuInference(version="0.32", tp=2)
    return portax.converter_for(tree.config, layout=layout), tree.fill()


def join(rank, count, port):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // count)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)


def two_syncs(folder, name, where, *, verify):
    devices = np.array(jax.devices())
    trainers, engines = {
        "together": (devices, devices),
        "apart": np.split(devices, 2),
        "many to few": np.split(devices, [6]),
    }[where]
    trainer = Mesh(trainers.reshape(-1, 2), ("fsdp", "tensor"))
    engine = Mesh(engines.reshape(-1, 2), ("data", "model"))
    converter, host = case(name)
    rows = json.loads((GOLDEN / name / "tpu-inference-0.32.0.tp2.json").read_text())["leaves"]
    params = spread(host, trainer, {path: cut(leaf, trainer) for path, leaf in host.items()})
    ones = {name: np.ones(row["shape"], jnp.dtype(row["dtype"])) for name, row in rows.items()}
    state = spread(ones, engine, {name: PartitionSpec(*row["spec"]) for name, row in rows.items()})
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event.endswith("backend_compile_duration"))
    )
    sync = portax.WeightSync(converter, state, verify=verify)
    sync(params)
    again, before = sum(compiled), {name: places(leaf) for name, leaf in state.items()}
    report = sync(params)
    again, moved = sum(compiled) - again, [name for name, leaf in state.items() if places(leaf) != before[name]]
    wrong = [
        name
        for name, leaf in load_file(folder / f"{name}.safetensors").items()
        for shard in state[name].addressable_shards
        if np.asarray(shard.data).tobytes() != leaf[shard.index].tobytes()
    ]
    return {
        "version": report.version,
        "verified": str(report.verification),
        "wrong": wrong,
        "compiled again": again,
        "elsewhere": moved,
    }


if __name__ == "__main__":
    rank, count, port, folder, *cases = sys.argv[1:]
    join(int(rank), int(count), port)
    found = [two_syncs(pathlib.Path(folder), *case.split(":"), verify=count == "2") for case in cases]
    (pathlib.Path(folder) / f"found-{rank}.json").write_text(json.dumps(found))
