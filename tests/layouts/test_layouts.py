"""Layouts beside the goldens: versions between the ones that were run, canonical form, wrappers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import filled, tree

import portax
from portax.layouts import Canonical, HuggingFace, TpuInference

MOE, DENSE, TIED = "qwen3-30b-a3b.scan", "qwen3-8b.scan", "qwen3-0.6b.scan"


def weights(name, layout, **options):
    return portax.converter_for(tree(name).config, layout=layout, **options).convert(filled(name))


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(np.asarray(a[k]), np.asarray(b[k])) for k in a)


@pytest.mark.parametrize(
    ("name", "versions"),
    [
        (DENSE, ["0.20", "0.20.0", "0.21"]),
        (DENSE, ["0.22", "0.22.1", "0.23", "0.31", "0.32", "0.32.0"]),
        (MOE, ["0.20", "0.21"]),
        (MOE, ["0.23", "0.28", "0.32"]),
        (TIED, ["0.22", "0.27"]),
        (TIED, ["0.28", "0.32"]),
    ],
)
def test_versions_between_two_changes_hold_the_same(name, versions):
    first, *others = (weights(name, TpuInference(version=version, tp=4)) for version in versions)
    assert all(same(first, other) for other in others)


@pytest.mark.parametrize(
    ("name", "before", "since"), [(DENSE, "0.21", "0.22"), (MOE, "0.22", "0.23"), (TIED, "0.27", "0.28")]
)
def test_versions_on_both_sides_of_a_change_do_not(name, before, since):
    assert not same(*(weights(name, TpuInference(version=version, tp=4)) for version in (before, since)))


def test_equal_layouts_are_equal_whatever_way_they_are_written():
    assert TpuInference(version="0.32", tp=4, dtype="bfloat16") == TpuInference(
        version="0.32", tp=4, dtype=jnp.bfloat16
    )
    assert HuggingFace(dtype="float32") == HuggingFace(dtype=np.float32)


def test_installed_reads_the_package(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: {"tpu-inference": "0.22.1"}[package])
    assert TpuInference.installed(tp=2) == TpuInference(version="0.22.1", tp=2)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.99")
    with pytest.raises(portax.LayoutError, match=r"tpu-inference 0\.99 is not among the known layouts"):
        TpuInference.installed(tp=2)


def test_installed_says_what_to_do_without_the_package():
    with pytest.raises(portax.LayoutError, match=r'not installed here.*TpuInference\(version="0.32", tp=2\)'):
        TpuInference.installed(tp=2)


def test_canonical_is_vllms_own_form():
    """Against the hub's tensors, which are proven: rows of q, k, v and of gate, up one below the other."""
    hub, canonical = weights(MOE, HuggingFace()), weights(MOE, Canonical())
    at = "model.layers.2."
    qkv = [hub[f"{at}self_attn.{part}_proj.weight"] for part in "qkv"]
    gate, up, down = (
        np.stack([hub[f"{at}mlp.experts.{e}.{part}_proj.weight"] for e in range(8)]) for part in ("gate", "up", "down")
    )
    expected = {
        "self_attn.qkv_proj.weight": np.concatenate(qkv),
        "self_attn.o_proj.weight": hub[f"{at}self_attn.o_proj.weight"],
        "mlp.gate.weight": hub[f"{at}mlp.gate.weight"],
        "mlp.experts.routed_experts.w13_weight": np.concatenate([gate, up], axis=1),
        "mlp.experts.routed_experts.w2_weight": down,
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(canonical[at + name], value)
    table = np.pad(hub["lm_head.weight"], ((0, 56), (0, 0)))
    np.testing.assert_array_equal(canonical["lm_head.weight"], table)


def test_canonical_mlp_is_gate_above_up():
    hub, canonical = weights(DENSE, HuggingFace()), weights(DENSE, Canonical())
    parts = [hub[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    np.testing.assert_array_equal(canonical["model.layers.1.mlp.gate_up_proj.weight"], np.concatenate(parts))


def test_tied_models_have_no_head_of_their_own_outside_the_engine():
    for layout in (HuggingFace(), Canonical()):
        assert "lm_head.weight" not in weights(TIED, layout)


@pytest.mark.parametrize(
    ("layout", "layer", "head"),
    [
        (
            TpuInference(version="0.32", tp=1),
            "vllm_model.language_model.model.layers.0.",
            "vllm_model.language_model.lm_head.",
        ),
        (HuggingFace(), "model.language_model.layers.0.", "lm_head."),
        (Canonical(), "language_model.model.layers.0.", "language_model.lm_head."),
    ],
)
def test_a_wrapped_language_model(layout, layer, head):
    names = [
        e.name
        for e in portax.converter_for(tree(DENSE).config, layout=layout, module_prefix="language_model.")
        .plan(tree(DENSE).shapes)
        .entries
    ]
    assert f"{layer}self_attn.o_proj.weight" in names
    assert f"{head}weight" in names


def test_layouts_can_store_another_dtype():
    for dtype in (jnp.float16, jnp.float32):
        made = weights(DENSE, TpuInference(version="0.32", tp=2, dtype=dtype))
        assert {leaf.dtype for leaf in made.values()} == {jnp.dtype(dtype)}


def test_a_layout_of_ones_own():
    """A new engine is one class: what it does not name, its base class asks for."""

    class Transposed(HuggingFace):
        def linear(self, block):
            return tuple(jax.tree.map(jnp.transpose, tensor) for tensor in super().linear(block))

    hub, own = weights(DENSE, HuggingFace()), weights(DENSE, Transposed())
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(own[name], hub[name].T)
