"""Syncs into engines made of the goldens, and what can be made to fail in them."""

import contextlib
import functools
import itertools

import pytest
from conftest import engine_mesh, filled, sharded, tree
from engines import golden_of, grid, scrambled

import portax
from portax.execution import executor
from portax.layouts import TpuInference

DENSE, MOE, GEMMA = "qwen3-8b.scan", "qwen3-30b-a3b.scan", "gemma4-26b.scan"
TP2 = TpuInference(version="0.32.0", tp=2)


@functools.cache
def converter_of(name, layout=TP2):
    """One for all tests: its programs go with it."""
    return portax.converter_for(tree(name).config, layout=layout)


def made(name, *, tp=2, on=None, trainer=None, ahead=False, **options):
    """A sync, the engine's state, and the golden that it should leave behind."""
    golden = golden_of(name, tp)
    state = scrambled(name, tp, on or engine_mesh(golden.layout.tp, golden.layout.attention_dp))
    params = sharded(filled(name), trainer or grid(0, 8, fsdp=4, tensor=2))
    if ahead:
        options["params"] = params
    return portax.WeightSync(converter_of(name, golden.layout), state, **options), state, params, golden


NORM, HEAD, EMBED = "vllm_model.model.norm.weight", "vllm_model.lm_head.weight", "vllm_model.model.embed_tokens.weight"


@contextlib.contextmanager
def broken_at(monkeypatch, step, what=executor.PreparedCall, name="__call__"):
    """The n-th call fails, and what is inside with it."""
    calls, real = itertools.count(), getattr(what, name)

    def broken(*args, **kwargs):
        if next(calls) == step:
            raise RuntimeError("the link went down")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(what, name, broken)
        with pytest.raises(RuntimeError, match="the link went down"):
            yield
