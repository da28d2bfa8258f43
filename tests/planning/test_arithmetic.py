"""Hooks move bits: a plan refuses one that computes with them, whatever the trainer's dtype."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import filled, tree

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


COMPUTE = {
    "mul": lambda x: (x * 2).astype(x.dtype),
    "add": lambda x: x + x.dtype.type(1),
    "convert_element_type": lambda x: x.astype(jnp.int32),
    "convert_element_type (by a concatenate)": lambda x: jnp.concatenate([x[:-1], jnp.zeros(1, jnp.float16)]),
    "max": lambda x: jnp.maximum(x, x[::-1]),
    "pad with something else than zeros": lambda x: jnp.pad(x[:-1], (0, 1), constant_values=1),
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
    "stack and split": lambda x: jnp.concatenate(jnp.split(x, 2)[::-1]),
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
