"""The engine's arithmetic against the numpy reference in `oracle`, which reproduces every quantised golden."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import mesh
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from portax.weights.quantize import DTYPES, quantize
from portax.weights.recipes import RECIPES, dequantize

sys.path.append(str(pathlib.Path(__file__).parents[2] / "oracle"))
import quantised_reference as reference

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAKES = {
    "fp8-block": reference.block_fp8,
    "fp8-block-hf": reference.block_fp8_hf,
    "ct-fp8": lambda w: reference.channel(w, "fp8"),
    "ct-int8": lambda w: reference.channel(w, "int8"),
}


def raw(a):
    return np.ascontiguousarray(a).view(np.uint8).ravel().tolist()


def bits_of(seed, shape, dtype, *, wild):
    """Random bits, NaN left out; or values of about one size in each channel."""
    random = np.random.default_rng(seed)
    if wild:
        x = random.integers(0, 2 ** (8 * dtype.itemsize), shape, np.uint64).astype(f"u{dtype.itemsize}").view(dtype)
        return np.where(np.isnan(x.astype(np.float32)), dtype.type(1), x)
    return (random.standard_normal(shape) * np.exp2(random.integers(-130, 120, (1, shape[1])))).astype(dtype)


def eager(x, **options):
    with jax.disable_jit():
        return quantize(x, **options)


RUNS = {
    "jit": lambda x, **options: quantize(jnp.asarray(x), **options),
    "in a larger program": lambda x, **options: jax.jit(lambda y: quantize(y * 1, **options))(jnp.asarray(x)),
    "eager": lambda x, **options: eager(jnp.asarray(x), **options),
    "eight devices, inputs": lambda x, **options: quantize(spread(x, "all", None), **options),
    "eight devices, outputs": lambda x, **options: quantize(spread(x, None, "all"), **options),
}


def spread(x, *spec):
    return jax.device_put(x, NamedSharding(mesh(all=8), PartitionSpec(*spec)))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(32, 16), (48, 8), (16, 64)]),
    block=st.sampled_from([None, 8, 16]),
    name=st.sampled_from(sorted(DTYPES)),
    dtype=st.sampled_from([BFLOAT16, np.dtype(np.float32)]),
    wide=st.booleans(),
    wild=st.booleans(),
    run=st.sampled_from(sorted(RUNS)),
)
def test_quantising_equals_the_reference_bit_for_bit(seed, shape, block, name, dtype, wide, wild, run):
    x = bits_of(seed, shape, dtype, wild=wild)
    expected, scales = reference.quantize(x, np.dtype(DTYPES[name]), 0, block, wide and dtype == BFLOAT16)
    weights, got = RUNS[run](x, dtype=DTYPES[name], axis=0, block=block, wide=wide)
    assert got.dtype == jnp.float32
    assert raw(got) == raw(scales)
    assert weights.dtype == DTYPES[name]
    assert raw(weights) == raw(expected)


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.parametrize("wide", [False, True])
def test_every_bfloat16_is_quantised_as_the_reference_does_it_as_a_channel_of_its_own(name, wide):
    x = np.arange(2**16, dtype=np.uint16).view(BFLOAT16)
    x = np.stack([x[~np.isnan(x.astype(np.float32))]] * 2)
    expected, scales = reference.quantize(x, np.dtype(DTYPES[name]), 0, None, wide)
    weights, got = quantize(jnp.asarray(x), dtype=DTYPES[name], axis=0, wide=wide)
    assert (np.asarray(got).view(np.uint32).ravel() == scales.view(np.uint32).ravel()).all()
    assert (np.asarray(weights).view(np.uint8) == expected.view(np.uint8)).all()


def test_a_nan_shows_in_the_scale_of_its_channel_and_of_no_other():
    x = jnp.ones((8, 4), jnp.bfloat16).at[3, 2].set(jnp.nan)
    _, scales = quantize(x, dtype=jnp.int8, axis=0)
    assert np.isnan(np.asarray(scales)).tolist() == [[False, False, True, False]]


def test_zeros_keep_their_sign_and_have_a_scale_of_zero():
    weights, scales = quantize(jnp.array([[0.0, -0.0]] * 8, jnp.bfloat16), dtype=jnp.float8_e4m3fn, axis=0)
    assert np.asarray(scales).tolist() == [[0, 0]]
    assert np.signbit(np.asarray(weights).astype(np.float32)).tolist() == [[False, True]] * 8


def test_integers_are_cut_off_and_floats_rounded():
    x = jnp.array([[127.0], [1.75], [-1.75], [2.5]], jnp.bfloat16)
    assert np.asarray(quantize(x, dtype=jnp.int8, axis=0)[0]).ravel().tolist() == [127, 1, -1, 2]


def test_blocks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="blocks of 5 do not divide 16"):
        quantize(jnp.ones((16, 4), jnp.bfloat16), dtype=jnp.int8, axis=0, block=5)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(256, 128), (136, 200)]),
    name=st.sampled_from(sorted(RECIPES)),
    jitted=st.booleans(),
)
def test_recipes_equal_the_reference_bit_for_bit(seed, shape, name, jitted):
    random = np.random.default_rng(seed)
    x = (random.standard_normal(shape) * np.exp2(random.integers(-20, 20, (shape[0], 1)))).astype(BFLOAT16)
    x[seed % shape[0]] = 0
    expected, scales = MAKES[name](x)
    make = jax.jit(RECIPES[name].make) if jitted else RECIPES[name].make
    weights, got = make(jnp.asarray(x.T))
    assert raw(np.asarray(weights).T) == raw(expected)
    assert raw(np.asarray(got).T) == raw(scales.astype(np.float32))


def test_dequantising_is_the_float32_product():
    x = (np.random.default_rng(0).standard_normal((256, 136))).astype(BFLOAT16)
    expected, scales = reference.block_fp8(x)
    weights, got = RECIPES["fp8-block"].make(jnp.asarray(x.T))
    wide = dequantize(weights, got, tiled=True)
    assert np.array_equal(np.asarray(wide).T, reference.dequantize(expected, scales))
