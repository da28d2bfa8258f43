"""Writing into a live engine: in place, exactly, provably, and never torn unnoticed."""

import itertools
import json
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TREES, engine_mesh, filled, sharded, tree
from engines import addresses, golden_of, grid, other, scramble, scrambled, wrong
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from syncs import DENSE, EMBED, GEMMA, HEAD, MOE, NORM, broken_at, converter_of, made

import portax
from portax.execution import executor
from portax.layouts import TpuInference
from portax.sync.fingerprint import fingerprint, fingerprints
from portax.sync.transfer import CrossProcessTransfer
from portax.testing.doctor import examine
from portax.testing.golden import compare

ENGINES = [(name, 2) for name in TREES if name.endswith(".scan") or "-e2b" in name]
ENGINES += [(MOE, "4.adp2"), (MOE, "8.adp2"), (MOE, "4.adp2.ep"), (MOE, "4.adp1"), (DENSE, "8.adp4")]


@pytest.mark.parametrize(("name", "tp"), ENGINES)
def test_two_syncs_after_scrambling_leave_exactly_the_golden_leaves(name, tp, compilations):
    sync, state, params, golden = made(name, tp=tp, ahead=True)  # Gemma4 small needs its tree
    untouched = {path: state[path] for path in golden.engine_owned}
    assert sync(other(params)).version == 1
    assert wrong(state, golden) != []
    scramble(state, golden.leaves, seed=1)
    before = {path: (addresses(leaf), leaf, leaf.sharding) for path, leaf in state.items()}
    with jax.transfer_guard("disallow"), compilations.measured() as compiled:
        report = sync(params)
    assert compiled == [0]
    assert (report.version, report.leaves, sync.torn) == (2, len(golden.leaves), None)
    assert wrong(state, golden) == []
    assert all(state[path] is leaf for path, leaf in untouched.items())
    for path in golden.leaves:
        place, old, sharding = before[path]
        assert old.is_deleted()
        assert addresses(state[path]) == place
        assert state[path].sharding == sharding


@pytest.mark.parametrize("ahead", [False, True])
def test_every_call_is_prepared_once(ahead, monkeypatch):
    sync, state, params, golden = made(MOE, ahead=ahead)
    sync(other(params))
    monkeypatch.setattr(executor.Executor, "prepare", lambda *_, **__: pytest.fail("prepared again"))
    sync(params)
    assert wrong(state, golden) == []


MESHES = {
    "same devices, other axes": (grid, (0, 8), {"fsdp": 8}, (0, 8), {"data": 4, "model": 2}),
    "one device": (grid, (0, 1), {"all": 1}, (0, 2), {"data": 1, "model": 2}),
    "disjoint 4 + 4": (grid, (0, 4), {"fsdp": 4}, (4, 4), {"data": 2, "model": 2}),
    "disjoint 4 + 2": (grid, (0, 4), {"fsdp": 4}, (4, 2), {"data": 1, "model": 2}),
    "disjoint 2 + 4": (grid, (0, 2), {"fsdp": 2}, (4, 4), {"data": 2, "model": 2}),
    "overlapping, 6 of 8": (grid, (0, 6), {"fsdp": 6}, (2, 6), {"data": 3, "model": 2}),
}


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize(("name", "meshes"), list(zip(itertools.cycle([MOE, DENSE]), MESHES, strict=False)))
def test_wherever_trainer_and_engine_are(name, meshes, atomic, compilations):
    grid, trainer, trainer_axes, engine, engine_axes = MESHES[meshes]
    on = grid(*engine, **engine_axes)
    sync, state, params, golden = made(name, on=on, trainer=grid(*trainer, **trainer_axes), atomic=atomic)
    sync(other(params))
    scramble(state, golden.leaves, seed=2)
    before = {path: (addresses(leaf), leaf.sharding) for path, leaf in state.items()}
    with compilations.measured() as compiled:
        report = sync(params)
    assert compiled == [0]
    assert wrong(state, golden) == []
    assert {device for leaf in state.values() for device in leaf.sharding.device_set} == set(on.devices.flat)
    assert all(state[path].sharding == sharding for path, (_, sharding) in before.items())
    if not atomic:
        assert all(addresses(state[path]) == place for path, (place, _) in before.items())
    assert report.bytes_moved > 0


def test_attention_data_parallelism_on_other_devices():
    on = grid(4, 4, data=1, attn_dp=2, attn_dp_expert=1, expert=1, model=2, dcp=1, pcp=1)
    sync, state, params, golden = made(MOE, tp="4.adp2", on=on, trainer=grid(0, 4, fsdp=4))
    for _ in range(2):
        assert sync(params).bytes_moved > 0
    assert wrong(state, golden) == []


def test_attention_data_parallelism_that_the_layout_does_not_know():
    on = engine_mesh(4, 2)
    converter = portax.converter_for(tree(DENSE).config, layout=TpuInference(version="0.32", tp=4))
    with pytest.raises(
        portax.PlanError, match=r"the engine's mesh: found model=2 in .*'attn_dp': 2.*; expected model=4"
    ):
        portax.WeightSync(converter, scrambled(DENSE, "4.adp2", on))
    converter = portax.converter_for(tree(DENSE).config, layout=TpuInference(version="0.32", tp=4, attention_dp=2))
    with pytest.raises(portax.PlanError, match=r"the engine's mesh: found attn_dp=1 in .*; expected attn_dp=2"):
        portax.WeightSync(converter, scrambled(DENSE, 4, engine_mesh(4)))


def test_meshes_of_explicit_axes():
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    devices = np.array(jax.devices()).reshape(4, 2)
    trainer = Mesh(devices, ("fsdp", "tensor"), axis_types=explicit)
    engine = Mesh(devices, ("data", "model"), axis_types=explicit)
    params = sharded(filled(DENSE), trainer)
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for path, leaf in params.items()
    }
    sync, state, _, golden = made(DENSE, on=engine, params=shapes)
    shardings = {path: leaf.sharding for path, leaf in state.items()}
    for _ in range(2):
        sync(params)
    assert wrong(state, golden) == []
    assert {path: leaf.sharding for path, leaf in state.items()} == shardings


@pytest.mark.parametrize("bucket_bytes", [1, 20_000, 2**30])
def test_buckets_of_any_size(bucket_bytes):
    sync, state, params, golden = made(MOE, bucket_bytes=bucket_bytes)
    sync(params)
    assert wrong(state, golden) == []


def test_host_arrays_and_trainer_shapes_known_beforehand(compilations):
    params = sharded(filled(DENSE), grid(0, 8, fsdp=4, tensor=2))
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for path, leaf in params.items()
    }
    converter_of.cache_clear()  # so that it has something to compile
    sync, state, _, golden = made(DENSE, params=shapes)
    with compilations.measured() as compiled:
        sync(params)
    assert compiled == [0]
    assert wrong(state, golden) == []
    sync(filled(DENSE))
    assert wrong(state, golden) == []


@pytest.mark.parametrize("trainer", [grid(0, 8, fsdp=4, tensor=2), grid(4, 4, fsdp=2, tensor=2)])
def test_under_a_trainer_that_forbids_even_explicit_transfers(trainer):
    on = grid(0, 2, data=1, model=2) if trainer.size == 4 else None
    sync, state, params, golden = made(DENSE, on=on, trainer=trainer, verify=True)
    with (
        jax.transfer_guard_host_to_device("disallow_explicit"),
        jax.transfer_guard_device_to_host("disallow_explicit"),
    ):
        for _ in range(2):
            sync(params)
    assert wrong(state, golden) == []


@pytest.mark.parametrize(("devices", "times"), [(1, 1000), (8, 40)])
def test_memory_and_arrays_stay_flat_over_many_syncs(devices, times):
    worker = pathlib.Path(__file__).parent / "many_syncs_worker.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", worker, str(devices), str(times)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"] == 1 + times
    assert len(found["alive"]) == 1 + times // 20
    assert all(alive == found["alive"][0] for alive in found["alive"])


@pytest.mark.parametrize("name", [MOE, GEMMA])
def test_programs_write_into_the_engine_and_need_a_bucket_at_most(name):
    bucket_bytes = 2**18
    sync, _, params, _ = made(name, trainer=grid(0, 8, fsdp=8), bucket_bytes=bucket_bytes)
    conversion = sync._planned(params)
    for job in conversion.calls(bucket_bytes):
        memory = conversion.compile(job, sync._shardings(job), donating=True).memory_analysis()
        assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= 8 * len(job.entries)  # pointers
        assert job.nbytes <= bucket_bytes // 2 or len(job.entries) == 1
        assert memory.temp_size_in_bytes <= max(bucket_bytes, job.nbytes)


@pytest.mark.parametrize("targets", [slice(2, 8), slice(1, 3)])
def test_processes_whose_devices_do_not_pair(targets):
    """Between processes only, which these devices stand for; `test_processes.py` has those that do pair."""
    devices = tuple(jax.devices())
    count = len(devices[targets])
    match = (
        rf"trainer has 2 devices, on process 0, and the engine {count}, on process 0: .* or a multiple.*portax.Staging"
    )
    with pytest.raises(portax.SyncError, match=match):
        CrossProcessTransfer(devices[:2], devices[targets])


def test_an_nnx_state_is_written_too():
    on = grid(0, 2, data=1, model=2)
    flat = scrambled(DENSE, 2, on)
    state = nnx.State({path: nnx.Param(leaf) for path, leaf in flat.items()})
    converter = converter_of(DENSE)
    portax.WeightSync(converter, state)(sharded(filled(DENSE), grid(0, 2, fsdp=2)))
    assert wrong({path: state[path].get_value() for path in flat}, golden_of(DENSE, 2)) == []


@pytest.mark.parametrize("meshes", ["same devices, other axes", "disjoint 4 + 4"])
@pytest.mark.parametrize("step", range(5))
def test_a_failure_in_any_bucket_is_named_and_mended(monkeypatch, step, meshes):
    grid, trainer, trainer_axes, engine, engine_axes = MESHES[meshes]
    sync, state, params, golden = made(DENSE, on=grid(*engine, **engine_axes), trainer=grid(*trainer, **trainer_axes))
    sync(other(params))
    held = {path: fingerprints([leaf])[0] for path, leaf in state.items()}
    with broken_at(monkeypatch, step):
        sync(params)
    torn = sync.torn
    assert sync.version == 1
    if torn is None:  # it failed before anything was written
        assert (step, trainer != engine) == (0, True)
        assert all(fingerprints([state[path]])[0] == held[path] for path in golden.leaves)
        return
    assert "the link went down" in torn.cause
    assert {*torn.new, *torn.old, *torn.lost} == set(golden.leaves)
    assert len(torn.new) + len(torn.old) + len(torn.lost) == len(golden.leaves)
    assert all(fingerprints([state[path]])[0] == held[path] for path in torn.old)
    finished = {row.name for row in compare({p: state[p] for p in torn.new}, golden) if row.difference == ""}
    assert finished == set(torn.new)
    assert torn.lost
    assert sync(params).version == 2
    assert sync.torn is None
    assert wrong(state, golden) == []


def test_a_transfer_that_is_cut_off(monkeypatch):
    sync, state, params, golden = made(DENSE, on=grid(4, 4, data=2, model=2), trainer=grid(0, 4, fsdp=4))
    sync(params)
    changed = other(params)
    with broken_at(monkeypatch, 3, jax, "device_put"):
        sync(changed)
    assert sync.torn is not None
    assert sync.torn.old
    assert str(sync.torn).startswith("torn (")
    sync(params)
    assert (sync.version, sync.torn, wrong(state, golden)) == (2, None, [])


@pytest.mark.parametrize("step", [0, 2, 4])
def test_an_atomic_sync_that_fails_changes_nothing(monkeypatch, step):
    sync, state, params, golden = made(DENSE, atomic=True)
    sync(params)
    before = dict(state)
    with broken_at(monkeypatch, step):
        sync(other(params))
    assert all(state[path] is leaf for path, leaf in before.items())
    assert (sync.torn, sync.version) == (None, 1)
    assert wrong(state, golden) == []


def test_errors_before_the_first_write_leave_everything_as_it_was():
    sync, state, params, golden = made(DENSE)
    sync(params)
    before = dict(state)
    lost = dict(params)
    del lost["base/decoder/layers/mlp/wo/kernel"]
    deleted = dict(params) | {"base/decoder/decoder_norm/scale": jnp.ones(128)}
    deleted["base/decoder/decoder_norm/scale"].delete()
    for bad, match in (
        (lost, "mlp/wo/kernel: found nothing"),
        (deleted, "found a deleted array; expected a live array"),
        (sharded(filled(MOE), grid(0, 8, fsdp=8)), "which no hook uses"),
    ):
        with pytest.raises(portax.PlanError, match=match):
            sync(bad)
    assert all(state[path] is leaf for path, leaf in before.items())
    assert (sync.torn, sync.version, wrong(state, golden)) == (None, 1, [])


def test_verification_sees_one_changed_element():
    sync, state, params, _ = made(MOE, verify=True)
    report = sync(params)
    assert str(report.verification) == "39 leaves, all equal"
    leaf = "vllm_model.model.layers.2.mlp.experts.routed_experts.w13_weight"
    state[leaf] = state[leaf].at[3, 5, 7].add(1)
    assert sync.verify(params).different == (leaf,)
    assert "1 of 39 leaves differ: vllm_model.model.layers.2.mlp" in str(sync.verify(params))
    assert sync.verify(other(params)).different != ()


def test_a_sync_whose_result_is_not_the_trainers_is_refused(monkeypatch):
    sync, state, params, golden = made(DENSE, verify=True)
    leaf = "vllm_model.model.norm.weight"
    with monkeypatch.context() as patch:
        real = portax.sync.engine_state.EngineState.assign
        patch.setattr(
            portax.sync.engine_state.EngineState,
            "assign",
            lambda self, leaves: real(self, {name: x * 0 if name == leaf else x for name, x in leaves.items()}),
        )
        with pytest.raises(portax.SyncError, match=f"after writing, 1 of 35 leaves differ: {leaf}"):
            sync(params)
    assert (sync.version, sync.torn.lost) == (0, (leaf,))
    sync(params)
    assert (sync.version, sync.torn, wrong(state, golden)) == (1, None, [])


def test_fingerprints_tell_bits_and_places():
    values = np.random.default_rng(0).integers(0, 2**16, (64, 48), np.uint16).view(jnp.bfloat16)
    changed, swapped = values.copy(), values.copy()
    changed.view(np.uint16)[3, 4] ^= 1
    swapped[[0, 1]] = swapped[[1, 0]]
    spread = jax.device_put(values, NamedSharding(grid(0, 8, a=4, b=2), PartitionSpec("a", "b")))
    own, placed, *others = fingerprints([values, spread, changed, swapped, values.T.copy(), values.reshape(48, 64)])
    assert own == placed
    assert len({own, *others[:3]}) == 4
    assert fingerprint(jnp.zeros(3)).shape == (2,)


def engine_problems(name, change, match, **options):
    on = grid(0, 8, data=4, model=2)
    state = scrambled(name, 2, on)
    before = dict(change(state) or state)
    converter = converter_of(name)
    with pytest.raises(portax.PlanError, match=match):
        portax.WeightSync(converter, state, **options)
    assert all(state[path] is leaf for path, leaf in before.items())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.__delitem__(NORM), "norm.weight: found no such leaf in the engine"),
        (lambda s: s.update(surprise=s[NORM] + 1), "surprise: found a leaf of the engine that nothing writes"),
        (
            lambda s: s.update({NORM: s[NORM].astype(jnp.float32)}),
            r"found float32\[128\] in the engine; expected bfloat16",
        ),
        (
            lambda s: s.update({HEAD: s[EMBED]}),
            "lm_head.weight: found the buffer of vllm_model.model.embed_tokens.weight",
        ),
        (lambda s: s[NORM].delete(), "norm.weight: found a deleted array; expected a live jax.Array"),
        (
            lambda s: s.update({NORM: np.zeros(128, jnp.bfloat16)}),
            "norm.weight: found a ndarray; expected a live jax.Array",
        ),
        (
            lambda s: s.update({NORM: jax.device_put(s[NORM], jax.devices()[7])}),
            r"norm.weight: found devices \[7\]; expected devices \[0, .*, where .* is. Likely cause: .*pipeline parallelism",
        ),
        (
            lambda s: s.update(
                {EMBED: jax.device_put(s[EMBED], NamedSharding(s[EMBED].sharding.mesh, PartitionSpec()))}
            ),
            r"embed_tokens.weight: found P\(\) on .* in the engine; expected P\('model', None\) from the layout",
        ),
    ],
)
def test_an_engine_that_is_not_as_planned(change, match):
    engine_problems(DENSE, change, match)


def test_an_engine_of_too_few_devices():
    converter = converter_of(DENSE)
    with pytest.raises(portax.PlanError, match=r"the engine's mesh: found model=1 in .*; expected model=2"):
        portax.WeightSync(converter, scrambled(DENSE, 1, grid(0, 1, data=1, model=1)))


def test_something_that_is_no_engine_state():
    converter = converter_of(DENSE)
    with pytest.raises(portax.PlanError, match="engine_state: found a object; expected a mapping of arrays"):
        portax.WeightSync(converter, object())


def test_an_engine_that_was_restarted_with_other_weights():
    sync, state, params, _ = made(DENSE)
    state[NORM] = state[NORM].astype(jnp.float32)
    with pytest.raises(portax.PlanError, match="the engine was restarted or loaded other weights"):
        sync(params)


def test_an_engine_that_lost_a_leaf():
    sync, state, params, _ = made(DENSE)
    del state[NORM]
    with pytest.raises(portax.PlanError, match=r"norm.weight: found nothing; expected a jax.Array, as when"):
        sync(params)


def test_an_engine_that_rebinds_its_state():
    """As tpu-inference does when it loads adapters: what was written into the old mapping would never be seen."""
    on = grid(0, 8, data=4, model=2)
    held = {"state": scrambled(DENSE, 2, on)}
    converter = converter_of(DENSE)
    sync = portax.WeightSync(converter, lambda: held["state"])
    params = sharded(filled(DENSE), grid(0, 8, fsdp=4, tensor=2))
    sync(params)
    held["state"] = scrambled(DENSE, 2, on, seed=1)
    sync(params)
    assert wrong(held["state"], golden_of(DENSE, 2)) == []


def test_an_engine_that_was_given_the_trainers_arrays():
    sync, state, params, _ = made(DENSE)
    params["base/decoder/decoder_norm/scale"] = state[NORM]
    with pytest.raises(portax.PlanError, match=r"found the buffer of the engine's vllm_model.model.norm.weight"):
        sync(params)
    assert not state[NORM].is_deleted()


def test_two_syncs_at_once(monkeypatch):
    sync, _, params, _ = made(DENSE)
    sync(params)
    reached, release, real = threading.Event(), threading.Event(), executor.PreparedCall.__call__

    def slow(*args, **kwargs):
        reached.set()
        release.wait(30)
        return real(*args, **kwargs)

    monkeypatch.setattr(executor.PreparedCall, "__call__", slow)
    worker = threading.Thread(target=sync, args=(params,))
    worker.start()
    reached.wait(30)
    with pytest.raises(portax.SyncError, match="a sync or a comparison is running on this engine"):
        sync(params)
    release.set()
    worker.join()
    assert sync.version == 2


def test_a_report_for_people_and_machines():
    sync, state, params, golden = made(MOE, on=grid(4, 4, data=2, model=2), trainer=grid(0, 1, fsdp=1))
    report = sync(params)
    rows = json.loads(report.to_json())
    assert list(rows["seconds"]) == ["plan", "compile", "convert", "transfer", "assign", "verify"]
    assert rows["bytes_moved"] == sum(
        shard.data.nbytes for name in golden.leaves for shard in state[name].addressable_shards
    )
    assert report.total_seconds == pytest.approx(sum(rows["seconds"].values()))
    assert "version    1, 39 leaves" in str(report)
    assert "moved between devices" in str(report)


def test_a_staged_copy_keeps_its_addresses_and_its_manifest():
    mesh, params = grid(0, 8, data=4, model=2), sharded(filled(MOE), grid(0, 8, fsdp=4, tensor=2))
    converter = converter_of(MOE)
    staging = portax.Staging(converter, mesh)
    first = {name: addresses(leaf) for name, leaf in staging.stage(other(params)).items()}
    weights = staging.stage(params)
    assert {name: addresses(leaf) for name, leaf in weights.items()} == first
    assert wrong(weights, golden_of(MOE, 2)) == []
    manifest = json.loads(json.dumps(staging.manifest()))
    assert manifest == portax.Staging(converter, mesh).manifest()
    assert [row["name"] for row in manifest] == sorted(weights)
    assert all(weights[row["name"]].shape == tuple(row["shape"]) for row in manifest)
    assert sum(row["bytes"] for row in manifest) == sum(leaf.nbytes for leaf in weights.values())


def test_the_doctor_finds_a_healthy_sync_and_says_what_is_wrong_with_an_ill_one(monkeypatch):
    _, state, params, golden = made(DENSE)
    converter = converter_of(DENSE)
    assert [check for check in examine(converter, state, params) if not check.passed] == []
    assert wrong(state, golden) == []
    real = portax.sync.engine_state.EngineState.assign
    monkeypatch.setattr(
        portax.sync.engine_state.EngineState,
        "assign",
        lambda self, leaves: real(self, {name: leaf for name, leaf in leaves.items() if name != NORM}),
    )
    failed = {check.what: check.found for check in examine(converter, state, params) if not check.passed}
    assert failed["every trainer-owned leaf holds the trainer's weights"] == f"1 of 35 leaves differ: {NORM}"
