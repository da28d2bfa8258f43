"""The doctor: proves a sync on a live state. It scrambles the state, syncs, and checks every leaf."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Shaped
from rich.table import Table

from portax._text.names import fold
from portax._text.tables import new_table
from portax.converters.base import BaseConverter
from portax.planning.jax_context import each_in_own_context
from portax.sync.engine_state import EngineLeaves, EngineState
from portax.sync.fingerprint import fingerprints, places
from portax.sync.weight_sync import WeightSync
from portax.trainer.param_tree import Params


@dataclasses.dataclass(frozen=True)
class Check:
    """A condition that a sync must fulfil.

    Attributes:
        what: The condition, in words.
        passed: True if it holds.
        found: The finding, in words.
    """

    what: str
    passed: bool
    found: str


def examine(converter: BaseConverter, engine_state: EngineLeaves, params: Params, **options: Any) -> Iterator[Check]:
    """Scrambles the leaves that a trainer owns, syncs, and checks every leaf of the engine; twice.

    The state holds the trainer's weights afterwards. Do not run it while the engine serves.

    Args:
        converter: The converter for the engine.
        engine_state: The live mapping.
        params: The trainer's parameters.
        **options: Of `WeightSync`.

    Raises:
        PlanError: The engine holds other leaves than the converter makes.
    """
    return each_in_own_context(_examined(converter, engine_state, params, **options))


def _examined(converter: BaseConverter, engine_state: EngineLeaves, params: Params, **options: Any) -> Iterator[Check]:
    sync = WeightSync(converter, engine_state, **options)
    engine = EngineState(engine_state)
    written = {entry.name for entry in converter.plan(params).entries}
    owned = {name: leaf for name, leaf in engine.leaves().items() if name not in written}
    for round_ in (1, 2):
        for number, name in enumerate(sorted(written)):
            engine.assign({name: _scrambled(engine.leaves()[name], round_ * len(written) + number)})
        before = engine.leaves()
        marks = dict(zip(written, fingerprints(before[name] for name in written), strict=True))
        addresses = {name: _addresses(before[name]) for name in written}
        report = sync(params)
        after = engine.leaves()
        stale = [
            name
            for name, mark in zip(written, fingerprints(after[name] for name in written), strict=True)
            if mark in (None, marks[name])
        ]
        yield Check(f"sync {round_}: every trainer-owned leaf is new", not stale, _tally(stale, len(written)))
        moved = [name for name in written if _addresses(after[name]) != addresses[name]]
        what = f"sync {round_}: every one lives in the buffer of the leaf it replaces"
        yield Check(what, not moved or options.get("atomic", False), _tally(moved, len(written)))
        touched = [name for name, leaf in owned.items() if after[name] is not leaf]
        yield Check(f"sync {round_}: no engine-owned leaf was touched", not touched, _tally(touched, len(owned)))
        yield Check(f"sync {round_} counted", report.version == round_, f"version {report.version}")
    verification = sync.verify(params)
    yield Check("every trainer-owned leaf holds the trainer's weights", not verification.different, str(verification))


def table(checks: Sequence[Check], *, title: str) -> Table:
    """Returns a table of the conditions and the findings.

    Args:
        checks: The checks.
        title: Text above the table.
    """
    shown = new_table("what must hold", "", "found", title=title)
    for check in checks:
        shown.add_row(check.what, "[green]yes[/]" if check.passed else "[red]NO[/]", check.found)
    return shown


def _scrambled(leaf: Shaped[Array, "..."], seed: int) -> Shaped[Array, "..."]:
    with jax.transfer_guard_host_to_device("allow"):  # a number, also where a trainer forbids transfers
        return _noise(leaf.shape, leaf.dtype, leaf.sharding)(seed)


@functools.cache
def _noise(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Any:
    def noise(seed):
        mixed = (places(shape) + jnp.uint32(seed) * np.uint32(0x9E3779B9)) * np.uint32(0x85EBCA6B)
        return ((mixed >> 8).astype(jnp.float32) / 2**24).astype(dtype)

    return jax.jit(noise, out_shardings=sharding)


def _addresses(leaf: Shaped[Array, "..."]) -> list[int]:
    if leaf.is_deleted():  # asking for the address of a deleted buffer kills the process
        return []
    return [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]


def _tally(exceptions: list[str], count: int) -> str:
    return (
        f"{count} leaves" if not exceptions else f"{len(exceptions)} of {count} are not: {', '.join(fold(exceptions))}"
    )
