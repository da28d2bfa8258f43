"""Whole train states, boxes and lists: one set of rules, whether the tree is in memory or on disk."""

import flax.training.train_state
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import filled, nested, tree
from flax import nnx
from hypothesis import strategies as st

import portax
from portax.layouts import TpuInference
from portax.trainer import param_tree

SCAN, UNSCAN = "qwen3-8b.scan", "qwen3-8b.unscan"
CONVERTER = portax.converter_for(tree(SCAN).config, layout=TpuInference(version="0.32", tp=2))
BASE = {path.removeprefix("base/"): leaf for path, leaf in filled(SCAN).items()}
MOMENTS = {"mu": nested(BASE), "nu": nested(BASE), "count": np.int32(3)}


class MoEBiasVar(nnx.Variable):
    """Named as MaxText's variable of DeepSeek's router bias, which is no `nnx.Param`."""


class Cache(nnx.Variable):
    """Some other variable that is no parameter."""


def randomness(shape=()):
    return {"params": {"count": np.zeros(shape, np.uint32), "key": np.zeros((*shape, 2), np.uint32)}}


def variables(params):
    return jax.tree.map(lambda leaf: nnx.Param(jnp.asarray(leaf)), nested(params))


def linen_state():
    """As a Linen loop holds it, with optax's own state."""
    params = {"params": jax.tree.map(jnp.asarray, nested(BASE))}
    return flax.training.train_state.TrainState.create(apply_fn=lambda: None, params=params, tx=optax.adam(1e-3))


def layered(rest):
    """The tree with random state in every layer and in a stack of layers, in plain dicts."""
    per_layer = {f"layers_{i}": {"dropout": {"rngs": randomness()}} for i in range(4)}
    stacked = {"layers": {"self_attention": {"rngs": randomness((4,))}}}
    found = nested(BASE)
    found["decoder"] |= per_layer
    found["decoder"]["layers"]["self_attention"] |= stacked["layers"]["self_attention"]
    return rest(found)


STATES = {
    "value dicts": lambda: jax.tree.map(lambda leaf: {"value": leaf}, nested(BASE)),
    "value dicts beside random state": lambda: {
        "base": jax.tree.map(lambda leaf: {"value": leaf}, nested(BASE)) | {"rngs": randomness()}
    },
    "value dicts of some leaves": lambda: {path: {"value": x} if "norm" in path else x for path, x in BASE.items()},
    "random state in dicts": lambda: layered(lambda found: {"base": found}),
    "Linen dict": lambda: {"params": {"params": nested(BASE)}, "opt_state": MOMENTS, "step": 7},
    "Linen dict with optax's state": lambda: {
        "params": {"params": nested(BASE)},
        "opt_state": optax.adam(1e-3).init(nested(BASE)),
        "step": np.int32(7),
    },
    "Linen object": linen_state,
    "NNX dict": lambda: {
        "model": nested(BASE) | {"rngs": randomness()},
        "optimizer": {"opt_state": MOMENTS, "step": 1},
    },
    "NNX dict with a base": lambda: {"model": {"base": nested(BASE)}, "optimizer": {"opt_state": MOMENTS}},
    "NNX state": lambda: nnx.State(
        {"model": variables(BASE), "optimizer": {"mu": {"a": Cache(jnp.ones(3))}, "step": Cache(jnp.zeros(()))}}
    ),
    "model alone": lambda: {"model": nested(BASE)},
    "nnx_aux": lambda: {
        "params": {"params": nested(BASE)},
        "opt_state": [MOMENTS, None],
        "step": 3,
        "nnx_aux": {"model": {"decoder": {"dropout": {"rngs": randomness()}}}},
    },
}


@pytest.mark.parametrize("form", STATES)
def test_a_train_state_in_memory_is_planned_as_its_parameters(form):
    plan = CONVERTER.plan(STATES[form]())
    alone = CONVERTER.plan(BASE)
    assert names_of(plan) == names_of(alone)
    assert plan.bytes_in == alone.bytes_in


def names_of(plan):
    """Every entry, with its sources below the root and without how their layers are written."""
    return [
        (entry.name, entry.shape, entry.dtype, entry.casts, sorted(bare(source) for source in entry.sources))
        for entry in plan.entries
    ]


def bare(path):
    for root in ("model/", "params/", "params/", "base/"):
        path = path.removeprefix(root)
    return path.replace("/layers/", "/layers_")


DISK = {form: make for form, make in STATES.items() if form not in ("Linen object", "NNX state")}


@pytest.mark.parametrize("form", DISK)
def test_a_train_state_on_disk_is_read_by_the_same_rules(form, tmp_path):
    state = DISK[form]()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", args=ocp.args.PyTreeSave(state))
    checkpoint = portax.open_checkpoint(tmp_path / "c")
    in_memory = param_tree.read(state)
    assert {bare(path) for path in checkpoint} == {bare(path) for path in in_memory.leaves}
    assert {*checkpoint.others} == {*in_memory.ignored}
    assert names_of(CONVERTER.plan(checkpoint)) == names_of(CONVERTER.plan(state))


def test_what_is_no_parameter_is_listed():
    state = param_tree.read(STATES["nnx_aux"]())
    assert "step" in state.ignored
    assert "nnx_aux/model/decoder/dropout/rngs/params/count" in state.ignored
    assert "opt_state/0/mu/decoder/decoder_norm/scale" in state.ignored
    assert state.root == "params/params/"


def test_a_weight_called_value_is_no_box():
    leaves = {"decoder/attention/value": np.ones(3), "decoder/attention/key": np.ones(3)}
    assert {*param_tree.read(leaves).leaves} == {*leaves}


def test_arrays_beside_the_parameters_are_not_dropped_without_a_word():
    state = {"params": nested(BASE), "step": 3, "lora": {"query_lora_a": np.ones((3, 4), np.float32)}}
    match = r"lora/query_lora_a: found float32\[3, 4\] beside the parameters; expected nothing there but an optimizer"
    with pytest.raises(portax.PlanError, match=match):
        CONVERTER.plan(state)


def test_a_variable_that_is_no_param_is_a_weight_if_its_type_is_known_as_one():
    gate = {"kernel": nnx.Param(jnp.ones((8, 4))), "bias": MoEBiasVar(jnp.ones(4)), "cache": Cache(jnp.ones(4))}
    state = param_tree.read(nnx.State({"decoder": {"gate": gate}}))
    assert ({*state.leaves}, state.ignored) == ({"decoder/gate/kernel", "decoder/gate/bias"}, ("decoder/gate/cache",))


@pytest.mark.parametrize("box", [lambda leaf: leaf, lambda leaf: {"value": leaf}], ids=["array", "value"])
def test_a_weight_that_maxtext_saves_beside_the_parameters_is_one_of_them(box, tmp_path):
    gate, others = "decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/gate", {"rngs": randomness(), "mean": np.ones(3)}
    state = {
        "params": {"params": nested({f"{gate}/kernel": box(np.ones((8, 4), np.float32))})},
        "nnx_aux": {"model": nested({f"{gate}/bias": box(np.ones(4, np.float32)), "decoder/statistics": others})},
    }
    found = param_tree.read(state)
    assert {*found.leaves} == {f"{gate}/kernel", f"{gate}/bias"}
    assert "nnx_aux/model/decoder/statistics/mean" in found.ignored
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", args=ocp.args.PyTreeSave(state))
    checkpoint = portax.open_checkpoint(tmp_path / "c")
    assert {*param_tree.read(checkpoint).leaves} == {*found.leaves}


def unscanned(form):
    """The layers apart, written as this form says."""
    return {path.removeprefix("base/").replace("/layers_", form): leaf for path, leaf in filled(UNSCAN).items()}


def listed(params):
    """The nested tree with its layers in a list."""
    found = nested(params)
    layers = found["decoder"].pop("layers")
    found["decoder"]["layers"] = [layers[str(i)] for i in range(len(layers))]
    return found


class Layer(nnx.Module):
    """A layer whose weights are nested modules."""

    def __init__(self, leaves):
        for name, child in leaves.items():
            setattr(self, name, Layer(child) if isinstance(child, dict) else nnx.Param(jnp.asarray(child)))


class Decoder(nnx.Module):
    """A decoder that keeps its layers in an `nnx.List`."""

    def __init__(self, leaves):
        layers = leaves.pop("layers")
        self.layers = nnx.List([Layer(layers[str(i)]) for i in range(len(layers))])
        for name, child in leaves.items():
            setattr(self, name, Layer(child))


def nnx_list(params):
    found = nested(params)
    model = Layer({name: child for name, child in found.items() if name != "decoder"})
    model.decoder = Decoder(found["decoder"])
    return nnx.state(model)


@pytest.mark.parametrize("make", [dict, nested, listed, nnx_list], ids=["flat", "dicts of text", "list", "nnx.List"])
def test_layers_in_a_list_are_layers(make):
    plan = CONVERTER.plan(make(unscanned("/layers/")))
    assert names_of(plan) == names_of(CONVERTER.plan(unscanned("/layers_")))
    expected = CONVERTER.convert(filled(UNSCAN))
    for name, leaf in CONVERTER.convert(make(unscanned("/layers/"))).items():
        np.testing.assert_array_equal(leaf, expected[name])


EXPECTED = CONVERTER.convert(BASE)


def test_a_cycle_of_layers_in_a_list():
    name = "qwen3.5-35b-a3b.scan"
    converter = portax.converter_for(tree(name).config, layout=portax.layouts.Canonical())
    in_list = {path.replace("/layers/layer_", "/layers/layer/"): leaf for path, leaf in tree(name).shapes.items()}
    assert [entry.name for entry in converter.plan(in_list).entries] == [
        entry.name for entry in converter.plan(tree(name).shapes).entries
    ]


def test_a_plan_lists_what_was_ignored_in_the_tree_it_is_of():
    converter = portax.converter_for(tree(SCAN).config, layout=TpuInference(version="0.32", tp=2))
    with_key = {**BASE, "rngs/key": np.zeros(2, np.uint32)}
    assert [converter.plan(params).ignored for params in (BASE, with_key, BASE)] == [(), ("rngs/key",), ()]


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (None, "params: found None; expected a mapping that holds the model's parameters .*, or a train state"),
        (np.zeros(3), "params: found a ndarray; expected a mapping"),
        (
            nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
            r"params: found a Linear, a model; .*pass the .*parameters: nnx.state\(model\)",
        ),
        (flax.linen.Dense(3), r"params: found a Dense, a model; .*pass the model's parameters"),
    ],
    ids=["None", "array", "nnx.Module", "linen.Module"],
)
def test_something_else_than_a_tree(params, match):
    with pytest.raises(portax.PlanError, match=match):
        CONVERTER.plan(params)


@pytest.mark.parametrize(
    ("dtype", "match"),
    [
        (">f4", r"found dtype >f4; expected float32, .* in the byte order of this host.*newbyteorder\('='\)"),
        (np.longdouble, r"found dtype float128; .*longdouble.*astype\(numpy.float32\)"),
        (np.complex64, r"found dtype complex64; .*something else than weights"),
        (object, r"found dtype object; .*lists of unequal lengths"),
        ("U3", r"found dtype <U3; .*something else than weights"),
    ],
)
def test_arrays_that_no_accelerator_holds(dtype, match):
    params = BASE | {"decoder/decoder_norm/scale": BASE["decoder/decoder_norm/scale"].astype(dtype)}
    for ask in (CONVERTER.plan, CONVERTER.convert):
        with pytest.raises(portax.PlanError, match=f"decoder/decoder_norm/scale: {match}"):
            ask(params)


@pytest.mark.parametrize(
    "transform", [jax.jit, jax.eval_shape, jax.make_jaxpr], ids=["jit", "eval_shape", "make_jaxpr"]
)
@pytest.mark.parametrize("ask", ["convert", "stream", "sync"])
def test_inside_a_program_of_the_callers_own(transform, ask):
    engine = {name: jnp.zeros_like(leaf) for name, leaf in EXPECTED.items()}
    doing = {
        "convert": CONVERTER.convert,
        "stream": lambda params: next(CONVERTER.stream(params, bucket_bytes=1000)),
        "sync": portax.WeightSync(CONVERTER, engine),
    }[ask]
    match = (
        r"decoder_norm/scale \(and \d+ more\): found a tracer; expected an array with values.*call it outside, or plan"
    )
    params = {path: jnp.asarray(leaf) for path, leaf in BASE.items()}
    with pytest.raises(portax.PlanError, match=match):
        transform(doing, params) if transform is jax.eval_shape else transform(doing)(params)


def test_a_plan_is_made_inside_a_program_of_the_callers_own():
    plans = []

    def program(params):
        plans.append(CONVERTER.plan(params))
        return 0

    jax.jit(program)({path: jnp.asarray(leaf) for path, leaf in BASE.items()})
    assert plans[0].entries == CONVERTER.plan(BASE).entries


BOXES = {
    "array": lambda leaf: leaf,
    "shape": lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
    "value": lambda leaf: {"value": leaf},
    "variable": lambda leaf: nnx.Param(leaf),
}
ROOTS = {
    "none": lambda found: found,
    "base": lambda found: {"base": found},
    "params": lambda found: {"params": found},
    "params/params": lambda found: {"params": {"params": found}},
    "model": lambda found: {"model": found},
    "model/base": lambda found: {"model": {"base": found}},
}
BESIDES = {
    "nothing": {},
    "optimizer": {"optimizer": {"step": np.int32(1), "opt_state": {"mu": np.ones(3, np.float32)}}},
    "opt_state": {"opt_state": (optax.EmptyState(), {"mu": np.ones(3, np.float32)}), "step": 5},
    "rngs": {"rngs": {"key": np.zeros(2, np.uint32)}},
}


def written(found, separator):
    """The nested tree, with the paths of its leaves joined, or as it is."""
    if separator == "nested":
        return found
    flat = {".".join(map(str, parts)): leaf for parts, leaf in paths(found)}
    if separator == "tuple":
        return {tuple(path.split(".")): leaf for path, leaf in flat.items()}
    return {path.replace(".", separator): leaf for path, leaf in flat.items()}


def paths(node, at=()):
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if children is None:
        yield at, node
    else:
        for key, child in children:
            yield from paths(child, (*at, key))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    layers=st.sampled_from(["stacked", "/layers_", "/layers/", "list"]),
    box=st.sampled_from([*BOXES]),
    root=st.sampled_from([*ROOTS]),
    beside=st.sampled_from([*BESIDES]),
    separator=st.sampled_from(["nested", "/", ".", "tuple"]),
    order=st.randoms(use_true_random=False),
)
def test_one_tree_gives_one_plan_however_it_is_wrapped(layers, box, root, beside, separator, order):
    flat = BASE if layers == "stacked" else unscanned("/layers/" if layers == "list" else layers)
    keys = [*flat]
    order.shuffle(keys)
    boxed = {path: BOXES[box](flat[path]) for path in keys}
    state = ROOTS[root](listed(boxed) if layers == "list" else nested(boxed))
    hypothesis.assume(root.startswith(("params", "model")) or beside in ("nothing", "rngs"))
    plan = CONVERTER.plan(written(state | BESIDES[beside], separator))
    expected = CONVERTER.plan(flat)
    assert names_of(plan) == names_of(expected)
    assert (plan.bytes_in, plan.bytes_out, plan.peak_bytes) == (
        expected.bytes_in,
        expected.bytes_out,
        expected.peak_bytes,
    )
