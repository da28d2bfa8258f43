"""A version that is begun beside the one that an engine serves, and switched to later, or never."""

import jax
import numpy as np
import pytest
from engines import grid, other, wrong
from syncs import DENSE, MOE, NORM, converter_of, made
from test_atomic import Refusing
from test_unquantisable_values import DENSE as QUANTISED
from test_unquantisable_values import WO, engine, poisoned, values
from test_unquantisable_values import converter_of as quantised_converter

import portax
from portax.errors import ConfigError, PlanError, QuantizationError, SyncError
from portax.execution import executor

donation = jax.jit(lambda leaves: [leaf * 0 for leaf in leaves], donate_argnums=0)


@pytest.mark.parametrize("trainer", [grid(0, 8, fsdp=4, tensor=2), grid(4, 4, fsdp=4)], ids=["same", "others"])
@pytest.mark.parametrize("name", [DENSE, MOE])
def test_the_engine_serves_its_old_version_until_the_commit(name, trainer, compilations):
    on = None if trainer.size == 8 else grid(0, 4, data=2, model=2)
    sync, state, params, golden = made(name, trainer=trainer, on=on, atomic=True)
    whole = sync(other(params))
    before = dict(state)
    donate = donation.lower([*params.values()]).compile()
    with compilations.measured() as compiled, jax.transfer_guard("disallow"):
        sync.begin(params)
        assert all(state[leaf] is held for leaf, held in before.items())
        assert (sync.version, sync.torn) == (1, None)
        donate([*params.values()])  # a training step, which takes the weights' memory
        report = sync.commit()
    assert compiled == [0]
    assert wrong(state, golden) == []
    assert (report.version, sync.version, sync.torn) == (2, 2, None)
    assert (report.bytes_moved, report.bytes_written) == (whole.bytes_moved, whole.bytes_written)
    assert report.standstill == report.seconds["assign"] < report.total_seconds


def test_every_version_uses_the_prepared_calls(monkeypatch):
    sync, state, params, golden = made(DENSE, atomic=True)
    sync.begin(other(params))
    monkeypatch.setattr(executor.Executor, "prepare", lambda *_, **__: pytest.fail("prepared again"))
    sync.begin(params)
    sync.commit()
    assert wrong(state, golden) == []


def test_the_newest_begun_version_is_committed_once():
    sync, state, params, golden = made(DENSE, atomic=True)
    sync.begin(other(params))
    sync.begin(params)
    assert sync.commit().version == 1
    assert wrong(state, golden) == []
    with pytest.raises(SyncError, match=r"no version was begun, or it was aborted or committed: call begin\(params\)"):
        sync.commit()


def test_ready_when_the_commit_would_not_wait():
    sync, _, params, _ = made(DENSE, atomic=True)
    assert not sync.ready
    sync.begin(params)
    jax.block_until_ready(sync._pending.leaves)
    assert sync.ready
    sync.commit()
    assert not sync.ready


@pytest.mark.parametrize("ending", ["abort", "a whole sync"])
def test_a_version_that_is_given_up_is_never_written(ending):
    sync, state, params, golden = made(DENSE, atomic=True)
    sync(params)
    sync.begin(other(params))
    sync.abort() if ending == "abort" else sync(params)
    assert wrong(state, golden) == []
    with pytest.raises(SyncError, match="no version was begun"):
        sync.commit()
    sync.abort()


def test_a_sync_in_place_has_nothing_to_begin():
    sync, _, params, _ = made(DENSE)
    with pytest.raises(ConfigError, match=r"begin\(\) needs WeightSync\(..., atomic=True\): the old version stays"):
        sync.begin(params)


def test_a_tree_that_does_not_fit_keeps_the_version_that_was_begun():
    sync, state, params, golden = made(DENSE, atomic=True)
    sync.begin(params)
    path = next(iter(params))
    with pytest.raises(PlanError, match=path):
        sync.begin({name: leaf for name, leaf in params.items() if name != path})
    sync.commit()
    assert wrong(state, golden) == []


def test_an_engine_that_changed_meanwhile_is_left_as_it_is():
    sync, state, params, _ = made(DENSE, atomic=True)
    sync.begin(params)
    state[NORM] = np.zeros(state[NORM].shape, state[NORM].dtype)
    before = dict(state)
    with pytest.raises(PlanError, match=f"{NORM}: found a ndarray"):
        sync.commit()
    assert all(state[leaf] is held for leaf, held in before.items())


def test_a_switch_that_is_cut_off_is_taken_back_and_can_be_tried_again():
    _, plain, params, golden = made(DENSE)
    state = Refusing(plain)
    sync = portax.WeightSync(converter_of(DENSE), state, atomic=True)
    sync.begin(params)
    before = dict(state)
    state.refuse(KeyboardInterrupt(), 4)
    with pytest.raises(KeyboardInterrupt):
        sync.commit()
    assert all(state[leaf] is held for leaf, held in before.items())
    assert (sync.torn, sync.version) == (None, 0)
    assert sync.commit().version == 1
    assert wrong(state, golden) == []


def test_values_that_cannot_be_quantised_give_the_version_up():
    state = engine(QUANTISED)
    sync = portax.WeightSync(quantised_converter(QUANTISED), state, atomic=True)
    before = dict(state)
    sync.begin(poisoned(QUANTISED, WO, (3, 2, 5), np.nan))
    with pytest.raises(QuantizationError, match="NaN"):
        sync.commit()
    assert all(state[leaf] is held for leaf, held in before.items())
    with pytest.raises(SyncError, match="no version was begun"):
        sync.commit()
    sync.begin(values(QUANTISED))
    assert sync.commit().version == 1


def test_a_verified_version_is_compared_before_its_sources_are_gone():
    sync, state, params, golden = made(DENSE, atomic=True, verify=True)
    sync.begin(params)
    donation([*params.values()])
    assert str(sync.commit().verification) == f"{len(golden.leaves)} leaves, all equal"
    assert wrong(state, golden) == []


def test_another_sync_into_the_engine_keeps_out_for_as_long_as_it_runs():
    sync, state, params, _ = made(DENSE, atomic=True)
    second = portax.WeightSync(converter_of(DENSE), lambda: state, atomic=True)
    sync.begin(params)
    second(other(params))  # nothing runs between begin and commit
    assert sync.commit().version == 1
    assert second.verify(params).different == ()


def test_simulated_devices_get_eight_jobs_at_a_time(monkeypatch):
    sync, state, params, golden = made(DENSE, atomic=True, bucket_bytes=1)
    jobs, waits = len(sync._converter.conversion(params).calls(1)), []
    real = jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda leaves: waits.append(leaves) or real(leaves))
    sync.begin(params)
    assert len(waits) == jobs - 8 > 0
    sync.commit()
    assert wrong(state, golden) == []
