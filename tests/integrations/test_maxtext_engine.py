"""MaxText's own model in a live engine, here a stand-in with the state that a golden tells; `tests/live` has a real one."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, filled, mesh, sharded, tree
from engines import noise
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import portax
from portax.integrations import tpu_inference
from portax.layouts import MaxTextVllm
from portax.testing.golden import Golden, compare

MOE, QWEN3_5, DEEPSEEK = "qwen3-30b-a3b.scan", "qwen3.5-35b-a3b.scan", "deepseek3-671b.unscan"
AXES = ("data", "attn_dp", "attn_dp_expert", "expert", "model", "dcp", "pcp")


class MoEBiasVar(nnx.Variable):
    """As MaxText's: a weight that is no `nnx.Param`."""


class MaxTextForCausalLM:
    """As much of the model as is read off it."""

    def __init__(self, **config):
        defaults = {
            "prefuse_moe_weights": True,
            "weight_dtype": types.SimpleNamespace(value="bfloat16"),
            "num_experts": 8,
            "moe_mlp_dim": 96,
            "padded_base_moe_mlp_dim": 512,
        }
        self.maxtext_config = types.SimpleNamespace(**defaults | config)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: {"maxtext": "0.2.5"}[package])


def seven_axes(**axes):
    return mesh(**{axis: axes.get(axis, 1) for axis in AXES})


def variable(name, leaf):
    if ".MlaKVCache_" in name or ".cache." in name:
        return nnx.Cache(leaf)
    if ".rngs." in name:
        return nnx.RngState(leaf, tag="params")
    return (MoEBiasVar if name.endswith("gate.bias") else nnx.Param)(leaf)


def state_of(name, size, on):
    """What the golden's engine holds, with random bits in every leaf."""
    rows = json.loads((GOLDEN / name / f"maxtext-vllm-0.32.0.{size}.json").read_text())["leaves"]
    shapes = {
        leaf: jax.ShapeDtypeStruct(
            row["shape"], row["dtype"], sharding=NamedSharding(on, PartitionSpec(*map(axes_of, row["spec"])))
        )
        for leaf, row in rows.items()
    }
    return nnx.State.from_flat_path(
        {tuple(leaf.split(".")): variable(leaf, array) for leaf, array in noise(shapes, 0).items()}
    )


def axes_of(cut):
    return tuple(cut) if isinstance(cut, list) else cut


def engine(on, state=None, **config):
    return types.SimpleNamespace(
        state=nnx.State({}) if state is None else state,
        state_leaves=(),
        mesh=on,
        model=MaxTextForCausalLM(**config),
        vllm_config=types.SimpleNamespace(
            model_config=types.SimpleNamespace(dtype="torch.bfloat16", quantization=None)
        ),
    )


@pytest.mark.parametrize(
    ("axes", "sizes", "padded"),
    [
        ({"model": 2}, {"tp": 2}, 512),
        ({"attn_dp": 2, "model": 2}, {"tp": 4, "attention_dp": 2}, 1024),
        ({"expert": 4}, {"tp": 1, "expert_parallel": 4}, 256),
        ({"attn_dp": 2, "attn_dp_expert": 2}, {"tp": 2, "attention_dp": 2, "expert_parallel": 2}, 512),
    ],
    ids=str,
)
def test_sizes_are_read_off_the_mesh(axes, sizes, padded):
    on = seven_axes(**axes)
    assert tpu_inference.layout(engine(on, padded_base_moe_mlp_dim=padded)) == MaxTextVllm(version="0.2.5", **sizes)


def test_what_the_models_config_says_is_read_off_it():
    found = tpu_inference.layout(engine(seven_axes(), prefuse_moe_weights=False, padded_base_moe_mlp_dim=256))
    assert not found.prefused
    assert tpu_inference.layout(engine(seven_axes(), weight_dtype="float32", num_experts=1)).dtype == np.float32


@pytest.mark.parametrize(
    ("axes", "config", "message"),
    [
        ({"model": 2}, {"padded_base_moe_mlp_dim": 256}, "padded_base_moe_mlp_dim is 256, and .* 96 are padded to 512"),
        ({"model": 2}, {"padded_base_moe_mlp_dim": None}, "padded_base_moe_mlp_dim is 96, and .* 96 are padded to 512"),
        ({"model": 2}, {"scan_layers": True}, "maxtext_config has scan_layers=True, with which nothing was tried"),
        ({"model": 2}, {"fuse_expert_scales": True}, "maxtext_config has fuse_expert_scales=True"),
        ({"data": 2, "model": 2}, {}, "the engine's mesh has data=2 in .*, which MaxTextForCausalLM was not run with"),
        ({"pcp": 2}, {}, "the engine's mesh has pcp=2"),
        ({"attn_dp": 2, "expert": 2}, {}, "the engine's mesh has expert=2"),
    ],
)
def test_what_was_not_proven_is_refused(axes, config, message):
    with pytest.raises(portax.LayoutError, match=message):
        tpu_inference.layout(engine(seven_axes(**axes), **config))


def test_a_mesh_of_two_axes_is_refused():
    with pytest.raises(portax.LayoutError, match=r"without attn_dp, .*start the engine with NEW_MODEL_DESIGN=1"):
        tpu_inference.layout(engine(mesh(data=4, model=2)))


def test_another_version_of_maxtext_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.3.0")
    with pytest.raises(portax.LayoutError, match=r"MaxText '0\.3\.0' is not among the versions"):
        tpu_inference.layout(engine(seven_axes(model=2)))


def test_whole_experts_on_attention_data_parallel_devices_need_a_switch_of_the_engine():
    on = seven_axes(attn_dp=2, attn_dp_expert=2)
    with pytest.raises(portax.LayoutError, match="needs enable_dp_attention=True"):
        tpu_inference.layout(engine(on), experts="whole")
    assert tpu_inference.layout(engine(on, enable_dp_attention=True), experts="whole").experts == "whole"


@pytest.mark.parametrize(
    ("name", "size", "axes", "padded"),
    [
        (MOE, "tp2", {"model": 2}, 512),
        (QWEN3_5, "tp4.adp2", {"attn_dp": 2, "model": 2}, 1024),
        (DEEPSEEK, "tp4.adp2", {"attn_dp": 2, "model": 2}, 1024),
    ],
)
@pytest.mark.parametrize("atomic", [False, True])
def test_a_sync_writes_the_variables_in_place_and_leaves_the_engines_own_alone(name, size, axes, padded, atomic):
    on = seven_axes(**axes)
    golden = Golden.load(GOLDEN / name / f"maxtext-vllm-0.32.0.{size}.json")
    state = state_of(name, size, on)
    boxes = dict(state.flat_state())
    owned = {path: np.asarray(box.get_value()) for path, box in boxes.items() if ".".join(path) in golden.engine_owned}
    params = sharded(filled(name), mesh(fsdp=4, tensor=2))
    live = engine(on, state, padded_base_moe_mlp_dim=padded)
    sync = tpu_inference.weight_sync(live, tree(name).config, params=params, atomic=atomic, verify=True)
    sync(params)
    assert dict(state.flat_state()) == boxes
    held = {".".join(path): box.get_value() for path, box in boxes.items() if path not in owned}
    assert [f"{row.name}: {row.difference}" for row in compare(held, golden) if row.difference] == []
    for path, before in owned.items():
        np.testing.assert_array_equal(np.asarray(boxes[path].get_value()), before)


def test_a_variable_that_is_neither_a_weight_nor_known_to_be_the_engines_is_found_out():
    class Statistics(nnx.Variable):
        pass

    on = seven_axes(model=2)
    state = state_of(MOE, "tp2", on)
    state["model"]["decoder"]["counts"] = Statistics(jnp.zeros(3))
    with pytest.raises(
        portax.PlanError, match=r"model\.decoder\.counts: found a leaf of the engine that nothing writes"
    ):
        tpu_inference.weight_sync(engine(on, state), tree(MOE).config, params=filled(MOE))


def test_a_router_bias_that_a_filter_left_behind_is_missed():
    """MoEBiasVar is no nnx.Param, so `nnx.state(model, nnx.Param)` has not got it."""
    name, on = DEEPSEEK, seven_axes(attn_dp=2, model=2)
    params = {path: leaf for path, leaf in filled(name).items() if not path.endswith("gate/bias")}
    live = engine(on, state_of(name, "tp4.adp2", on), padded_base_moe_mlp_dim=1024)
    with pytest.raises(portax.PlanError, match=r"gate\.bias: .*that nothing writes.*in a MoEBiasVar, which is no"):
        tpu_inference.weight_sync(live, tree(name).config, params=params)


def test_a_scanned_model_in_the_engine_is_named():
    on = seven_axes(model=2)
    leaves = {
        path.removeprefix("base/"): jnp.zeros(leaf.shape, jnp.bfloat16) for path, leaf in tree(MOE).shapes.items()
    }
    state = nnx.State.from_flat_path({("model", *path.split("/")): nnx.Param(leaf) for path, leaf in leaves.items()})
    with pytest.raises(
        portax.PlanError, match=r"decoder\.layers\.moe_block\.wo: .* the engine's model is scanned, and"
    ):
        tpu_inference.weight_sync(engine(on, state), tree(MOE).config, params=filled(MOE))


def test_how_a_custom_block_is_cut_is_read_off_the_engine():
    on = seven_axes(model=2)
    state = state_of(MOE, "tp2", on)
    params = dict(filled(MOE))
    cut = NamedSharding(on, PartitionSpec(None, "model"))
    values = np.arange(4 * 128 * 64, dtype=np.float32).reshape(128, 4, 64)
    params["base/decoder/layers/mixer/in/kernel"] = values
    for layer in range(4):
        own = jax.device_put(jnp.zeros((128, 64), jnp.bfloat16), cut)
        state["model"]["decoder"][f"layers_{layer}"]["mixer"] = nnx.State({"in": {"kernel": nnx.Param(own)}})
    live = engine(on, state)
    config = tree(MOE).config | {"decoder_block": "custom"}
    tpu_inference.weight_sync(live, config, params=params, verify=True)(params)
    held = state["model"]["decoder"]["layers_2"]["mixer"]["in"]["kernel"].get_value()
    assert held.sharding.is_equivalent_to(cut, 2)
    np.testing.assert_array_equal(np.asarray(held), values[:, 2].astype(jnp.bfloat16))
