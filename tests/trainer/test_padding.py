"""Trainers that pad experts or the vocabulary: the padding is cut off for every layout, after it is found to be zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import filled, mesh, sharded, tree

import portax
from portax.layouts import Canonical, HuggingFace, MaxTextVllm, TpuInference
from portax.trainer.lazy_array import LazyArray

MOE, UNSCANNED, HYBRID = "qwen3-30b-a3b.scan", "qwen3-30b-a3b.unscan", "qwen3.5-35b-a3b.scan"
WIDE = 160
LAYOUTS = {
    "hub": HuggingFace(),
    "canonical": Canonical(),
    "torchax": TpuInference(version="0.32", tp=2),
    "maxtext": MaxTextVllm(version="0.2.5", tp=2),
}


def is_experts(path, *kernels):
    return path.endswith(tuple(f"moe_block/{kernel}" for kernel in kernels))


def widened(leaf, axis, size):
    return np.pad(leaf, [(0, size - have if i == axis else 0) for i, have in enumerate(leaf.shape)])


def padded_experts(params):
    """Experts as MaxText holds them with `padded_base_moe_mlp_dim`."""
    axes = {"wi_0": -1, "wi_1": -1, "wo": -2}
    return {
        path: widened(leaf, leaf.ndim + axes[path.rpartition("/")[2]], WIDE) if is_experts(path, *axes) else leaf
        for path, leaf in params.items()
    }


def prefused(params):
    """Gate and up as one leaf, as MaxText holds them with `prefuse_moe_weights`."""
    kept = {path: leaf for path, leaf in params.items() if not is_experts(path, "wi_0", "wi_1")}
    fused = {
        path.removesuffix("_0"): np.concatenate([leaf, params[path.removesuffix("0") + "1"]], axis=-1)
        for path, leaf in params.items()
        if is_experts(path, "wi_0")
    }
    return kept | fused


def padded_vocabulary(params):
    axes = {"base/token_embedder/embedding": 0, "base/decoder/logits_dense/kernel": 1}
    return {path: widened(leaf, axes[path], 384) if path in axes else leaf for path, leaf in params.items()}


FORMS = {
    "padded": padded_experts,
    "prefused": prefused,
    "padded and prefused": lambda params: prefused(padded_experts(params)),
    "vocabulary": padded_vocabulary,
    "all": lambda params: padded_vocabulary(prefused(padded_experts(params))),
}


def converters(name, layout, **options):
    config = tree(name).config | {"padded_base_moe_mlp_dim": WIDE}
    found = [portax.converter_for(config, layout=layout, **options)]
    return found + ([portax.MaxTextConverter(config, layout=layout, **options)] if layout.names == "trainer" else [])


@functools.cache
def expected(name, layout):
    weights = portax.converter_for(tree(name).config, layout=LAYOUTS[layout]).convert(filled(name))
    return {leaf: np.asarray(value) for leaf, value in weights.items()}


def same(weights, name, layout):
    wanted = expected(name, layout)
    assert weights.keys() == wanted.keys()
    for leaf, value in weights.items():
        assert value.dtype == wanted[leaf].dtype
        assert np.asarray(value).tobytes() == wanted[leaf].tobytes(), leaf


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_padding_is_cut_off_for_every_layout(form, layout):
    params = FORMS[form](filled(MOE))
    for converter in converters(MOE, LAYOUTS[layout]):
        same(converter.convert(params), MOE, layout)


@pytest.mark.parametrize("name", [UNSCANNED, HYBRID])
@pytest.mark.parametrize("layout", ["hub", "maxtext"])
def test_padding_is_cut_off_layer_by_layer_and_in_cycles_of_layers(name, layout):
    for converter in converters(name, LAYOUTS[layout]):
        same(converter.convert(FORMS["all"](filled(name))), name, layout)


def test_padding_is_cut_off_a_bfloat16_trainer_that_is_spread_over_the_devices():
    rounded = {path: leaf.astype(jnp.bfloat16) for path, leaf in FORMS["all"](filled(MOE)).items()}
    for converter in converters(MOE, LAYOUTS["torchax"], mesh=mesh(data=4, model=2)):
        same(converter.convert(sharded(rounded, mesh(fsdp=4, tensor=2))), MOE, "torchax")


class OnDisk(LazyArray):
    """A leaf that is read a part at a time."""

    def __init__(self, values):
        self.shape, self.dtype, self.values = values.shape, values.dtype, values

    def __getitem__(self, at):
        return self.values[at]


def test_padding_is_cut_off_leaves_on_disk():
    params = {path: OnDisk(leaf) for path, leaf in FORMS["all"](filled(MOE)).items()}
    for converter in converters(MOE, LAYOUTS["hub"]):
        same(converter.convert(params), MOE, "hub")


def test_a_plan_lists_what_is_cut():
    [converter] = converters(MOE, LAYOUTS["hub"])
    plan = converter.plan(FORMS["all"](filled(MOE)))
    assert sorted(plan.padded) == [
        "base/decoder/layers/moe_block/wi",
        "base/decoder/layers/moe_block/wo",
        "base/decoder/logits_dense/kernel",
        "base/token_embedder/embedding",
    ]
    assert "of 4 leaves, cut off once it is found to be zero: base/" in str(plan)
    assert [*plan.to_dict()["padded"]] == [*plan.padded]
    assert converter.plan(filled(MOE)).padded == ()


PLACES = [  # a form, a leaf, an element that is cut off, and what is said
    (
        "padded",
        "base/decoder/layers/moe_block/wi_1",
        np.s_[3, 2, 5, 96],
        r"layers/moe_block/wi_1: found values that are not zero past 96 of 160 on axis 3; expected padding, all zeros, "
        r".*the config's size is 96\. Likely cause: the experts were trained, or initialised, at the padded width",
    ),
    ("padded", "base/decoder/layers/moe_block/wo", np.s_[0, 0, 159, 0], r"moe_block/wo: .* past 96 of 160 on axis 2"),
    ("all", "base/decoder/layers/moe_block/wi", np.s_[0, 0, 0, 97], r"moe_block/wi: .* past 96 of 160 on axis 3"),
    ("all", "base/decoder/layers/moe_block/wi", np.s_[0, 0, 0, 319], r"moe_block/wi: .* past 96 of 160 on axis 3"),
    (
        "vocabulary",
        "base/token_embedder/embedding",
        np.s_[383, 0],
        r"token_embedder/embedding: found values that are not zero past 200 of 384 on axis 0; expected padding.*"
        r"Likely cause: the trainer's vocabulary is larger than the config's vocab_size",
    ),
    ("vocabulary", "base/decoder/logits_dense/kernel", np.s_[0, 200], r"logits_dense/kernel: .* past 200 of 384 on ax"),
]


@pytest.mark.parametrize(("form", "path", "at", "message"), PLACES)
def test_padding_that_is_not_zero_is_named(form, path, at, message):
    refused(form, path, at, 1e-30, message, lambda leaf: leaf)


@pytest.mark.parametrize("held_as", [jnp.asarray, OnDisk], ids=["on devices", "on disk"])
@pytest.mark.parametrize("value", [1e-30, np.nan])
def test_padding_that_is_not_zero_is_found_wherever_it_is(value, held_as):
    form, path, at, message = PLACES[0]
    refused(form, path, at, value, message, held_as)


def refused(form, path, at, value, message, held_as):
    params = dict(FORMS[form](filled(MOE)))
    params[path] = params[path].copy()
    params[path][at] = value
    [_, converter] = converters(MOE, LAYOUTS["maxtext"])
    with pytest.raises(portax.PlanError, match=message):
        converter.convert({leaf: held_as(array) for leaf, array in params.items()})


def test_a_sync_refuses_padding_that_is_not_zero_before_it_writes_anything():
    [converter] = converters(MOE, LAYOUTS["torchax"])
    params = {path: jnp.asarray(leaf) for path, leaf in FORMS["padded"](filled(MOE)).items()}
    engine = converter.convert(params)
    sync = portax.WeightSync(converter, engine, verify=True)
    sync(params)
    same(engine, MOE, "torchax")
    other = {path: -leaf for path, leaf in params.items()}
    other["base/decoder/layers/moe_block/wo"] = other["base/decoder/layers/moe_block/wo"].at[0, 0, 100, 0].set(1)
    with pytest.raises(portax.PlanError, match=r"moe_block/wo: found values that are not zero past 96 of 160"):
        sync(other)
    assert sync.torn is None
    same(engine, MOE, "torchax")


def test_a_width_that_the_config_does_not_tell_is_named():
    with pytest.raises(portax.PlanError, match=r"moe_block/wi_0: .*from moe_mlp_dim=96 to 160: say so in the config"):
        portax.converter_for(tree(MOE).config, layout=HuggingFace()).plan(padded_experts(filled(MOE)))


def test_a_padded_width_below_the_true_one_is_refused():
    with pytest.raises(portax.ConfigError, match="padded_base_moe_mlp_dim: 64 is less than moe_mlp_dim: 96"):
        portax.read_config(tree(MOE).config | {"padded_base_moe_mlp_dim": 64})


def test_a_vocabulary_that_is_smaller_than_the_config_says_is_no_padding():
    params = dict(filled(MOE)) | {"base/token_embedder/embedding": np.zeros((160, 128), np.float32)}
    with pytest.raises(portax.PlanError, match=r"token_embedder/embedding: found shape \[160, 128\]"):
        portax.converter_for(tree(MOE).config, layout=HuggingFace()).plan(params)


def test_a_config_that_tells_a_padding_takes_a_tree_without():
    [converter] = converters(MOE, LAYOUTS["hub"])
    same(converter.convert(filled(MOE)), MOE, "hub")
    assert jax.tree.map(lambda leaf: leaf.shape, converter.expected_tree()) == {
        path.removeprefix("base/"): leaf.shape for path, leaf in filled(MOE).items()
    }
