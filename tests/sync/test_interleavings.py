"""Syncs, comparisons, failures and Ctrl-C in any order, by two objects: the engine is wholly old, wholly new, or torn."""

import contextlib
import functools
import itertools
import pathlib
import sys

import jax
import pytest
from conftest import filled, sharded
from engines import golden_of, grid, other, scrambled
from hypothesis import given, settings
from hypothesis import strategies as st
from syncs import DENSE, converter_of

import portax
from portax import sync as wing
from portax.execution import executor
from portax.sync.fingerprint import fingerprints

FOLDER = str(pathlib.Path(wing.__file__).parent)
NAMES = golden_of(DENSE, 2).leaves


class BrokenError(Exception):
    """What fails in these tests."""


class Mapping(dict):
    """An engine's, whose writes can be made to fail."""

    writes = itertools.count()
    failing = None

    def __setitem__(self, name, leaf):
        if self.failing is not None and next(self.writes) == self.failing:
            raise BrokenError("a write")
        super().__setitem__(name, leaf)


@contextlib.contextmanager
def failing_write(state, step):
    state.writes, state.failing = itertools.count(), step
    try:
        yield
    finally:
        state.failing = None


@contextlib.contextmanager
def failing_call(what, name, step):
    calls, real = itertools.count(), getattr(what, name)

    def broken(*args, **kwargs):
        if next(calls) == step:
            raise BrokenError(name)
        return real(*args, **kwargs)

    setattr(what, name, broken)
    try:
        yield
    finally:
        setattr(what, name, real)


@contextlib.contextmanager
def control_c(line):
    """Between two lines of the sync's own files, whichever is the n-th to be run.

    Python lets no signal come between the end of a `with` and the release of its lock, where a trace function is called:
    on the way back to the line of the `with`. So nothing is raised on any way back.
    """
    lines = itertools.count()

    def local(frame, event, arg, last):
        if event == "line":
            forward, last[0] = frame.f_lineno > last[0], frame.f_lineno
            if next(lines) >= line and forward:
                sys.settrace(None)
                raise KeyboardInterrupt
        return functools.partial(local, last=last)

    def start(frame, event, arg):
        return functools.partial(local, last=[0]) if frame.f_code.co_filename.startswith(FOLDER) else None

    before = sys.gettrace()
    sys.settrace(start)
    try:
        yield
    finally:
        sys.settrace(before)


WAYS = {
    "nothing": lambda state, step: contextlib.nullcontext(),
    "write": lambda state, step: failing_write(state, step % 36),
    "make": lambda state, step: failing_call(executor.PreparedCall, "__call__", step % 6),
    "send": lambda state, step: failing_call(jax, "device_put", step % 6),
    "control_c": lambda state, step: control_c(step),
}
STEPS = st.tuples(
    st.sampled_from(["first", "second"]),
    st.sampled_from(["sync", "sync", "begun", "verify"]),
    st.integers(0, 1),
    st.sampled_from(list(WAYS)),
    st.integers(0, 4000),
)


@functools.cache
def weights(first, count):
    params = sharded(filled(DENSE), grid(first, count, fsdp=count))
    return params, other(params)


@functools.cache
def versions():
    """Marks of every leaf in each version of the weights."""
    made = [converter_of(DENSE).convert(params) for params in weights(0, 2)]
    return [dict(zip(NAMES, fingerprints(leaves[name] for name in NAMES), strict=True)) for leaves in made]


def held(state, initial):
    """Which version each leaf is of; None for what is deleted."""
    marks = dict(zip(NAMES, fingerprints(state[name] for name in NAMES), strict=True))
    found = {}
    for name, mark in marks.items():
        of = [i for i, version in enumerate([*versions(), initial]) if mark == version[name]]
        assert mark is None or len(of) == 1, f"{name} holds the bits of no version"
        found[name] = of[0] if of else None
    return found


def begun(sync, params, atomic):
    """A sync in two steps, where it can be one."""
    if not atomic:
        return sync(params)
    sync.begin(params)
    return sync.commit()


def holds_together(sync, found):
    torn = sync.torn
    if torn is None:
        assert len(set(found.values())) == 1
        assert None not in found.values()
        return
    assert sorted([*torn.new, *torn.old, *torn.lost]) == sorted(NAMES)
    assert {name for name, version in found.items() if version is None} <= set(torn.lost)
    assert len({found[name] for name in torn.new}) <= 1


@pytest.mark.parametrize("atomic", [(False, False), (True, True), (True, False)], ids=str)
@pytest.mark.parametrize("trainer", [(0, 2), (2, 2)], ids=["same devices", "others"])
@settings(max_examples=10, deadline=None)
@given(steps=st.lists(STEPS, min_size=1, max_size=6))
def test_whatever_happens_the_engine_is_wholly_old_wholly_new_or_torn(trainer, atomic, steps):
    state = Mapping(scrambled(DENSE, 2, grid(0, 2, data=1, model=2)))
    initial = dict(zip(NAMES, fingerprints(state[name] for name in NAMES), strict=True))
    both = [
        portax.WeightSync(converter_of(DENSE), seen, atomic=a)
        for seen, a in zip((state, lambda: state), atomic, strict=True)
    ]
    for who, what, version, way, step in steps:
        sync, is_atomic = (both[0], atomic[0]) if who == "first" else (both[1], atomic[1])
        params, before, completed = weights(*trainer)[version], dict(state), sync.version
        was_torn = sync.torn
        failed = False
        try:
            with WAYS[way](state, step):
                ways = {"sync": sync, "verify": sync.verify, "begun": functools.partial(begun, sync, atomic=is_atomic)}
                ways[what](params)
        except (BrokenError, KeyboardInterrupt):
            failed = True
        found = held(state, initial)
        for each in both:
            holds_together(each, found)
        assert str(both[0].torn) == str(both[1].torn)
        if what == "verify" or (failed and is_atomic and sync.torn is not None):
            assert all(state[name] is before[name] for name in NAMES)
            assert sync.torn == was_torn
        elif not failed:
            assert (set(found.values()), sync.torn, sync.version) == ({version}, None, completed + 1)
    both[1](weights(*trainer)[1])
    assert set(held(state, initial).values()) == {1}
    assert both[0].torn is both[1].torn is None
    assert both[0].verify(weights(*trainer)[1]).different == ()
