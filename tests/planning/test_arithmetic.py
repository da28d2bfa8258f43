"""Hooks move bits: a plan refuses one that computes with them, whatever the trainer's dtype."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import filled, tree
from jax import lax

import portax
from portax.converters.qwen3 import Qwen3Converter
from portax.weights import blocks
from portax.weights.scale_shift import ScaleShift

NAME = "qwen3-8b.scan"
LAYOUT = portax.layouts.TpuInference(version="0.32", tp=2)


def with_norms(change, scale_shift=None):
    class Changed(Qwen3Converter):
        def norms(self, layer):
            first, second = super().norms(layer)
            value = layer.read("pre_self_attention_layer_norm/scale", "emb_dim", scale_shift)
            return blocks.Param(first.name, change(value)), second

    return Changed(tree(NAME).config, layout=LAYOUT)


def in_dtype(dtype):
    return {path: leaf.astype(dtype) for path, leaf in filled(NAME).items()}


def doubled(x):
    return (x * 2).astype(x.dtype)


COMPUTE = {
    "mul": doubled,
    "add": lambda x: x + x.dtype.type(1),
    "convert_element_type": lambda x: x.astype(jnp.int32),
    "convert_element_type (by a concatenate)": lambda x: jnp.concatenate([x[:-1], jnp.zeros(1, jnp.float16)]),
    "bitcast_convert_type": lambda x: x.view(jnp.float16 if x.dtype == jnp.uint16 else jnp.int32),
    "max": lambda x: jnp.maximum(x, x[::-1]),
    "round": jnp.round,  # of integers, nothing
    "ne": jnp.nan_to_num,
    "mul (inside jit)": jax.jit(doubled),
    "mul (in one branch)": lambda x: lax.switch(jnp.arange(3)[1], [doubled, lambda x: x, lambda x: x], x),
    "mul (for one dtype)": lambda x: x if x.dtype == jnp.uint16 else doubled(x),
    "pad with something else than zeros": lambda x: jnp.pad(x[:-1], (0, 1), constant_values=1),
    "concatenate with something else than zeros": lambda x: jnp.concatenate([x[:-1], jnp.ones(1, x.dtype)]),
    "concatenate with something else than zeros (numpy's)": lambda x: jnp.concatenate([x[:-1], np.ones(1, x.dtype)]),
    "stack with something else than zeros": lambda x: jnp.stack([x, jnp.ones_like(x)])[0],
    "scatter with something else than zeros": lambda x: x.at[0].set(1),
    "dynamic_update_slice with something else than zeros": lambda x: lax.dynamic_update_slice(
        x, jnp.ones(1, x.dtype), (0,)
    ),
    "select_n with something else than zeros": lambda x: jnp.where(jnp.arange(x.size) < 3, x, jnp.ones_like(x)),
}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", COMPUTE)
def test_a_hook_that_computes_is_refused_by_leaf_primitive_and_remedy(name, dtype):
    primitive = name.partition(" (")[0]
    with pytest.raises(
        portax.PlanError,
        match=rf"pre_self_attention_layer_norm/scale: found a hook that computes with it \({primitive}\).*ScaleShift",
    ):
        with_norms(COMPUTE[name]).plan(in_dtype(dtype))


MOVES = {
    "reshape and transpose": lambda x: x.reshape(2, -1).T.reshape(-1),
    "slice and concatenate": lambda x: jnp.concatenate([x[1:], x[:1]]),
    "reverse": lambda x: x[::-1],
    "pad with zeros": lambda x: jnp.pad(x[:-1], (0, 1)),
    "gather": lambda x: jnp.take(x, jnp.arange(x.shape[0])[::-1]),
    "repeat": lambda x: jnp.repeat(x[: x.shape[0] // 2], 2),
    "split": lambda x: jnp.concatenate(jnp.split(x, 2)[::-1]),
    "stack": lambda x: jnp.stack([x, x[::-1]])[1],
    "unstack and tile": lambda x: jnp.tile(jnp.concatenate(jnp.unstack(x.reshape(2, -1))[:1]), 2),
    "zeros of every kind": lambda x: jnp.concatenate([x[2:], jnp.zeros(1, x.dtype), np.zeros(1, x.dtype)]),
    "a scatter": lambda x: x.at[jnp.array([0, 2])].set(x[:2]),
    "a triangle": lambda x: jnp.tril(jnp.stack([x, x]))[1],
    "a branch": lambda x: lax.cond(jnp.arange(2)[1] == 1, lambda x: x[::-1], lambda x: x, x),
}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", MOVES)
def test_moves_are_free_and_exact(name, dtype):
    weights = with_norms(MOVES[name]).convert(in_dtype(dtype))
    source = filled(NAME)["base/decoder/layers/pre_self_attention_layer_norm/scale"].astype(ml_dtypes.bfloat16)
    expected = np.asarray(MOVES[name](jnp.asarray(source[:, 1])))
    np.testing.assert_array_equal(weights["vllm_model.model.layers.1.input_layernorm.weight"], expected)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_remedy_works(dtype):
    weights = with_norms(lambda x: x, ScaleShift(times=2.0)).convert(in_dtype(dtype))
    source = filled(NAME)["base/decoder/layers/pre_self_attention_layer_norm/scale"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(
        weights["vllm_model.model.layers.0.input_layernorm.weight"], source[:, 0] * ml_dtypes.bfloat16(2)
    )


VALUES = {
    "numpy": lambda x: np.multiply(x, 2),
    "float": lambda x: x * float(x[0]),
    "if": lambda x: x if x[0] > 0 else x[::-1],
    "a boolean index": lambda x: x[x > 0],
}


@pytest.mark.parametrize("name", VALUES)
def test_a_hook_that_asks_for_values_is_told_that_there_are_none(name):
    match = r"the hooks of Changed: found one that asks for values; expected moves alone.*: use jax.numpy"
    with pytest.raises(portax.PlanError, match=match):
        with_norms(VALUES[name]).plan(in_dtype(np.float32))
    with pytest.raises(portax.PlanError, match=match):
        with_norms(VALUES[name]).expected_tree()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("make", "fits"), [(jnp.ones_like, False), (jnp.zeros_like, True)])
def test_constants_in_the_dtype_of_a_leaf_are_no_numbers(make, fits, dtype):
    class Added(Qwen3Converter):
        def norms(self, layer):
            scale = layer.read("pre_self_attention_layer_norm/scale", "emb_dim")
            return *super().norms(layer), blocks.Param("extra.weight", make(scale))

    made = Added(tree(NAME).config, layout=LAYOUT)
    if fits:
        assert not np.any(made.convert(in_dtype(dtype))["vllm_model.model.layers.0.extra.weight"])
        return
    with pytest.raises(portax.PlanError, match=r"extra\.weight: found constants in the dtype of a leaf"):
        made.plan(in_dtype(dtype))


def test_leaves_of_two_dtypes_that_a_hook_joins_are_refused():
    class Joined(Qwen3Converter):
        def norms(self, layer):
            first, second = super().norms(layer)
            both = jnp.concatenate([first.value[:64], second.value[64:]])
            return blocks.Param(first.name, both), second

    params = in_dtype(np.float32)
    made = Joined(tree(NAME).config, layout=LAYOUT)
    made.plan(params)
    path = "base/decoder/layers/pre_self_attention_layer_norm/scale"
    params[path] = params[path].astype(ml_dtypes.bfloat16)
    with pytest.raises(portax.PlanError, match=rf"{path}: found a hook that computes with it \(convert_element_type"):
        made.plan(params)
