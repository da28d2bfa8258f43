"""Engines' live states, made of what the goldens say: shapes alone, or arrays with random bits."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from conftest import GOLDEN, engine_mesh
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from portax.testing.golden import Golden, compare


def grid(first, count, **axes):
    return Mesh(np.array(jax.devices()[first : first + count]).reshape(tuple(axes.values())), tuple(axes))


def golden_of(name, tp):
    """`tp` as in the file's name: 2, or `4.adp2.ep`."""
    return Golden.load(GOLDEN / name / f"tpu-inference-0.32.0.tp{tp}.json")


def scrambled(name, tp, on, seed=0):
    """A live engine's state, its own leaves included, with random bits in every leaf."""
    rows = json.loads((GOLDEN / name / f"tpu-inference-0.32.0.tp{tp}.json").read_text())["leaves"]
    return noise(
        {
            path: jax.ShapeDtypeStruct(
                row["shape"], row["dtype"], sharding=NamedSharding(on, PartitionSpec(*row["spec"]))
            )
            for path, row in rows.items()
        },
        seed,
    )


def scramble(state, names, seed):
    state |= noise({path: state[path] for path in names}, seed)


def noise(like, seed):
    random = np.random.default_rng(seed)
    values = {path: random.standard_normal(leaf.shape).astype(leaf.dtype) for path, leaf in like.items()}
    return owned(values, {path: leaf.sharding for path, leaf in like.items()})


def owned(values, shardings):
    """On the devices, in buffers of their own: `device_put` may leave values in numpy's memory."""
    copied = copies(tuple(shardings.values()))([jax.device_put(values[path], to) for path, to in shardings.items()])
    return dict(zip(shardings, copied, strict=True))


@functools.cache
def copies(shardings):
    return jax.jit(lambda leaves: [*map(jnp.copy, leaves)], out_shardings=[*shardings])


def wrong(state, golden):
    owned = {path: leaf for path, leaf in state.items() if path not in golden.engine_owned}
    return [f"{row.name}: {row.difference}" for row in compare(owned, golden) if row.difference]


def addresses(leaf):
    return [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]


def other(params):
    return {path: jax.device_put(np.asarray(leaf) * 2 + 1, leaf.sharding) for path, leaf in params.items()}


def engine_state(name, tp=2):
    """A live engine's leaves as it would hold them, its own included: shapes, dtypes and shardings of the golden."""
    rows = json.loads((GOLDEN / name / f"tpu-inference-0.32.0.tp{tp}.json").read_text())["leaves"]
    on = engine_mesh(tp)
    return {
        leaf: jax.ShapeDtypeStruct(
            tuple(row["shape"]), jnp.dtype(row["dtype"]), sharding=NamedSharding(on, PartitionSpec(*row["spec"]))
        )
        for leaf, row in rows.items()
    }
