"""The command line, as a user runs it."""

import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import CHECKPOINTS, GOLDEN, command, filled, tree

from portax import converter_for, open_checkpoint
from portax.layouts import MaxTextVllm

DENSE = GOLDEN / "qwen3-8b.scan"
CHECKPOINT = CHECKPOINTS / "qwen3-0.6b.scan"
ENGINE = ("--engine-version", "0.32", "--tp", "2")


@pytest.fixture
def portax(capsys):
    """Runs the command in this process, checks its exit code, and returns what it printed."""

    def run(*args, code=0):
        assert command(*args) == code
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.out + printed.err

    return run


def test_a_process_of_its_own():
    command = [sys.executable, "-m", "portax", "verify", "--tree", DENSE / "source.json", "--golden"]
    done = subprocess.run([*command, DENSE / "source.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not a golden file" in done.stderr


def test_demo_checks_a_model_for_every_tp(portax):
    out = portax("demo", "--model", "qwen3-8b")
    assert "4 conversions, 140 leaves against the real engine's digests: every one exact." in out
    assert "vllm_model.model.layers.{0...3}.mlp.gate_up_proj.weight" in out


def test_demo_for_machines(portax):
    out = json.loads(portax("demo", "--model", "qwen3-0.6b", "--json"))
    assert out["exact"]
    assert [run["tp"] for run in out["runs"]] == [1, 2, 4, 8]


def test_demo_of_an_unknown_model(portax):
    error = portax("demo", "--model", "gpt-2", code=2)
    assert "the demo has no tree of 'gpt-2' for tpu-inference; did you mean gpt-oss-20b? there are gemma2-2b, " in error


def test_verify_passes_and_fails_leaf_by_leaf(portax, tmp_path):
    golden = json.loads((DENSE / "tpu-inference-0.32.0.tp2.json").read_text())
    assert "35 leaves, all exact" in portax(
        "verify", "--tree", DENSE / "source.json", "--golden", DENSE / "tpu-inference-0.32.0.tp2.json"
    )
    name = "vllm_model.model.layers.3.mlp.down_proj.weight"
    golden["leaves"][name]["sha256"] = "0" * 16
    del golden["leaves"]["vllm_model.model.norm.weight"]
    (tmp_path / "golden.json").write_text(json.dumps(golden))
    out = portax("verify", "--tree", DENSE / "source.json", "--golden", tmp_path / "golden.json", code=1)
    assert "35 leaves, 2 differ" in out
    assert "1 differs " in out
    assert "1 differ " not in out
    out = portax("verify", "--tree", DENSE / "source.json", "--golden", tmp_path / "golden.json", "--json", code=1)
    wrong = {leaf: row["difference"] for leaf, row in json.loads(out)["leaves"].items() if not row["exact"]}
    assert wrong.keys() == {name, "vllm_model.model.norm.weight"}
    assert wrong["vllm_model.model.norm.weight"] == "the engine has no such leaf"


def test_verify_under_attention_data_parallelism(portax):
    golden = DENSE / "tpu-inference-0.32.0.tp8.adp2.json"
    assert "35 leaves, all exact" in portax("verify", "--tree", DENSE / "source.json", "--golden", golden)


def test_verify_a_users_own_weights(portax, tmp_path):
    safetensors.numpy.save_file(dict(filled("qwen3-8b.scan")), tmp_path / "tree.safetensors")
    (tmp_path / "model.yml").write_text(json.dumps(dict(tree("qwen3-8b.scan").config)))
    args = ("verify", "--tree", tmp_path / "tree.safetensors", "--golden", DENSE / "hf.json")
    assert "47 leaves, all exact" in portax(*args, "--config", tmp_path / "model.yml")
    assert "no configuration: pass --model or --config" in portax(*args, code=2)


def test_convert_writes_what_the_library_makes(portax, tmp_path):
    out = tmp_path / "weights"
    safetensors.numpy.save_file(dict(filled("qwen3-8b.scan")), tmp_path / "tree.safetensors")
    (tmp_path / "model.yml").write_text(json.dumps(dict(tree("qwen3-8b.scan").config)))
    weights = ("--tree", tmp_path / "tree.safetensors", "--config", tmp_path / "model.yml")
    args = ("convert", *weights, *ENGINE, "--out", out)
    assert "35 tensors" in portax(*args)
    written = safetensors.numpy.load_file(out / "model-00001-of-00001.safetensors")
    assert len(written) == 35
    assert written["vllm_model.model.layers.0.self_attn.qkv_proj.weight"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        written["vllm_model.model.embed_tokens.weight"][:200].astype(np.float32),
        filled("qwen3-8b.scan")["base/token_embedder/embedding"],
    )
    assert "exists; nothing was written" in portax(*args, code=2)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


SOURCE = DENSE / "source.json"


@pytest.mark.parametrize(
    "args",
    [
        ("convert", SOURCE, *ENGINE, "--out", "x"),
        ("convert", SOURCE, "--layout", "hf", "--no-hub-config", "--out", "x", "--dry-run"),
        ("validate", SOURCE, "--hub-config", DENSE / "config.json", "--dry-run"),
        ("import", SOURCE, "--config", DENSE / "config.json", "--out", "x"),
        ("inspect", SOURCE),
        ("diff", SOURCE, SOURCE),
    ],
)
def test_a_dumped_tree_is_no_model(portax, args):
    told = portax(*args, code=2)
    assert f"portax: error: {SOURCE}: is a dumped tree: names, shapes and dtypes of a model, and no values" in told


def test_of_dumped_trees_shapes_can_be_compared(portax):
    assert "verdict  14 leaves: 14 equal in shape and dtype" in portax("diff", SOURCE, SOURCE, "--dry-run")


def test_a_checkpoint_to_the_hub(tmp_path, capsys):
    out = tmp_path / "hub"
    args = ("convert", CHECKPOINT / "orbax", "--config", CHECKPOINT / "hf_config.json", "--layout", "hf", "--out", out)
    assert command(*args, "--dry-run") == 0
    assert "would write   757 kB in 1 file to" in capsys.readouterr().out
    assert [*tmp_path.iterdir()] == []
    assert command(*args, "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["tensors"], done["shards"], done["nbytes"]) == (46, 1, 756992)
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen3"
    assert len(safetensors.numpy.load_file(out / "model-00001-of-00001.safetensors")) == 46


def test_a_hub_export_without_a_config_is_refused_before_anything_is_written(portax, tmp_path):
    config = ("--config", CHECKPOINT / "maxtext_config.json", "--layout", "hf")
    args = ("convert", CHECKPOINT / "orbax", *config, "--dtype", "bfloat16", "--out", tmp_path / "hub")
    told = portax(*args, code=2)
    assert "no config.json for the hub: pass the hub's, --hub-config, or --no-hub-config to write the tensors" in told
    assert "rope_max_timescale: missing" in told
    assert [*tmp_path.iterdir()] == []
    assert "46 tensors, 378 kB" in portax(*args, "--no-hub-config")
    assert not (tmp_path / "hub" / "config.json").exists()
    assert "not allowed with argument" in portax(*args, "--no-hub-config", "--hub-config", "x", code=2)
    engine = ("convert", CHECKPOINT / "orbax", *ENGINE, "--no-hub-config", "--out", tmp_path / "x")
    assert "--no-hub-config: a config.json goes with --layout hf" in portax(*engine, code=2)


def test_a_hub_export_derives_its_config(tmp_path, capsys):
    said = {"rope_max_timescale": 1000000, "normalization_layer_epsilon": "1e-6"}
    (tmp_path / "model.yml").write_text(json.dumps(json.loads((CHECKPOINT / "maxtext_config.json").read_text()) | said))
    out = ("--layout", "hf", "--out", tmp_path / "hub")
    assert command("convert", CHECKPOINT / "orbax", "--config", tmp_path / "model.yml", *out) == 0
    assert "no config.json" not in capsys.readouterr().out
    hub = json.loads((CHECKPOINT / "hf_config.json").read_text()) | {"rope_theta": 1000000}
    assert json.loads((tmp_path / "hub" / "config.json").read_text()).items() <= hub.items()


def test_an_interrupted_command_goes_on(tmp_path, capsys, monkeypatch):
    config = ("--config", CHECKPOINT / "hf_config.json", "--layout", "hf")
    args = ("convert", CHECKPOINT / "orbax", *config, "--out", tmp_path / "o", "--shard-bytes", "100000")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("portax.checkpoints.hf_export.index", stop)
        assert command(*args) == 130
    assert "interrupted; what is whole is kept in" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert command(*args) == 0
    assert "in 8 files, 8 of them from before" in capsys.readouterr().out


def test_inspect_names_the_family(capsys):
    assert command("inspect", CHECKPOINT / "orbax") == 0
    out = capsys.readouterr().out
    for line in (
        "parameters  13 leaves, 757 kB, float32",
        "layers      4, scanned on axis 1",
        "family      qwen3 (Qwen3Converter)",
        "tpu-inference 0.32, tp=4",
        "query heads = 4 is not divisible",
    ):
        assert line in out
    assert command("inspect", CHECKPOINT / "orbax", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["root"] == "base/"
    assert found["families"][0]["sizes"]["emb_dim"] == 64
    assert {row["layout"]: row.get("bytes") for row in found["layouts"]}["hf"] == found["bytes"] == 756992


def test_inspect_says_why_no_layout_can_be_planned(portax, tmp_path):
    safetensors.numpy.save_file(dict(filled("qwen3-next-80b-a3b.scan")), tmp_path / "next.safetensors")
    rows = json.loads(portax("inspect", tmp_path / "next.safetensors", "--json"))["layouts"]
    assert len(rows) == 10
    why = "the factors of gdn_key_dim=64: not told by the leaves; pass --model or --config"
    assert {row["problem"] for row in rows} == {why}
    assert f"not told    {why.replace(' not told by the leaves;', '')}" in portax(
        "inspect", tmp_path / "next.safetensors"
    )
    (tmp_path / "model.yml").write_text(json.dumps(dict(tree("qwen3-next-80b-a3b.scan").config)))
    known = portax("inspect", tmp_path / "next.safetensors", "--config", tmp_path / "model.yml", "--json")
    assert {row["layout"]: row.get("bytes") for row in json.loads(known)["layouts"]}["hf"] == json.loads(known)["bytes"]


def test_a_plan_of_a_checkpoint(capsys):
    assert command("plan", CHECKPOINT / "orbax", "--config", CHECKPOINT / "maxtext_config.json", *ENGINE) == 0
    assert "from" in capsys.readouterr().out
    assert command("plan", CHECKPOINT / "orbax", "--model", "qwen3-8b", *ENGINE) == 1


def test_plan_on_paper(portax):
    run = ("plan", "--model", "qwen3-235b-a22b")
    assert "layers.{0...93}.mlp.experts.routed_experts.w13_weight" in portax(*run, *ENGINE)
    read = json.loads(portax("plan", "--model", "qwen3-30b-a3b", "--layout", "huggingface", "--json"))
    assert read["bytes_out"] == pytest.approx(30.5e9 * 4, rel=0.01)


def test_a_plan_with_problems_lists_them(portax):
    out = portax("plan", "--tree", DENSE / "source.json", "--model", "qwen3-30b-a3b", *ENGINE, code=1)
    assert "problems, nothing was changed" in out
    assert "decoder/layers/moe_block/wi_0: found nothing" in out


def test_a_plan_with_problems_lists_them_for_machines(capsys):
    args = ("plan", "--tree", DENSE / "source.json", "--model", "qwen3-30b-a3b", *ENGINE, "--json")
    assert command(*args) == 1
    out = json.loads(capsys.readouterr().out)
    assert out["error"] == "PlanError"
    [missing] = [row for row in out["problems"] if row["leaf"].endswith("decoder/layers/moe_block/wi_0")]
    assert missing.keys() == {"leaf", "found", "expected", "cause"}
    assert missing["found"] == "nothing"


def test_an_error_for_machines(capsys):
    assert command("plan", "--model", "qwen3-8b", "--engine-version", "0.32", "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"] == "ConfigError"


def test_an_error_is_one_plain_line(capsys):
    assert command("inspect", "gone") == 2
    assert capsys.readouterr().err == "portax: error: gone: there is no such checkpoint\n"


@pytest.mark.parametrize(
    ("args", "kept"),
    [
        (("models",), "nothing was written; run the same command again"),
        (("inspect", CHECKPOINT / "orbax"), "nothing was written; run the same command again"),
        (("plan", "--model", "qwen3-8b", *ENGINE), "nothing was written; run the same command again"),
        (
            ("convert", CHECKPOINT / "orbax", "--config", CHECKPOINT / "hf_config.json", *ENGINE, "--out", "gone/x"),
            f"what is whole is kept in {pathlib.Path('gone') / '.x.unfinished'}, and the same command goes on from",
        ),
        (("import", CHECKPOINT / "orbax", "--out", "x"), "nothing was written; run the same command again"),
        (("diff", "a", "b"), "nothing was written; run the same command again"),
        (("validate", CHECKPOINT, "--hub-config", "x"), "nothing was written; run the same command again"),
        (("verify", SOURCE, "--golden", "x"), "nothing was written; run the same command again"),
        (("verify", "--goldens", DENSE), "nothing was written; run the same command again"),
        (("demo",), "nothing was written; run the same command again"),
        (("doctor",), "nothing was written; run the same command again"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_command_can_be_interrupted(args, kept, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    for what in (
        "models.families",
        "inspect.arguments.named_config",
        "plan.arguments.layout",
        "convert.arguments.layout",
        "import_.arguments.new_folder",
        "diff.arguments.page",
        "validate.arguments.hub_config",
        "verify.devices.simulate",
        "verify.Golden.load",
    ):
        monkeypatch.setattr(f"portax.cli.{what}", stop)
    assert command(*args) == 130
    assert capsys.readouterr().err.startswith(f"portax: interrupted; {kept}")


def test_a_signal_ends_a_command_with_one_line():
    code = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background job ignores it
    code += "; import portax.cli.models as m; m.families = lambda: os.kill(os.getpid(), signal.SIGINT)"
    code += "; from portax.cli.main import run; import sys; sys.argv = ['portax', 'models']; run()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "portax: interrupted; nothing was written; run the same command again\n"


def test_who_reads_no_further_gets_no_traceback():
    command = f"{sys.executable} -m portax models --json | true"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_help_shows_portaxs_own_options_alone(portax):
    for args in (("--help",), ("plan", "--help")):
        out = portax(*args)
        assert "absl" not in out
        assert "--verbosity" not in out
    assert "unrecognized arguments: --helpfull" in portax("models", "--helpfull", code=2)


def test_the_version(portax):
    assert portax("--version") == f"portax {importlib.metadata.version('portax')}\n"


def test_names_that_are_nearly_right(portax):
    assert "did you mean qwen3-30b-a3b" in portax("plan", "--model", "qwen3-30b-a3", *ENGINE, code=2)
    assert "did you mean gemma4-26b" in portax("plan", "--model", "Gemma4-26B", *ENGINE, code=2)
    assert "did you mean qwen3-8b" in portax("demo", "--model", "qwen3-8", code=2)
    assert "did you mean" not in portax("plan", "--model", "xyz", *ENGINE, code=2)


@pytest.mark.parametrize(
    ("args", "advice"),
    [
        (("--engine-version", "0.99", "--tp", "2"), "or pass --allow-untested to use the newest known layout"),
        (("--tp", "2"), "name the version of the engine: --engine-version 0.32"),
        (("--layout", "flax-nnx", *ENGINE, "--model", "gemma3-4b"), "Use --layout tpu-inference"),
        ((*ENGINE, "--strict-dtype"), "Likely cause: --strict-dtype; without it"),
    ],
)
def test_advice_is_for_people_at_a_shell(args, advice, capsys):
    model = () if "--model" in args else ("--model", "qwen3-8b")
    assert command("plan", *model, *args) in (1, 2)
    told = capsys.readouterr().err
    assert advice in told
    assert not re.search(r"\w+=(True|False)|\w+\(\w+=|portax\.", told)


def test_leaves_are_left_out_by_pattern(portax, tmp_path):
    params = {**filled("qwen3-8b.scan"), "base/vision_encoder/patch/kernel": np.ones((2, 2), np.float32)}
    safetensors.numpy.save_file(params, tmp_path / "tree.safetensors")
    (tmp_path / "model.yml").write_text(json.dumps(dict(tree("qwen3-8b.scan").config)))
    args = ("plan", tmp_path / "tree.safetensors", "--config", tmp_path / "model.yml", *ENGINE)
    told = portax(*args, code=1)
    assert "vision_encoder/patch/kernel" in told
    assert "leave=" not in told
    assert "vision_encoder/patch/kernel" in portax(*args, "--leave", "*/vision_encoder/*")
    assert "--leave '*/audio/*': found no leaf that it matches" in portax(*args, "--leave", "*/audio/*", code=1)


def test_an_untested_engine_may_be_tried(portax):
    args = ("plan", "--model", "qwen3-8b", "--engine-version", "0.99", "--tp", "2", "--allow-untested", "--json")
    assert "version='0.99'" in json.loads(portax(*args))["layout"]


MAXTEXT = ("--layout", "maxtext-vllm", "--engine-version", "0.2.5", "--tp", "4")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ((), "version='0.2.5', tp=4, attention_dp=1, expert_parallel=1, prefused=True"),
        (("--attention-dp", "2", "--expert-parallel", "2", "--experts", "whole"), "experts='whole'"),
        (("--not-prefused", "--experts", "as_loaded"), "prefused=False"),
    ],
)
def test_maxtexts_own_model_is_planned_for(portax, args, told):
    plan = json.loads(portax("plan", "--model", "qwen3-30b-a3b", *MAXTEXT, *args, "--json"))
    assert told in plan["layout"]
    assert "model.decoder.layers_47.moe_block.wo" in plan["entries"]


def test_the_demo_of_maxtexts_own_model(portax):
    out = json.loads(portax("demo", "--engine", "maxtext-vllm", "--model", "qwen3-0.6b", "--json"))
    assert out["exact"]
    assert [run["tp"] for run in out["runs"]] == [1, 2, 4, 8]
    assert "model.decoder.layers_0.mlp.wi_0.kernel" in out["runs"][0]["leaves"]


def test_the_doctor_of_maxtexts_own_model(portax):
    out = json.loads(portax("doctor", "--engine", "maxtext-vllm", "--model", "qwen3.5-35b-a3b", "--json"))
    assert out["passed"]
    assert out["checks"][-1] == {
        "what": "the state is what maxtext-vllm-0.32.0 holds, by its digests",
        "passed": True,
        "found": "129 leaves, all exact",
    }


def test_verify_takes_goldens_of_maxtexts_own_model(portax):
    moe = GOLDEN / "qwen3-30b-a3b.scan"
    golden = ("verify", "--tree", moe / "source.json", "--golden")
    assert "47 leaves, all exact" in portax(*golden, moe / "maxtext-vllm-0.32.0.tp4.adp2.json")
    assert command(*golden, moe / "maxtext-vllm-0.32.0.tp2.ep2.json") == 1


def test_convert_writes_what_maxtexts_own_model_holds(portax, tmp_path):
    config = ("--config", CHECKPOINT / "maxtext_config.json")
    portax("convert", CHECKPOINT / "orbax", *config, *MAXTEXT, "--out", tmp_path / "held")
    written = safetensors.numpy.load_file(tmp_path / "held" / "model-00001-of-00001.safetensors")
    converter = converter_for(CHECKPOINT / "maxtext_config.json", layout=MaxTextVllm(version="0.2.5", tp=4))
    made = converter.convert(open_checkpoint(CHECKPOINT / "orbax"))
    assert written.keys() == made.keys()
    for name, leaf in made.items():
        assert written[name].tobytes() == np.asarray(leaf).tobytes(), name


def test_maxtexts_own_model_is_refused_where_it_would_be_a_wrong_one(capsys):
    assert command("plan", "--model", "qwen3-30b-a3b", *MAXTEXT, "--expert-parallel", "2") == 1
    assert "serves a wrong model; expected experts='whole'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("plan", "--model", "qwen3-8b", "--tp", "2"), "tpu-inference is not installed here"),
        (("plan", "--model", "qwen3-8b", "--layout", "maxtext-vllm", "--tp", "2"), "maxtext is not installed here"),
        (("plan", "--model", "qwen3-8b", *ENGINE, "--not-prefused"), "--not-prefused is for --layout maxtext-vllm"),
        (
            ("plan", "--model", "qwen3-8b", *ENGINE, "--expert-parallel", "2"),
            "--expert-parallel is for --layout maxtext",
        ),
        (("plan", "--model", "qwen3-8b", "--engine-version", "0.32"), "--tp is required"),
        (
            ("plan", "--model", "qwen3-8b", "--engine-version", "0.19", "--tp", "2"),
            "0.19 is not among the known layouts",
        ),
        (("plan", "--model", "qwen3-8b", *ENGINE, "--attention-dp", "4"), "attention_dp=4 does not divide tp=2"),
        (("plan", "--model", "qwen-9", *ENGINE), "no configuration is shipped for 'qwen-9'"),
        (("plan", *ENGINE), "no configuration"),
        (("verify", "--tree", DENSE / "source.json", "--golden", DENSE / "source.json"), "is not a golden file"),
        (
            ("verify", "--tree", DENSE / "hf.json", "--golden", DENSE / "hf.json"),
            "is not a mapping with config, params",
        ),
        (("verify", "--tree", "gone.json", "--golden", DENSE / "hf.json"), "gone.json: cannot be read as JSON"),
        (
            ("convert", "--tree", "gone.safetensors", "--model", "qwen3-8b", *ENGINE, "--out", "x"),
            "gone.safetensors: there is no such checkpoint",
        ),
        (
            ("convert", CHECKPOINT / "hf_config.json", CHECKPOINT, "--out", "x"),
            "unrecognized arguments",
        ),
        (("convert", "--model", "qwen3-8b", *ENGINE, "--out", "x"), "no weights: name a checkpoint or a tree"),
        (
            ("plan", CHECKPOINT, "--tree", CHECKPOINT, "--model", "qwen3-8b", *ENGINE),
            "CHECKPOINT and --tree are the same thing",
        ),
        (
            ("convert", CHECKPOINT, *ENGINE, "--hub-config", CHECKPOINT / "hf_config.json", "--out", "x"),
            "a config.json goes with --layout hf",
        ),
        (
            ("convert", CHECKPOINT, "--layout", "hf", "--hub-config", CHECKPOINT / "maxtext_config.json", "--out", "x"),
            "has no model_type, so it is no hub config.json",
        ),
        (("inspect", "gone"), "gone: there is no such checkpoint"),
        (("explode",), "invalid choice: 'explode'"),
        ((), "the following arguments are required: command"),
    ],
)
def test_unusable_commands(args, message, capsys):
    assert command(*args) == 2
    assert message in capsys.readouterr().err


def test_importing_portax_imports_nothing_that_few_need():
    """`import portax` is to cost little beyond `import jax`."""
    heavy = {"scipy", "flax", "orbax", "tensorstore", "torch", "transformers"}
    code = f"import sys, jax; known = {{*sys.modules}}; import portax; print(*{heavy} & {{*sys.modules}} - known)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
