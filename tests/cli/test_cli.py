"""The command line, as a user runs it."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import CHECKPOINTS, GOLDEN, command, filled, tree

DENSE = GOLDEN / "qwen3-8b.scan"
CHECKPOINT = CHECKPOINTS / "qwen3-0.6b.scan"
ENGINE = ("--engine-version", "0.32", "--tp", "2")


@pytest.fixture
def portax(capsys, caplog):
    """Runs the command in this process, checks its exit code, and returns what it printed."""

    def run(*args, code=0):
        caplog.clear()
        assert command(*args) == code
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.out + printed.err + caplog.text

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
    assert "the demo has no tree of gpt-2; it has gemma3-4b, gemma4-26b," in portax("demo", "--model", "gpt-2", code=2)


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
    args = ("convert", "--tree", DENSE / "source.json", *ENGINE, "--out", out)
    assert "35 tensors" in portax(*args)
    written = safetensors.numpy.load_file(out / "model-00001-of-00001.safetensors")
    assert len(written) == 35
    assert written["vllm_model.model.layers.0.self_attn.qkv_proj.weight"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        written["vllm_model.model.embed_tokens.weight"][:200].astype(np.float32),
        filled("qwen3-8b.scan")["base/token_embedder/embedding"],
    )
    assert "exists; nothing was written" in portax(*args, code=2)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


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


def test_a_hub_export_without_its_config_says_so(tmp_path, capsys):
    config = ("--config", CHECKPOINT / "maxtext_config.json", "--layout", "hf")
    assert command("convert", CHECKPOINT / "orbax", *config, "--dtype", "bfloat16", "--out", tmp_path / "hub") == 0
    out = capsys.readouterr().out
    assert "46 tensors, 378 kB" in out
    assert "no config.json was written: pass the hub's, --hub-config; no config.json can be derived" in out
    assert "rope_max_timescale: missing" in out


def test_a_hub_export_derives_its_config(tmp_path, capsys):
    said = {"rope_max_timescale": 1000000, "normalization_layer_epsilon": "1e-6"}
    (tmp_path / "model.yml").write_text(json.dumps(json.loads((CHECKPOINT / "maxtext_config.json").read_text()) | said))
    out = ("--layout", "hf", "--out", tmp_path / "hub")
    assert command("convert", CHECKPOINT / "orbax", "--config", tmp_path / "model.yml", *out) == 0
    assert "no config.json" not in capsys.readouterr().out
    hub = json.loads((CHECKPOINT / "hf_config.json").read_text()) | {"rope_theta": 1000000}
    assert json.loads((tmp_path / "hub" / "config.json").read_text()).items() <= hub.items()


def test_an_interrupted_command_goes_on(tmp_path, capsys, caplog, monkeypatch):
    config = ("--config", CHECKPOINT / "hf_config.json", "--layout", "hf")
    args = ("convert", CHECKPOINT / "orbax", *config, "--out", tmp_path / "o", "--shard-bytes", "100000")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("portax.checkpoints.hf_export.index", stop)
        assert command(*args) == 130
    assert "interrupted; what is whole is kept in" in caplog.text
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
    assert "problems, nothing was converted" in out
    assert "decoder/layers/moe_block/wi_0: found nothing" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("plan", "--model", "qwen3-8b", "--tp", "2"), "tpu-inference is not installed here"),
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
def test_unusable_commands(args, message, capsys, caplog):
    assert command(*args) == 2
    assert message in capsys.readouterr().err + caplog.text


def test_importing_portax_imports_nothing_that_few_need():
    """`import portax` is to cost little beyond `import jax`."""
    heavy = {"scipy", "flax", "orbax", "tensorstore", "torch", "transformers"}
    code = f"import sys, jax; known = {{*sys.modules}}; import portax; print(*{heavy} & {{*sys.modules}} - known)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
