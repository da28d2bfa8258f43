"""What connects portax to Tunix and MaxText, over stand-ins; `tests/live` runs the same over the real packages."""

import dataclasses
import functools
import importlib
import json
import sys
import threading
import types

import jax
import numpy as np
import pytest
from conftest import GOLDEN, filled, sharded, tree
from engines import addresses, golden_of, grid, other, scrambled, wrong
from flax import nnx

import portax
from portax.integrations import maxtext, tpu_inference
from portax.layouts import TpuInference
from portax.testing.golden import Golden, compare

MODEL, TP = "qwen3-8b.scan", 2
LAYOUT = TpuInference(version="0.32", tp=TP)
WHOLE = ["reset_prefix_cache", "start_weight_update", "refresh_model_state_leaves", "finish_weight_update"]


class Engine:
    """A live engine as `LLM.llm_engine` shows it; notes what it is told."""

    def __init__(self):
        self.told, self.idle = [], True
        self.state = scrambled(MODEL, TP, grid(0, 2, data=1, model=TP))
        runner = types.SimpleNamespace(state=self.state, state_leaves=self.state)
        self.model_executor = types.SimpleNamespace(driver_worker=types.SimpleNamespace(model_runner=runner))

    def reset_prefix_cache(self):
        self.told.append("reset_prefix_cache")
        return self.idle

    def collective_rpc(self, method):
        self.told.append(method)


@dataclasses.dataclass
class VllmConfig:
    server_mode: bool = False
    init_with_random_weights: bool = False
    tensor_parallel_size: int = -1
    lora_config: dict | None = None
    mesh: jax.sharding.Mesh | None = None
    engine_kwargs: dataclasses.InitVar[dict | None] = None
    processed: dict = dataclasses.field(init=False, default_factory=dict)

    def __post_init__(self, engine_kwargs):
        self.processed = engine_kwargs


class VllmSampler:
    started = 0

    def __init__(self, tokenizer, config):
        type(self).started += 1
        self.config, self.llm, self._driver = config, None, None
        holder = types.SimpleNamespace(llm_engine=Engine(), _engine_lock=threading.Lock())
        if config.server_mode:
            self._driver = holder
        else:
            self.llm = holder


class VllmRollout:
    def update_params(self, params, filter_types=None):
        self._sampler.update_params(params, filter_types)


@dataclasses.dataclass
class RolloutConfig:
    tensor_parallel_size: int = TP
    kv_cache_size: int = 1024
    temperature: float = 0.9
    rollout_vllm_server_mode: bool = False
    rollout_vllm_model_version: str = "checkpoint"
    rollout_vllm_init_with_random_weights: bool = True
    rollout_vllm_lora_config: dict | None = None
    rollout_vllm_async_scheduling: bool = False
    rollout_vllm_max_num_batched_tokens: int | None = 128
    rollout_vllm_max_num_seqs: int | None = None
    rollout_vllm_hf_config_path: str | None = None
    rollout_vllm_logprobs_mode: str = "processed_logprobs"
    rollout_vllm_kwargs: dict = dataclasses.field(default_factory=lambda: {"dtype": "bfloat16"})


def forget():
    sys.modules.pop("portax.integrations.tunix", None)


@pytest.fixture
def tunix(monkeypatch):
    """`portax.integrations.tunix` over modules that look like Tunix 0.1.7."""
    names = ("generate", "generate.vllm_sampler", "rl", "rl.rollout", "rl.rollout.vllm_rollout")
    modules = {name: types.ModuleType(name) for name in ("tunix", *(f"tunix.{name}" for name in names))}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(modules[parent], last, module)
    modules["tunix.generate.vllm_sampler"].VllmConfig = VllmConfig
    modules["tunix.generate.vllm_sampler"].VllmSampler = VllmSampler
    modules["tunix.rl.rollout.vllm_rollout"].VllmRollout = VllmRollout
    monkeypatch.setattr(tpu_inference, "layout", lambda engine, **told: LAYOUT)
    monkeypatch.setattr(VllmSampler, "started", 0)
    forget()
    yield importlib.import_module("portax.integrations.tunix")
    forget()


def trainer():
    return sharded(filled(MODEL), grid(4, 4, fsdp=2, tensor=2))


def sampler(tunix, **config):
    made = tunix.VllmSampler("tokenizer", VllmConfig(**config), tree(MODEL).config, verify=True)
    return made, made._engine.llm_engine


def exact(engine):
    return wrong(engine.state, golden_of(MODEL, TP)) == []


def test_without_tunix_the_extra_is_named(monkeypatch):
    forget()
    monkeypatch.setitem(sys.modules, "tunix", None)
    with pytest.raises(portax.MissingPackageError, match=r"no module named 'tunix.*pip install 'portax\[tunix\]'"):
        importlib.import_module("portax.integrations.tunix")
    assert "portax.integrations.tunix" not in sys.modules


@pytest.mark.parametrize(("server_mode", "filters"), [(False, None), (False, (nnx.Param,)), (True, nnx.Param)])
def test_a_sampler_whose_update_params_is_a_sync(tunix, server_mode, filters):
    made, engine = sampler(tunix, server_mode=server_mode)
    assert not engine.told
    assert made.report is None
    made.update_params(other(trainer()), filters)
    assert not exact(engine)
    made.update_params(trainer(), filters)
    assert exact(engine)
    assert engine.told == WHOLE * 2
    assert made.report.version == 2
    assert made.weight_sync.torn is None


def test_no_step_of_the_server_thread_during_an_update(tunix, monkeypatch):
    made, engine = sampler(tunix, server_mode=True)
    locked = []
    monkeypatch.setattr(engine, "collective_rpc", lambda method: locked.append(made._driver._engine_lock.locked()))
    made.update_params(trainer())
    assert locked == [True] * 3
    assert not made._driver._engine_lock.locked()


@pytest.mark.parametrize("filters", [nnx.LoRAParam, (nnx.LoRAParam,), ("mlp",)])
def test_adapters_alone_are_refused(tunix, filters):
    made, engine = sampler(tunix)
    with pytest.raises(portax.SyncError, match=r"filter_types \((LoRAParam|'mlp')\): expected nnx.Param.*merge them"):
        made.update_params(trainer(), filters)
    assert not engine.told


def test_adapters_among_the_weights_are_refused(tunix):
    made, engine = sampler(tunix)
    path = "base/decoder/layers/mlp/wo/kernel"
    with pytest.raises(portax.PlanError, match=f"{path}_lora_a"):
        made.update_params(trainer() | {f"{path}_lora_a": np.ones((4, 4), np.float32)})
    assert engine.told == WHOLE


def test_an_engine_with_adapters_is_not_started(tunix):
    with pytest.raises(portax.SyncError, match=r"lora_config=\{'max_lora_rank': 8\}: portax writes whole weights"):
        sampler(tunix, lora_config={"max_lora_rank": 8})
    assert VllmSampler.started == 0


def test_requests_in_flight(tunix):
    made, engine = sampler(tunix)
    engine.idle = False
    with pytest.raises(portax.SyncError, match="wait until no request is in flight"):
        made.update_params(trainer())
    assert engine.told == ["reset_prefix_cache"]
    assert not exact(engine)


@pytest.mark.parametrize("breaks", ["the sync", "refresh_model_state_leaves"])
def test_an_update_that_was_started_is_finished(breaks, monkeypatch):
    engine = Engine()

    def told(method):
        engine.told.append(method)
        if method == breaks:
            raise RuntimeError("no leaves")

    monkeypatch.setattr(engine, "collective_rpc", told)

    def update():
        with tpu_inference.updating(types.SimpleNamespace(llm_engine=engine)):
            told("the sync")

    with pytest.raises(RuntimeError, match="no leaves"):
        update()
    engine.told.remove("the sync")
    assert engine.told == WHOLE


def test_an_update_of_an_engine_whose_core_is_in_another_process_is_finished():
    engine = Engine()
    engine.model_executor = None
    with tpu_inference.updating(types.SimpleNamespace(llm_engine=engine)):
        pass
    assert engine.told == WHOLE


EMBEDDING = "vllm_model.model.embed_tokens.weight"


class Eagle3Proposer:
    """A draft of speculative decoding, as far as a sync is concerned: it keeps its own state and leaves."""

    def __init__(self, **leaves):
        self.state = nnx.State({name: nnx.Param(leaf) for name, leaf in leaves.items()})
        self.state_leaves = tuple(leaves.values())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_draft_that_holds_an_array_of_its_target(when, monkeypatch):
    monkeypatch.setattr(tpu_inference, "layout", lambda engine, **told: LAYOUT)
    engine = Engine()
    llm = types.SimpleNamespace(llm_engine=engine)
    runner = tpu_inference.model_runner(llm)
    match = f"the engine's draft \\(Eagle3Proposer\\) holds the very array of {EMBEDDING}"
    runner.drafter = Eagle3Proposer(embed_tokens=engine.state[EMBEDDING], own=jax.numpy.ones(3))
    if when == "before":
        with pytest.raises(portax.SyncError, match=match):
            tpu_inference.weight_sync(llm, tree(MODEL).config)
        with pytest.raises(portax.SyncError, match=match):
            portax.WeightSync(portax.converter_for(tree(MODEL).config, layout=LAYOUT), tpu_inference.engine_state(llm))
        return
    shared, runner.drafter = runner.drafter, Eagle3Proposer(embed_tokens=engine.state[EMBEDDING] + 1)
    sync = tpu_inference.weight_sync(llm, tree(MODEL).config)
    sync(trainer())
    assert exact(engine)
    runner.drafter = shared
    shared.state["embed_tokens"].set_value(engine.state[EMBEDDING])
    for what in (sync, sync.verify):
        with pytest.raises(portax.SyncError, match=match):
            what(trainer())
    assert not engine.state[EMBEDDING].is_deleted()


def test_a_draft_without_weights(monkeypatch):
    monkeypatch.setattr(tpu_inference, "layout", lambda engine, **told: LAYOUT)
    engine = Engine()
    llm = types.SimpleNamespace(llm_engine=engine)
    tpu_inference.model_runner(llm).drafter = types.SimpleNamespace(prompt_lookup_max=3)
    tpu_inference.weight_sync(llm, tree(MODEL).config)(trainer())
    assert exact(engine)


def test_a_rollout_starts_with_the_actors_weights(tunix):
    actor = nnx.Module()
    actor.base = nnx.Dict({"w": nnx.Param(np.ones(2))})
    with pytest.raises(portax.PlanError, match="base/w"):
        tunix.VllmRollout(actor, "tokenizer", grid(0, 2, model=2), RolloutConfig(), tree(MODEL).config)


@pytest.mark.parametrize("key", ["config", "maxtext_config"])
def test_what_a_rollout_tells_the_engine(tunix, monkeypatch, key):
    monkeypatch.setattr(nnx, "state", lambda actor, kind: actor)
    on = grid(0, 2, model=2)
    kind = tunix.VllmRollout if key == "config" else tunix.MaxTextVllmRollout
    cluster_config = functools.partial(kind, **{key: tree(MODEL).config})
    rollout = cluster_config(rollout_actor=trainer(), tokenizer="tokenizer", mesh=on, rollout_config=RolloutConfig())
    assert exact(rollout.sampler.llm.llm_engine)
    config = rollout.sampler.config
    assert (config.mesh, config.tensor_parallel_size, config.init_with_random_weights) == (on, TP, True)
    assert config.processed == {
        "model": "checkpoint",
        "max_model_len": 1024,
        "max_logprobs": 1,
        "async_scheduling": False,
        "max_num_batched_tokens": 128,
        "max_num_seqs": None,
        "hf_config_path": None,
        "logprobs_mode": "processed_logprobs",
        "dtype": "bfloat16",
    }
    rollout.update_params(other(trainer()), (nnx.Param,))
    assert not exact(rollout.sampler.llm.llm_engine)
    assert rollout.sampler.report.version == 2


@pytest.mark.parametrize("given", [{"prefuse_moe_weights": False}, {}])
@pytest.mark.parametrize("of", ["rollout", "trainer", "trainer's text"])
def test_a_rollout_with_maxtexts_own_model_is_started_with_fused_experts(tunix, given, of):
    @dataclasses.dataclass
    class Config(RolloutConfig):
        rollout_vllm_additional_config: dict | None = None

    additional = {"maxtext_config": {"model_name": "qwen3-30b-a3b", **given}}
    told = {"trainer": additional, "trainer's text": json.dumps(additional)}.get(of)
    trainer_config = types.SimpleNamespace(vllm_additional_config=told)
    config = Config(rollout_vllm_additional_config=additional if of == "rollout" else None)
    found = tunix._with_fused_experts(config, trainer_config).rollout_vllm_additional_config["maxtext_config"]
    assert found == {"model_name": "qwen3-30b-a3b", "prefuse_moe_weights": True} | given
    assert tunix._with_fused_experts(Config(), types.SimpleNamespace()) == Config()


class TrainingEngine:
    """As much of MaxText's training engine as the integration touches."""

    def __init__(self):
        self._weight_converter, self._use_weight_converter, self.target = None, False, None

    def prepare_weight_sync(self, params):
        assert self._use_weight_converter
        return self._weight_converter.convert(params, target_state=self.target)


def installed():
    engine = TrainingEngine()
    converter = portax.converter_for(tree(MODEL).config, layout=LAYOUT)
    maxtext.install(engine, converter, grid(0, 8, data=4, model=TP))
    return engine


def test_a_training_engine_stages_what_the_rollout_holds():
    engine = installed()
    params = sharded(filled(MODEL), grid(0, 8, fsdp=4, tensor=2))
    before = {name: addresses(leaf) for name, leaf in engine.prepare_weight_sync(other(params)).items()}
    staged = engine.prepare_weight_sync(params)
    golden = golden_of(MODEL, TP)
    assert [row.name for row in compare(staged, golden) if row.difference] == []
    assert {name: addresses(leaf) for name, leaf in staged.items()} == before


def test_a_training_engine_that_knows_what_the_rollout_holds():
    engine = installed()
    name = "vllm_model.model.layers.0.self_attn.qkv_proj.weight"
    engine.target = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in Engine().state.items()}
    engine.prepare_weight_sync(filled(MODEL))
    engine.target = engine.target | {name: jax.ShapeDtypeStruct((1, 2), "bfloat16")}
    with pytest.raises(portax.PlanError, match=name):
        engine.prepare_weight_sync(filled(MODEL))


def test_a_training_engine_stages_what_maxtexts_own_model_holds_as_its_transport_names_it():
    name, engine = "qwen3-30b-a3b.scan", TrainingEngine()
    golden = Golden.load(GOLDEN / name / "maxtext-vllm-0.32.0.tp2.json")
    converter = portax.converter_for(tree(name).config, layout=golden.layout)
    maxtext.install(engine, converter, grid(0, 8, data=4, attn_dp=1, attn_dp_expert=1, expert=1, model=2))
    params = sharded(filled(name), grid(0, 8, fsdp=4, tensor=2))
    staged = engine.prepare_weight_sync(params)
    held = {tuple(leaf.split(".")): nnx.Param(np.zeros(row.shape, row.dtype)) for leaf, row in golden.leaves.items()}
    rollout = {"base": nnx.State.from_flat_path(held)["model"]}  # as tpu-inference gives it to its transport
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(staged)] == [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(rollout)
    ]
    flat = {".".join(("model", *path)): box.get_value() for path, box in staged["base"].flat_state()}
    assert [row.name for row in compare(flat, golden) if row.difference] == []
    engine.target = rollout
    engine.prepare_weight_sync(params)
    engine.target = {"base": {"decoder": {"other": jax.ShapeDtypeStruct((2,), "bfloat16")}}}
    with pytest.raises(portax.PlanError, match=r"model\.decoder\.other"):
        engine.prepare_weight_sync(params)


def test_something_that_is_no_training_engine():
    converter = portax.converter_for(tree(MODEL).config, layout=LAYOUT)
    with pytest.raises(portax.SyncError, match="a SimpleNamespace without _weight_converter: expected MaxText's"):
        maxtext.install(types.SimpleNamespace(), converter, grid(0, 8, data=4, model=TP))


def test_a_trainers_mesh_without_the_engines_axes():
    converter = portax.converter_for(tree(MODEL).config, layout=LAYOUT)
    with pytest.raises(portax.LayoutError, match="cuts weights over model=2"):
        maxtext.install(TrainingEngine(), converter, grid(0, 8, fsdp=4, tensor=2))
