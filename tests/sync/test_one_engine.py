"""Several syncs over one engine, and what is refused before anything is written."""

import json
import threading

import jax
import numpy as np
import pytest
from conftest import command, filled, sharded, tree
from engines import golden_of, grid, other, scrambled, wrong
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from syncs import DENSE, EMBED, MOE, NORM, broken_at, converter_of, made

import portax
from portax._text.report import Report
from portax.analysis.cost_model import estimate
from portax.execution import executor
from portax.execution.byte_counts import byte_count
from portax.sync import engine_state
from portax.sync.report import Torn, Verification
from portax.sync.transfer import received_bytes


def the_mapping(state):
    return state


def a_function(state):
    return lambda: state


def a_mapping_of_its_own(state):
    """Of the same boxes."""
    boxes = nnx.State({name: nnx.Param(leaf) for name, leaf in state.items()})
    state.clear()
    state |= boxes
    return nnx.State(dict(boxes.items()))


@pytest.mark.parametrize("seen_as", [the_mapping, a_function, a_mapping_of_its_own])
def test_two_syncs_at_once_over_one_engine(monkeypatch, seen_as):
    on = grid(0, 8, data=4, model=2)
    state, params = scrambled(DENSE, 2, on), sharded(filled(DENSE), grid(0, 8, fsdp=4, tensor=2))
    others = seen_as(state)
    first, second = (portax.WeightSync(converter_of(DENSE), seen) for seen in (state, others))
    first(params)
    reached, release, real = threading.Event(), threading.Event(), executor.PreparedCall.__call__
    calls = []

    def slow(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            reached.set()
            release.wait(30)
        return real(*args, **kwargs)

    monkeypatch.setattr(executor.PreparedCall, "__call__", slow)
    worker = threading.Thread(target=first, args=(params,))
    worker.start()
    assert reached.wait(30)
    for again in (first, second):
        for what in (again, again.verify):
            with pytest.raises(portax.SyncError, match="a sync or a comparison is running on this engine"):
                what(other(params))
    with pytest.raises(portax.SyncError, match="is running on this engine"):
        portax.WeightSync(converter_of(DENSE), others)
    release.set()
    worker.join()
    assert (first.version, second.version, first.torn, second.torn) == (2, 0, None, None)
    assert second(params).version == 1
    assert first.verify(params).different == ()


def test_two_engines_are_synced_at_the_same_time(monkeypatch):
    first, _, params, _ = made(DENSE)
    second, state, _, golden = made(DENSE)
    first(params)
    real, inside = executor.PreparedCall.__call__, []

    def nested(*args, **kwargs):
        if not inside:
            inside.append(None)
            inside.append(second(params))
        return real(*args, **kwargs)

    monkeypatch.setattr(executor.PreparedCall, "__call__", nested)
    assert first(params).version == 2
    assert wrong(state, golden) == []


def test_what_one_sync_tore_the_other_says_and_what_one_mended_the_other_knows(monkeypatch):
    first, state, params, golden = made(DENSE)
    second = portax.WeightSync(converter_of(DENSE), lambda: state)
    first(params)
    second(params)
    with broken_at(monkeypatch, 2):
        second(other(params))
    assert first.torn == second.torn
    assert "the link went down" in first.torn.cause
    assert first.torn.new
    assert first.torn.lost
    first(params)
    assert (first.torn, second.torn, wrong(state, golden)) == (None, None, [])


def test_an_engine_that_something_else_writes_to_is_torn():
    sync, state, params, _ = made(DENSE)
    sync(params)
    state[NORM] = state[NORM] + 1
    assert sync.torn.old == (NORM,)
    assert "something other than a sync" in sync.torn.cause
    sync(params)
    state[NORM].delete()
    assert sync.torn.lost == (NORM,)
    sync(params)
    assert sync.torn is None


def test_an_interrupted_sync_leaves_the_engine_free(monkeypatch):
    sync, state, params, golden = made(DENSE)
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(executor.PreparedCall, "__call__", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt) as caught:
                sync(params)
            kept.append(caught)  # with the frames in it, as an interactive session keeps them
    sync(params)
    assert (sync.torn, wrong(state, golden)) == (None, [])


def test_chips_that_count_memory_from_the_same_address(monkeypatch):
    """Addresses are told apart by their device: the third buffer of one chip is not the third of another one."""
    numbers: dict = {}

    def counted(data):
        held = numbers.setdefault(data.device, {})
        return held.setdefault(data.unsafe_buffer_pointer(), len(held))

    monkeypatch.setattr(engine_state, "_address", counted)
    sync, state, params, golden = made(DENSE, on=grid(4, 4, data=2, model=2), trainer=grid(0, 4, fsdp=4))
    sync(params)
    assert wrong(state, golden) == []


@pytest.mark.parametrize("kind", ["pinned_host", "unpinned_host"])
def test_an_engine_that_is_offloaded_to_the_host(kind):
    sync, state, params, _ = made(DENSE)
    state[EMBED] = jax.device_put(state[EMBED], state[EMBED].sharding.with_memory_kind(kind))
    match = rf"embed_tokens.weight: found .*in {kind} memory; expected .*device.* memory.*offloaded"
    with pytest.raises(portax.PlanError, match=match):
        portax.WeightSync(converter_of(DENSE), state)
    with pytest.raises(portax.PlanError, match=match):
        sync(params)


@pytest.mark.parametrize("bad", [0, -1, True], ids=repr)
def test_a_bucket_of_no_bytes_is_refused_at_once(bad, tmp_path):
    _, state, params, _ = made(DENSE)
    converter, on = converter_of(DENSE), grid(0, 8, data=4, model=2)
    for use in (
        lambda: portax.WeightSync(converter, state, bucket_bytes=bad),
        lambda: converter.stream(params, bucket_bytes=bad),
        lambda: portax.export(converter, params, tmp_path / "out", bucket_bytes=bad),
        lambda: portax.Staging(converter, on, bucket_bytes=bad),
        lambda: estimate(converter, on, on, bucket_bytes=bad),
    ):
        with pytest.raises(
            portax.ConfigError, match=f"bucket_bytes={bad}: expected a whole number of bytes, 1 or more"
        ):
            use()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("bad", [0, -1, float("nan"), 0.5, 1e9, True, "1GB", None, np.float32(8)], ids=repr)
def test_what_is_no_number_of_bytes(bad):
    with pytest.raises(portax.ConfigError, match=r"bucket_bytes=.*: expected a whole number of bytes, 1 or more"):
        byte_count("bucket_bytes", bad)


def test_numbers_of_bytes():
    assert [byte_count("bucket_bytes", good) for good in (1, 2**40, np.int64(20_000))] == [1, 2**40, 20_000]


@pytest.mark.parametrize("bad", ["0", "-1", "nan", "1GB", "0.5"])
@pytest.mark.parametrize("option", ["--bucket-bytes", "--shard-bytes"])
def test_a_command_says_what_is_no_number_of_bytes(option, bad, capsys):
    assert command("convert", "nowhere", "--out", "nowhere-else", f"{option}={bad}") == 2
    said = capsys.readouterr().err.replace("'", "")
    assert f"argument {option}: {bad}: expected a whole number of bytes, 1 or more" in said


@pytest.mark.parametrize("use", ["stream", "sync"])
def test_a_source_that_is_freed_between_two_buckets_is_named(use, monkeypatch):
    sync, _, params, _ = made(DENSE)
    freed = params["base/decoder/layers/mlp/wo/kernel"]
    match = r"base/decoder/layers/mlp/wo/kernel: found a deleted array; .*between two buckets"
    if use == "stream":
        buckets = converter_of(DENSE).stream(params, bucket_bytes=20_000)
        next(buckets)
        freed.delete()
        with pytest.raises(portax.SyncError, match=match):
            dict(enumerate(buckets))
        return
    real, calls = executor.PreparedCall.__call__, []

    def freeing(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            freed.delete()
        return real(*args, **kwargs)

    monkeypatch.setattr(executor.PreparedCall, "__call__", freeing)
    with pytest.raises(portax.SyncError, match=match):
        sync(params)
    assert "mlp/wo/kernel: found a deleted array" in sync.torn.cause


def test_reports_of_one_form():
    sync, _, params, _ = made(MOE, verify=True)
    report = sync(params)
    torn = Torn(new=("a",), old=("b", "c"), lost=(), cause="a broken link")
    verification = Verification(leaves=3, different=("a",))
    for found in (report, report.verification, torn, verification):
        assert isinstance(found, Report)
        assert json.loads(found.to_json()) == json.loads(json.dumps(found.to_dict()))
    assert str(torn) == "torn (1 new, 2 old, 0 lost) by a broken link"
    assert str(verification) == "1 of 3 leaves differ: a"
    assert torn.to_dict() == {"new": ("a",), "old": ("b", "c"), "lost": (), "cause": "a broken link"}
    assert verification.to_dict() == {"leaves": 3, "different": ("a",)}
    assert report.to_dict()["verification"] == {"leaves": 39, "different": ()}
    assert report.to_dict()["gb_per_s"] == report.gb_per_s


HALVES = PartitionSpec(None, "model")


@pytest.mark.parametrize(
    ("trainer", "spec", "received"),
    [
        (grid(0, 4, fsdp=4), PartitionSpec("fsdp"), 3 / 4),  # a quarter of each shard is there already
        (grid(0, 4, fsdp=4), PartitionSpec(), 0),  # all of it
        (grid(4, 4, fsdp=4), PartitionSpec(), 1),  # nothing: these are other devices
        (grid(0, 2, fsdp=2), PartitionSpec("fsdp"), 3 / 4),  # half of it, on two of the four devices
    ],
)
def test_bytes_that_move_are_known_from_shardings(trainer, spec, received):
    source = jax.ShapeDtypeStruct((32, 8, 16), "float32", sharding=NamedSharding(trainer, spec))
    target = jax.ShapeDtypeStruct((16, 32), "bfloat16", sharding=NamedSharding(grid(0, 4, model=4), HALVES))
    assert received_bytes(target, (source,)) == received * 16 * 32 * 2
    assert received_bytes(target, (np.ones((32, 8, 16)),)) == 0  # comes from the host, from no device


@pytest.mark.parametrize("name", ["gemma4-e2b.unscan", "gemma4-e4b.unscan"])
def test_the_engines_leaves_tell_which_layers_of_a_small_gemma4_are_global(name):
    config = dict(tree(name).config, inhomogeneous_layer_cycle_interval=1)
    golden = golden_of(name, 2)
    converter = portax.converter_for(config, layout=golden.layout)
    state = scrambled(name, 2, grid(0, 8, data=4, model=2))
    sync = portax.WeightSync(converter, state)
    assert {entry.name for entry in sync.plan.entries} == set(golden.leaves)
    sync(sharded(filled(name), grid(0, 8, fsdp=4, tensor=2)))
    assert wrong(state, golden) == []


def test_a_small_gemma4_whose_engine_holds_neither_of_the_two():
    name = "gemma4-e4b.unscan"
    converter = portax.converter_for(
        dict(tree(name).config, inhomogeneous_layer_cycle_interval=1), layout=golden_of(name, 2).layout
    )
    state = scrambled(name, 2, grid(0, 8, data=4, model=2))
    norm = next(leaf for leaf in state if leaf.endswith("model.norm.weight"))
    del state[norm]
    with pytest.raises(portax.PlanError, match=r"1 problem.*\n.*norm.weight: found no such leaf"):
        portax.WeightSync(converter, state)


def test_a_config_that_lost_use_double_wide_mlp_is_told_so():
    name = "gemma4-e2b.unscan"
    converter = portax.converter_for(
        dict(tree(name).config, use_double_wide_mlp=False), layout=golden_of(name, 2).layout
    )
    with pytest.raises(portax.PlanError, match=r"mlp/w.*Likely cause: .*use_double_wide_mlp"):
        converter.plan(filled(name))
