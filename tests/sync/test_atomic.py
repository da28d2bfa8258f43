"""A sync that switches all leaves at once: all of them, or none, whoever interrupts."""

import pytest
from engines import other, wrong
from syncs import DENSE, NORM, made

import portax
from portax.execution.executor import PreparedCall


class Refusing(dict):
    """An engine's mapping that raises at a certain write, or at all writes from there on."""

    def __init__(self, leaves):
        super().__init__(leaves)
        self.writes, self.refused, self.error = 0, (), None

    def refuse(self, error, *writes):
        self.writes, self.refused, self.error = 0, writes, error

    def __setitem__(self, name, leaf):
        self.writes += 1
        if self.writes in self.refused:
            raise self.error
        super().__setitem__(name, leaf)


def atomic(**options):
    _, plain, params, golden = made(DENSE)
    state = Refusing(plain)
    sync = made_over(state, atomic=True, **options)
    sync(params)
    return sync, state, params, golden


def made_over(state, **options):
    return portax.WeightSync(made(DENSE)[0]._converter, state, **options)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("this mapping refuses")])
@pytest.mark.parametrize("write", [1, 4, 35])
def test_a_switch_that_is_cut_off_is_taken_back(error, write):
    sync, state, params, golden = atomic()
    before = dict(state)
    state.refuse(error, write)
    with pytest.raises(type(error)):
        sync(other(params))
    assert all(state[name] is leaf for name, leaf in before.items())
    assert (sync.torn, sync.version, wrong(state, golden)) == (None, 1, [])
    assert sync(params).version == 2


def test_a_switch_that_cannot_be_taken_back_is_torn():
    sync, state, params, golden = atomic()
    before = dict(state)
    state.refuse(RuntimeError("this mapping refuses"), 5, 6, 7)
    with pytest.raises(RuntimeError, match="this mapping refuses"):
        sync(other(params))
    changed = {name for name in golden.leaves if state[name] is not before[name]}
    assert len(changed) == 2
    assert (set(sync.torn.new), set(sync.torn.old), sync.torn.lost) == (changed, set(golden.leaves) - changed, ())
    assert "this mapping refuses" in sync.torn.cause
    sync(params)
    assert (sync.torn, wrong(state, golden)) == (None, [])


def test_leaves_that_are_not_the_trainers_are_never_switched_to(monkeypatch):
    sync, state, params, golden = atomic(verify=True)
    before = dict(state)
    with monkeypatch.context() as patch:
        real = PreparedCall.__call__
        made_already = []

        def corrupt(self, inputs, donors=()):
            arrays = real(self, inputs, donors)
            names = self.call.names
            if NORM not in names or made_already:
                return arrays
            made_already.append(names)
            return tuple(a * 0 if name == NORM else a for name, a in zip(names, arrays, strict=True))

        patch.setattr(PreparedCall, "__call__", corrupt)
        state.refuse(AssertionError("nothing may be written"), *range(1, 100))
        with pytest.raises(portax.SyncError, match=f"1 of 35 leaves differ: {NORM}.*nothing was written"):
            sync(other(params))
    assert all(state[name] is leaf for name, leaf in before.items())
    assert (sync.torn, sync.version, wrong(state, golden)) == (None, 1, [])


def test_a_mapping_that_keeps_something_else_is_found_and_the_old_weights_are_put_back():
    class Changing(Refusing):
        def __setitem__(self, name, leaf):
            super().__setitem__(name, leaf + 1 if name == NORM and self.error else leaf)

    _, plain, params, golden = made(DENSE)
    state = Changing(plain)
    sync = made_over(state, atomic=True, verify=True)
    sync(params)
    before = dict(state)
    state.refuse("from now on")
    with pytest.raises(portax.SyncError, match=f"1 of 35 leaves differ: {NORM}"):
        sync(other(params))
    changed = {name for name in golden.leaves if state[name] is not before[name]}
    assert changed <= {NORM}  # which this mapping changes again as it is put back
    assert sync.version == 1
    assert sync.torn.old == (NORM,)
    assert "something other than a sync" in sync.torn.cause
