"""From one partitioning to another in rounds of pieces: exactly, and in as few bytes as it takes."""

import jax
import numpy as np
import pytest
from conftest import mesh
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from portax.analysis.hlo_collectives import received_bytes
from portax.execution.permute_reshard import exchange

FSDP_TENSOR, MODEL, DATA_MODEL = {"fsdp": 4, "tensor": 2}, {"data": 1, "model": 8}, {"data": 2, "model": 4}


def least_bytes(shape, source, target):
    """Of elements that a device is to hold and has not."""
    numbers = np.arange(np.prod(shape)).reshape(shape)
    before, after = source.devices_indices_map(shape), target.devices_indices_map(shape)
    return 2 * sum(np.setdiff1d(numbers[after[d]], numbers[before[d]]).size for d in after)


@pytest.mark.parametrize(
    ("shape", "trainer", "before", "engine", "after", "rounds"),
    [
        ((4, 16, 32), FSDP_TENSOR, P(None, "fsdp", "tensor"), MODEL, P(None, None, "model"), 4),
        ((4, 32, 16), FSDP_TENSOR, P(None, "tensor", "fsdp"), MODEL, P(None, "model"), 4),
        ((4, 16, 32), FSDP_TENSOR, P(None, "fsdp", "tensor"), DATA_MODEL, P(None, "data", "model"), 2),
        ((16, 32), {"a": 2, "b": 2, "c": 2}, P("c", ("b", "a")), MODEL, P("model"), 4),
        ((8, 16), {"expert": 4, "fsdp": 2}, P("expert", "fsdp"), DATA_MODEL, P("model", "data"), 1),
        ((32, 6), {"tensor": 2, "fsdp": 3}, P("tensor", "fsdp"), {"all": 6}, P(None, "all"), 2),
        ((12, 6), {"tensor": 3, "fsdp": 2}, P(("fsdp", "tensor")), {"all": 6}, P("all"), 1),
    ],
)
def test_every_element_travels_at_most_once(shape, trainer, before, engine, after, rounds):
    source, target = NamedSharding(mesh(**trainer), before), NamedSharding(mesh(**engine), after)
    swap = exchange(shape, source, target)
    assert len(swap.rounds) == rounds
    values = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    program = jax.jit(swap, out_shardings=target).lower(jax.device_put(values, source)).compile()
    moved = program(jax.device_put(values, source))
    np.testing.assert_array_equal(np.asarray(moved), values)
    assert moved.sharding == target
    assert received_bytes(program.as_text(), source.mesh.size) == least_bytes(shape, source, target)


@pytest.mark.parametrize(
    ("shape", "before", "after"),
    [
        ((16, 32), P("fsdp", "tensor"), P("fsdp", "tensor")),  # nothing moves
        ((16, 32), P("fsdp"), P(None, ("fsdp", "tensor"))),  # held twice
        ((16, 32), P(("fsdp", "tensor")), P(None, ("fsdp", "tensor"))),  # one all-to-all
        ((16, 36), P("fsdp", "tensor"), P(None, ("fsdp", "tensor"))),  # does not divide
    ],
)
def test_what_is_left_to_the_compiler(shape, before, after):
    on = mesh(**FSDP_TENSOR)
    assert exchange(shape, NamedSharding(on, before), NamedSharding(on, after)) is None


def test_other_devices_or_another_order_are_left_to_the_compiler():
    source, devices = NamedSharding(mesh(**FSDP_TENSOR), P("fsdp", "tensor")), np.array(jax.devices())
    for other in (devices[:4], devices[::-1]):
        assert exchange((16, 32), source, NamedSharding(Mesh(other, ("all",)), P(None, "all"))) is None


def test_many_rounds_are_left_to_the_compiler(monkeypatch):
    monkeypatch.setattr("portax.execution.permute_reshard.MOST_ROUNDS", 3)
    source = NamedSharding(mesh(**FSDP_TENSOR), P("fsdp", "tensor"))
    assert exchange((64, 64), source, NamedSharding(mesh(**MODEL), P(None, "model"))) is None
