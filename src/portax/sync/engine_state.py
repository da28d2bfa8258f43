"""The live mapping of an engine's leaves: read, checked, and written in place."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import Sharding
from jaxtyping import Array, Shaped

from portax.errors import PlanError, Problem
from portax.execution.sharding import device_order
from portax.planning.plan import Plan
from portax.sync.claim import Claim
from portax.sync.transfer import zeros
from portax.trainer.flatten import unbox

EngineLeaves: TypeAlias = object
"""A live engine's leaves: a mapping of arrays by name, an `nnx.State`, or a function that returns either."""

_Cells: TypeAlias = dict[str, tuple[Any, Any]]
"""By leaf, the mapping and the key under which it can be replaced."""


class EngineState:
    """An engine's leaves by full name, in whatever mapping the engine keeps them.

    Only the shapes and shardings of the planned leaves outlive a sync: an engine may replace its arrays and, if it is
    given as a function, the whole mapping.
    """

    def __init__(self, state: EngineLeaves):
        """Wraps a mapping of arrays or of boxes with arrays, such as an `nnx.State`, or a function that returns it."""
        self._find = state if callable(state) else lambda: state
        self.refresh()
        self._shapes: dict[str, jax.ShapeDtypeStruct] = {}

    def refresh(self) -> None:
        """Looks up the mapping and its leaves again."""
        self._cells = self._look()

    def enter(self, claim: Claim) -> None:
        """Looks up the leaves again, and claims the planned ones (all, if nothing is planned) against other syncs.

        Arrays are replaced while a sync runs, so it also claims their containers: the mapping, or the leaf's box.

        Raises:
            SyncError: Another claim has some of them.
            PlanError: There is no mapping.
        """
        cells: _Cells = {}

        def find() -> Iterable[Any]:
            cells.update(self._look())
            held = [cell for name, cell in cells.items() if not self._shapes or name in self._shapes]
            return [self, *(thing for node, key in held for thing in (node, node[key], unbox(node[key])))]

        claim.take(find)
        self._cells = cells

    def leaves(self) -> dict[str, Any]:
        """Returns all leaves, as they are now."""
        return {name: self.leaf(name) for name in self._cells}

    def leaf(self, name: str) -> Any:
        """Returns one leaf, as it is now."""
        node, key = self._cells[name]
        return unbox(node[key])

    def planned(self) -> dict[str, Any]:
        """Looks up the mapping again and returns its planned leaves; None for those that are gone."""
        cells = self._look()
        found = {name: cells[name] for name in self._shapes if name in cells}
        return dict.fromkeys(self._shapes) | {name: unbox(node[key]) for name, (node, key) in found.items()}

    def _look(self) -> _Cells:
        state = self._find()
        if not isinstance(state, Mapping):
            found, cause = f"a {type(state).__name__}", "pass the runner's `state`, not the runner or its model"
            raise PlanError([Problem("engine_state", found, "a mapping of arrays", cause)])
        return dict(_cells(state))

    def record(self, plan: Plan) -> None:
        """Records the shapes and shardings of the planned leaves.

        Raises:
            PlanError: A leaf is no array in a device's memory, is deleted, is on other devices than the rest, or shares
                its buffer with another one.
        """
        leaves = self.leaves()
        problems, seen, first = [], dict[Any, str](), None
        for entry in plan.entries:
            leaf = leaves[entry.name]
            if not isinstance(leaf, jax.Array) or leaf.is_deleted():
                found = "a deleted array" if isinstance(leaf, jax.Array) else f"a {type(leaf).__name__}"
                cause = "the engine has freed it (asleep, or between two updates), or these are shapes"
                problems.append(Problem(entry.name, found, "a live jax.Array", cause))
                continue
            first = first or (entry.name, leaf)
            if problem := _offloaded(entry.name, leaf) or _elsewhere(entry.name, leaf, *first):
                problems.append(problem)
            self._shapes[entry.name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            other = seen.setdefault(pointer(leaf), entry.name)
            if other != entry.name:
                cause = "tied leaves, or two engines, that share one array: each needs a buffer to be written into"
                problems.append(Problem(entry.name, f"the buffer of {other}", "a buffer of its own", cause))
        if problems:
            raise PlanError(problems)

    def check(self) -> None:
        """Raises a `PlanError` if a leaf has changed its shape, dtype or sharding since the sync was made."""
        leaves = self.leaves()
        problems = []
        for name, shape in self._shapes.items():
            leaf = leaves.get(name)
            if not isinstance(leaf, jax.Array):
                found = "nothing" if leaf is None else f"a {type(leaf).__name__}"
                cause = "the engine was restarted, or its state was changed by hand: make a new WeightSync"
                problems.append(Problem(name, found, "a jax.Array, as when the sync was made", cause))
                continue
            if leaf.is_deleted():
                continue  # lost by a sync that failed; `donate` makes a new one
            same = (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
            if same and leaf.sharding == shape.sharding:  # its memory's kind, too
                continue
            if problem := _offloaded(name, leaf):
                problems.append(problem)
                continue
            if not same or not leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim):
                expected = f"{shape.dtype}{list(shape.shape)}, {shape.sharding}, as when the sync was made"
                cause = "the engine was restarted or loaded other weights: make a new WeightSync"
                problems.append(Problem(name, f"{leaf.dtype}{list(leaf.shape)}, {leaf.sharding}", expected, cause))
        if problems:
            raise PlanError(problems)

    def buffers(self) -> dict[Any, str]:
        """Returns the names of the planned leaves, by device and address of their first buffer."""
        leaves = self.leaves()
        return {pointer(leaves[name]): name for name in self._shapes if not leaves[name].is_deleted()}

    def donate(self, name: str) -> Shaped[Array, "..."]:
        """Returns the leaf whose buffer is to be written; a new one, if a failed sync has lost it."""
        leaf = self.leaf(name)
        return zeros(self._shapes[name]) if leaf.is_deleted() else leaf

    def assign(self, leaves: Mapping[str, Shaped[Array, "..."]]) -> None:
        """Puts finished leaves in their places."""
        for name, leaf in leaves.items():
            self._put(name, leaf)

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Puts all planned leaves back if the block does not finish, for whatever reason."""
        before = {name: self.leaf(name) for name in self._shapes}
        try:
            yield
        except BaseException:
            for name, leaf in before.items():
                if self.leaf(name) is not leaf:
                    with contextlib.suppress(Exception):  # whoever asks is told, by what the leaves then are
                        self._put(name, leaf)
            raise

    def _put(self, name: str, leaf: Any) -> None:
        node, key = self._cells[name]
        box = node[key]
        if isinstance(box, jax.Array):
            node[key] = leaf
        else:
            (getattr(box, "set_value", None) or _setter(box))(leaf)

    def shapes(self, names: Sequence[str]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns shapes, dtypes and shardings of the planned leaves of these names."""
        return tuple(self._shapes[name] for name in names)

    def shardings(self, names: Sequence[str]) -> tuple[Sharding, ...]:
        """Returns the shardings of the planned leaves of these names."""
        return tuple(self._shapes[name].sharding for name in names)

    def all_shardings(self) -> Iterable[Sharding]:
        """Returns the sharding of every planned leaf."""
        return (shape.sharding for shape in self._shapes.values())

    def device_order(self) -> tuple[jax.Device, ...]:
        """Returns the devices of the planned leaves, in the order in which programs number them."""
        return device_order(next(iter(self._shapes.values())).sharding)

    def devices(self) -> set[jax.Device]:
        """Returns all devices of the planned leaves."""
        return {device for shape in self._shapes.values() for device in shape.sharding.device_set}


def pointer(leaf: Any) -> Any:
    """Returns device, memory and address of this process's first buffer; a unique value if there is none."""
    if not isinstance(leaf, jax.Array) or leaf.is_deleted() or not leaf.sharding.addressable_devices:
        return id(leaf)
    first = leaf.addressable_data(0)  # `addressable_shards` makes an object for every device
    return first.device, leaf.sharding.memory_kind, _address(first)


def _address(data: jax.Array) -> int:
    """Returns the address of a shard in the memory of its device; two devices may have equal ones."""
    return data.unsafe_buffer_pointer()


def _offloaded(name: str, leaf: jax.Array) -> Problem | None:
    """Returns the problem of a leaf that is in the host's memory instead of its device's."""
    device, kind = next(iter(leaf.sharding.addressable_devices), None), leaf.sharding.memory_kind
    if device is None or kind is None or kind == (own := device.default_memory().kind):
        return None
    cause = "the engine's weights are offloaded to the host: bring them back to the devices before a sync"
    return Problem(name, f"an array in {kind} memory", f"one in the device's own, {own} memory", cause)


def _elsewhere(name: str, leaf: jax.Array, other: str, first: jax.Array) -> Problem | None:
    """Returns the problem of a leaf that is not on the devices of the first one."""
    if leaf.sharding.device_set == first.sharding.device_set:
        return None
    here, there = ([device.id for device in device_order(array.sharding)] for array in (leaf, first))
    cause = "the engine is split by layers (pipeline parallelism), or this leaf was moved by hand"
    return Problem(name, f"devices {here}", f"devices {there}, where {other} is", cause)


def _cells(node: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[str, tuple[Any, Any]]]:
    """Returns every leaf's name, and the mapping and key under which it can be replaced."""
    for key, child in node.items():
        here = (*path, *(str(part) for part in (key if isinstance(key, tuple) else (key,))))
        if isinstance(child, Mapping):
            yield from _cells(child, here)
        else:
            yield ".".join(here), (node, key)


def _setter(box: Any) -> Callable[[Any], None]:
    return lambda leaf: setattr(box, "value", leaf)
