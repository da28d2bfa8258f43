"""tpu-inference's native JAX models: a nested `nnx.State`, and what the engine does not serve that way."""

import enum
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, command, filled, mesh, tree
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import portax
from portax.integrations import tpu_inference
from portax.layouts import FlaxNnx, TpuInference
from portax.testing.golden import Golden, compare

QWEN3, LLAMA, GEMMA = "qwen3-8b-nnx.scan", "llama3.1-8b.scan", "gemma4-26b-nnx.scan"
TP2 = "tpu-inference-flax-0.32.0.tp2.json"
NATIVE_GOLDENS = sorted(GOLDEN.glob("*/tpu-inference-flax-*.json"))
TP4 = FlaxNnx(version="0.32", tp=4)


def converter(name, layout=TP4, **changes):
    module_prefix = changes.pop("module_prefix", None)
    config = {key: value for key, value in tree(name).config.items() if key.removeprefix("base_") not in changes}
    return portax.converter_for(config | changes, layout=layout, module_prefix=module_prefix)


def live(name):
    """An engine's state as `nnx.split` makes it: nested, layers by number, and with its random numbers' own."""
    rows = json.loads((GOLDEN / name / TP2).read_text())["leaves"]
    on = mesh(data=1, model=2)
    random = np.random.default_rng(0)

    def variable(path, row):
        if path.startswith("rng."):
            return nnx.RngCount(jnp.zeros(row["shape"], row["dtype"]))
        values = random.standard_normal(row["shape"]).astype(row["dtype"])
        return nnx.Param(jax.device_put(values, NamedSharding(on, PartitionSpec(*row["spec"]))))

    flat = {
        tuple(int(part) if part.isdigit() else part for part in path.split(".")): variable(path, row)
        for path, row in rows.items()
    }
    return nnx.from_flat_state(flat)


def wrong(state, golden):
    leaves = {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}
    return [row.name for row in compare({k: leaves[k] for k in golden.leaves}, golden) if row.difference]


@pytest.mark.parametrize("path", NATIVE_GOLDENS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_reproduces_the_engines_state(path):
    """Values on one device, specs by the plan; syncs, below, put both on a mesh."""
    golden, name = Golden.load(path), path.parent.name
    made = converter(name, golden.layout)
    weights = made.convert(filled(name))
    assert [f"{row.name}: {row.difference}" for row in compare(weights, golden) if row.difference] == []
    specs = {entry.name: entry.spec for entry in made.plan(filled(name)).entries}
    assert specs == {leaf: row.spec for leaf, row in golden.leaves.items()}


@pytest.mark.parametrize("name", [QWEN3, LLAMA])
def test_syncs_into_a_nested_state(name):
    golden, state = Golden.load(GOLDEN / name / TP2), live(name)
    variables = dict(nnx.to_flat_state(state))
    owned = {
        path: leaf.get_value() for path, leaf in variables.items() if ".".join(map(str, path)) in golden.engine_owned
    }
    assert len(wrong(state, golden)) == len(golden.leaves)
    report = portax.WeightSync(converter(name, golden.layout), state)(filled(name))
    assert (wrong(state, golden), report.leaves) == ([], len(golden.leaves))
    assert all(variables[path] is variable for path, variable in nnx.to_flat_state(state))
    assert all(variables[path].get_value() is leaf for path, leaf in owned.items())


@pytest.mark.parametrize("name", [LLAMA, GEMMA])
def test_a_plan_against_the_live_state(name):
    golden = Golden.load(GOLDEN / name / TP2)
    assert converter(name, golden.layout).plan(tree(name).shapes, live(name)).engine_owned == golden.engine_owned != ()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("qwen3-30b-a3b.scan", "Qwen3MoeForCausalLM"),
        ("qwen3.5-35b-a3b.scan", "Qwen3_5MoeForConditionalGeneration"),
        ("qwen3-next-80b-a3b.scan", "Qwen3NextForCausalLM"),
        ("gemma3-4b.scan", "Gemma3ForConditionalGeneration"),
    ],
)
def test_a_family_that_the_engine_runs_on_torchax(name, architecture):
    match = (
        rf"{architecture} is not among the native JAX models .* on torchax.* Use TpuInference\(version=\"0.32\", tp=4\)"
    )
    with pytest.raises(portax.LayoutError, match=match):
        converter(name)


def test_gemma4_of_text_alone_was_not_run():
    with pytest.raises(portax.LayoutError, match="Gemma4ForCausalLM is not among the native JAX models"):
        converter(GEMMA, module_prefix="")


def test_layers_without_keys_and_values():
    shapes = tree("gemma4-e2b.unscan").shapes
    with pytest.raises(
        portax.PlanError, match=r"self_attn.q_proj: a layer without keys and values of its own.*TpuInference"
    ):
        converter("gemma4-e2b.unscan").plan(shapes)


def test_a_family_of_another_package_names_its_model_class():
    class Own(portax.Qwen3Converter):
        architecture = native_model = None

    config = tree(QWEN3).config
    with pytest.raises(portax.LayoutError, match=r"the converter has to describe its model class \(`native_model`\)"):
        Own(config, layout=TP4)
    model = portax.layouts.NativeModel("Qwen3ForCausalLM", pads_vocab=True)
    named = FlaxNnx(version="0.32", tp=4, model=model)
    assert (
        Own(config, layout=named).plan(tree(QWEN3).shapes).entries == converter(QWEN3).plan(tree(QWEN3).shapes).entries
    )


@pytest.mark.parametrize(
    ("version", "match"),
    [
        ("0.31", r"tpu-inference 0.31 is not among those of this layout, 0.32; older engines"),
        ("0.33", r"0.33 is not among those of this layout.*may hold weights differently.*allow_untested=True"),
        ("latest", "is not a version of tpu-inference, such as '0.32'"),
    ],
)
def test_versions_that_were_not_run(version, match):
    with pytest.raises(portax.LayoutError, match=match):
        FlaxNnx(version=version, tp=2)


def test_a_backend_that_was_not_run():
    with pytest.raises(portax.LayoutError, match="moe_backend='fused_moe' is unknown; known: gmm_tp, gmm_ep"):
        FlaxNnx(version="0.32", tp=2, moe_backend="fused_moe")


def test_an_untested_version_on_request():
    assert FlaxNnx(version="0.33", tp=2, allow_untested=True).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "tp", "changes", "match"),
    [
        (
            QWEN3,
            4,
            {"head_dim": 16},
            r"head_dim = 16 is neither 64 nor a multiple of 128.*own loader refuses that for Qwen3",
        ),
        (GEMMA, 4, {"global_head_dim": 96}, "head_dim = 96 is neither"),
        (QWEN3, 16, {}, "KV heads = 8 and tp=16: the engine's own loader refuses that"),
        (QWEN3, 32, {}, "query heads = 16 is not divisible by tp=32"),
        ("qwen2.5-1.5b-nnx.scan", 8, {}, "KV heads = 4 and tp=8: the engine's own loader refuses that"),
        (LLAMA, 3, {"num_query_heads": 9}, "KV heads = 2 and tp=3: do not divide either way"),
        (LLAMA, 16, {}, "query heads = 8 is not divisible by tp=16"),
        (GEMMA, 3, {}, "a part of width 40 is not divisible by tp=3"),
        (GEMMA, 16, {"num_query_heads": 16, "moe_mlp_dim": 40}, "MoE width 40 is not divisible by tp=16"),
        (
            QWEN3,
            16,
            {"num_kv_heads": 16},
            "mlp.down_proj.weight: found a dimension of 40; expected one that model=16 divides",
        ),
        (
            "qwen2.5-7b.scan",
            2,
            {"head_dim": 64},
            "a native Qwen2ForCausalLM whose output projection is not tied to its embedding was not run, or",
        ),
        (
            LLAMA,
            2,
            {"logits_via_embedding": True},
            "a native LlamaForCausalLM whose embedding is its output projection",
        ),
    ],
)
def test_sizes_that_the_engine_does_not_take(name, tp, changes, match):
    made = converter(name, FlaxNnx(version="0.32", tp=tp), **changes)
    with pytest.raises(portax.PlanError, match=match):
        made.plan(made.expected_tree())


@pytest.mark.parametrize("name", [QWEN3, LLAMA])
def test_a_tree_comes_back(name):
    """But from a layout that repeats elements."""
    made = converter(name, FlaxNnx(version="0.32", tp=2, dtype=jnp.float32))
    back = made.restore({path: np.asarray(leaf) for path, leaf in made.convert(filled(name)).items()})
    for path, leaf in filled(name).items():
        scaled = name == LLAMA and "query" in path
        np.testing.assert_array_max_ulp(back[path.removeprefix("base/")], leaf, maxulp=1 if scaled else 0)


def test_repeated_heads_do_not_come_back():
    made = converter(LLAMA)
    weights = {entry.name: np.zeros(entry.shape, entry.dtype) for entry in made.plan(tree(LLAMA).shapes).entries}
    with pytest.raises(portax.LayoutError, match=r"self_attention/key/kernel.*holds some elements several times"):
        made.restore(weights)


def test_every_pattern_of_bfloat16_survives():
    params = {
        path: np.resize(np.arange(2**16, dtype=np.uint16), leaf.shape).view(jnp.bfloat16)
        for path, leaf in filled(QWEN3).items()
    }
    made = converter(QWEN3, FlaxNnx(version="0.32", tp=2)).on(mesh(data=1, model=2))
    weights = made.convert(params)
    at = "base/decoder/layers/self_attention/query/kernel"
    got = np.asarray(weights["model.layers.1.self_attn.q_proj.weight"])
    np.testing.assert_array_equal(got.view(np.uint16), params[at][:, 1].view(np.uint16))


Backend = enum.Enum("Backend", "GMM_TP GMM_EP")


class Experts(nnx.Module):
    def __init__(self, backend):
        self.moe_backend = backend


class Model(nnx.Module):
    """As much of a native JAX model as `layout` reads."""

    def __init__(self, *backends):
        self.layers = nnx.List([Experts(backend) for backend in backends])


class Engine:
    """A live engine as `LLM.llm_engine` shows it, with a runner that steps on `state_leaves`."""

    def __init__(self, name, *, on=None, backends=()):
        config = types.SimpleNamespace(dtype="torch.bfloat16", quantization=None)
        self.runner = runner = types.SimpleNamespace(
            state=live(name),
            mesh=on or mesh(data=1, model=2),
            model=Model(*backends),
            vllm_config=types.SimpleNamespace(model_config=config),
        )
        runner.refresh_state_leaves = self.refresh
        self.refresh()
        self.llm_engine = self
        self.model_executor = types.SimpleNamespace(driver_worker=types.SimpleNamespace(model_runner=runner))

    def refresh(self):
        self.runner.state_leaves = tuple(jax.tree.leaves(self.runner.state))

    def reset_prefix_cache(self):
        return True

    def collective_rpc(self, method):
        assert method in ("start_weight_update", "refresh_model_state_leaves", "finish_weight_update")
        if method == "refresh_model_state_leaves":
            self.refresh()


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.32.0")


@pytest.mark.parametrize(("name", "module_prefix"), [(QWEN3, ""), (LLAMA, ""), (GEMMA, "language_model.")])
def test_everything_is_read_off_the_engine(installed, name, module_prefix):
    engine = Engine(name, backends=[Backend.GMM_EP])
    assert tpu_inference.layout(engine) == FlaxNnx(version="0.32.0", tp=2, moe_backend="gmm_ep")
    assert tpu_inference.layout(Engine(name)).moe_backend == "gmm_tp"
    assert tpu_inference.module_prefix(engine) == module_prefix


def test_a_state_without_an_embedding(installed):
    engine = Engine(QWEN3)
    del engine.runner.state["model"]["embed_tokens"]
    with pytest.raises(portax.LayoutError, match=r"no leaf model.\*embed_tokens.weight"):
        tpu_inference.module_prefix(engine)


def test_attention_data_parallelism_was_not_run(installed):
    engine = Engine(QWEN3, on=mesh(data=1, attn_dp=1, model=2))
    with pytest.raises(portax.LayoutError, match=r"flax_nnx\) on the mesh of NEW_MODEL_DESIGN=1, which was not run"):
        tpu_inference.layout(engine)


def test_the_engine_steps_on_what_was_written(installed):
    engine, golden = Engine(QWEN3), Golden.load(GOLDEN / QWEN3 / TP2)
    sync = tpu_inference.weight_sync(engine, tree(QWEN3).config)
    with tpu_inference.updating(engine):
        sync(filled(QWEN3))
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(engine.runner.state)]
    rows = compare(dict(zip(names, engine.runner.state_leaves, strict=True)), golden)
    assert [row.name for row in rows if row.difference] == []


def test_an_engine_on_torchax_is_no_native_one():
    with pytest.raises(
        portax.PlanError, match=r"vllm_model.model.norm.weight: found a leaf of the engine that nothing writes"
    ):
        converter(QWEN3).plan(
            tree(QWEN3).shapes, {"vllm_model.model.norm.weight": jax.ShapeDtypeStruct((48,), "bfloat16")}
        )
    assert TpuInference(version="0.32", tp=4).for_architecture("Qwen3ForCausalLM") == TpuInference(version="0.32", tp=4)


def run(capsys, *args):
    return command(*args), capsys.readouterr().out


def test_the_command_line(capsys):
    flax = ("--layout", "flax-nnx", "--engine-version", "0.32")
    code, out = run(capsys, "plan", "--model", "qwen3-8b", *flax, "--tp", "8", "--json")
    names = json.loads(out)["entries"]
    assert (code, "model.layers.35.mlp.gate_proj.weight" in names) == (0, True)
    assert run(capsys, "verify", "--tree", GOLDEN / QWEN3 / "source.json", "--golden", GOLDEN / QWEN3 / TP2)[0] == 0
    for args, message in (
        (flax, "--tp is required"),
        ((*flax, "--tp", "8", "--attention-dp", "2"), "--attention-dp is for --layout tpu-inference"),
        (("--layout", "flax-nnx", "--tp", "8"), "name the version of the engine: --engine-version 0.32"),
    ):
        assert command("plan", "--model", "qwen3-8b", *args) == 2
        assert message in capsys.readouterr().err
