"""Every form in which a trainer hands over its parameters converts to the same bytes."""

import dataclasses
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, filled, nested, tree
from flax import nnx

import portax
from portax.layouts import TpuInference
from portax.testing.golden import Golden, compare
from portax.trainer import param_tree

MOE, DENSE = "qwen3-30b-a3b", "qwen3-8b"
GOLDENS = {name: Golden.load(GOLDEN / f"{name}.scan/tpu-inference-0.32.0.tp2.json") for name in (MOE, DENSE)}


def exact(params, name=DENSE, **config):
    converter = portax.converter_for(
        dict(tree(f"{name}.scan").config, **config), layout=TpuInference(version="0.32", tp=2)
    )
    return not any(row.difference for row in compare(converter.convert(params), GOLDENS[name]))


def boxed(params, box):
    return jax.tree.map(box, nested(params))


@dataclasses.dataclass
class ValueBox:
    value: np.ndarray


class GetterBox:
    def __init__(self, array):
        self._array = array

    def get_value(self):
        return self._array


def dropout_state():
    """Real RNG variables, an RngKey and an RngCount, as an unfiltered nnx.state holds them."""
    return nnx.state(nnx.Dropout(0.1, rngs=nnx.Rngs(0)))


FORMS = {
    "flat": lambda p: p,
    "flat with dots": lambda p: {path.replace("/", "."): leaf for path, leaf in p.items()},
    "flat with tuples": lambda p: {tuple(path.split("/")): leaf for path, leaf in p.items()},
    "nested": nested,
    "jax arrays": lambda p: boxed(p, jnp.asarray),
    "FrozenDict": lambda p: flax.core.freeze(nested(p)),
    "get_value": lambda p: boxed(p, GetterBox),
    "value": lambda p: boxed(p, ValueBox),
    "nnx.Param": lambda p: boxed(p, lambda leaf: nnx.Param(jnp.asarray(leaf))),
    "nnx.State": lambda p: nnx.State(boxed(p, lambda leaf: nnx.Param(jnp.asarray(leaf)))),
    "nnx.State below a dict": lambda p: {
        "base": nnx.State(boxed(p, lambda leaf: nnx.Param(jnp.asarray(leaf)))["base"])
    },
    "no root": lambda p: nested(p)["base"],
    "params/params": lambda p: {"params": {"params": nested(p)["base"]}},
    "params": lambda p: {"params": nested(p)["base"]},
    "with RNG state": lambda p: nnx.State(
        {**boxed(p, lambda leaf: nnx.Param(jnp.asarray(leaf))), "dropout": dropout_state()}
    ),
    "with a PRNG key": lambda p: {**p, "base/rng": jax.random.key(0)},
    "with None": lambda p: {**p, "base/decoder/dropout": None},
    "MappingProxy": lambda p: types.MappingProxyType(p),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_tree(form):
    assert exact(FORMS[form](filled(f"{DENSE}.scan")))


def test_variables_are_ignored_by_type_not_by_name():
    """A parameter may be called rngs, and a variable that is no parameter may be called kernel."""
    params = boxed(filled(f"{DENSE}.scan"), lambda leaf: nnx.Param(jnp.asarray(leaf)))
    state = nnx.State({**params, "statistics": {"kernel": nnx.BatchStat(jnp.zeros(3))}})
    converter = portax.converter_for(tree(f"{DENSE}.scan").config, layout=TpuInference(version="0.32", tp=2))
    assert converter.plan(state).ignored == ("statistics/kernel",)
    state = nnx.State({**params, "rngs": {"key": nnx.Param(jnp.zeros(3))}})
    with pytest.raises(portax.PlanError, match=r"rngs/key: found shape \[3\], which no hook uses"):
        converter.plan(state)


def restacked(name, axis):
    """The scanned tree with its layers stacked on another axis."""
    leaves = filled(f"{name}.scan")
    return {p: np.moveaxis(leaf, 1, axis) if "/layers/" in p else leaf for p, leaf in leaves.items()}


def unstacked(params):
    """The scanned tree, one container per layer."""
    out = {}
    for path, leaf in params.items():
        if "/layers/" in path:
            out |= {path.replace("/layers/", f"/layers_{i}/"): leaf[:, i] for i in range(leaf.shape[1])}
        else:
            out[path] = leaf
    return out


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("name", [DENSE, MOE])
def test_both_scan_axes(name, place):
    assert exact(jax.tree.map(place, restacked(name, 0)), name, param_scan_axis=0)
    assert exact(jax.tree.map(place, restacked(name, 1)), name, param_scan_axis=1)


@pytest.mark.parametrize("name", [DENSE, MOE])
def test_unscanned_layers(name):
    assert exact(unstacked(filled(f"{name}.scan")), name)


def test_scanned_and_unscanned_layers_in_one_tree():
    apart = unstacked(filled(f"{DENSE}.scan"))
    mixed = {path: leaf[:, :2] if "/layers/" in path else leaf for path, leaf in filled(f"{DENSE}.scan").items()}
    mixed |= {path: leaf for path, leaf in apart.items() if "/layers_2/" in path or "/layers_3/" in path}
    assert exact(mixed)


def test_a_layer_that_is_there_twice():
    both = filled(f"{DENSE}.scan") | {p: x for p, x in unstacked(filled(f"{DENSE}.scan")).items() if "/layers_3/" in p}
    with pytest.raises(portax.PlanError, match="base/decoder: found layers 3 twice; expected 4 layers"):
        exact(both)


def fused(params, at, gate, up, fuse):
    """The tree with two kernels replaced by one."""
    rest = {path: leaf for path, leaf in params.items() if path not in (f"{at}/{gate}", f"{at}/{up}")}
    return rest | {f"{at}/{gate.replace('_0', '')}": fuse(params[f"{at}/{gate}"], params[f"{at}/{up}"])}


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
def test_pre_fused_experts(place):
    at = "base/decoder/layers/moe_block"
    params = fused(filled(f"{MOE}.scan"), at, "wi_0", "wi_1", lambda gate, up: np.concatenate([gate, up], axis=-1))
    assert exact(jax.tree.map(place, params), MOE)


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
def test_pre_fused_mlp(place):
    at = "base/decoder/layers/mlp"
    params = fused(
        filled(f"{DENSE}.scan"), at, "wi_0/kernel", "wi_1/kernel", lambda gate, up: np.stack([gate, up], axis=2)
    )
    assert exact(jax.tree.map(place, params), DENSE)


def test_a_half_of_a_fused_pair():
    params = dict(filled(f"{MOE}.scan"))
    params["base/decoder/layers/moe_block/wi"] = params.pop("base/decoder/layers/moe_block/wi_0")
    with pytest.raises(
        portax.PlanError, match=r"(?s)moe_block/wi: found shape .*2\*moe_mlp_dim=192.*wi_1: found shape"
    ):
        exact(params, MOE)


def test_float64_and_float16_sources_are_cast():
    for dtype in (np.float64, np.float16):
        params = {path: leaf.astype(dtype) for path, leaf in filled(f"{DENSE}.scan").items()}
        assert exact(params)


def test_a_root_that_only_some_leaves_have_is_no_root():
    params = dict(filled(f"{DENSE}.scan"))
    params["decoder/decoder_norm/scale"] = params.pop("base/decoder/decoder_norm/scale")
    with pytest.raises(portax.PlanError, match=r"base/decoder/layers/mlp/wo/kernel"):
        exact(params)


def test_reading_keeps_the_root_for_messages():
    state = param_tree.read({"params": {"params": {"decoder": {"x": np.zeros(2)}}}})
    assert (state.root, dict(state.leaves).keys()) == ("params/params/", {"decoder/x"})
