"""The command line, as a user runs it: in a process of its own."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDEN, filled, tree

from portax import cli

DENSE = GOLDEN / "qwen3-8b.scan"
ENGINE = ("--engine-version", "0.32", "--tp", "2")


def portax(*args, code=0):
    """Runs the command in a process of its own."""
    command = [sys.executable, "-m", "portax", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stdout + done.stderr


def test_demo_checks_a_model_for_every_tp():
    out = portax("demo", "--model", "qwen3-8b")
    assert "4 conversions, 140 leaves against the real engine's digests: every one exact." in out
    assert "vllm_model.model.layers.{0...3}.mlp.gate_up_proj.weight" in out


def test_demo_for_machines():
    out = json.loads(portax("demo", "--model", "qwen3-0.6b", "--json"))
    assert out["exact"]
    assert [run["tp"] for run in out["runs"]] == [1, 2, 4, 8]


def test_demo_of_an_unknown_model():
    assert "the demo has no tree of gpt-2; it has gemma3-4b, gemma4-26b," in portax("demo", "--model", "gpt-2", code=2)


def test_verify_passes_and_fails_leaf_by_leaf(tmp_path):
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


def test_verify_under_attention_data_parallelism():
    golden = DENSE / "tpu-inference-0.32.0.tp8.adp2.json"
    assert "35 leaves, all exact" in portax("verify", "--tree", DENSE / "source.json", "--golden", golden)


def test_verify_a_users_own_weights(tmp_path):
    safetensors.numpy.save_file(dict(filled("qwen3-8b.scan")), tmp_path / "tree.safetensors")
    (tmp_path / "model.yml").write_text(json.dumps(dict(tree("qwen3-8b.scan").config)))
    args = ("verify", "--tree", tmp_path / "tree.safetensors", "--golden", DENSE / "hf.json")
    assert "47 leaves, all exact" in portax(*args, "--config", tmp_path / "model.yml")
    assert "no configuration: pass --model or --config" in portax(*args, code=2)


def test_convert_writes_what_the_library_makes(tmp_path):
    out = tmp_path / "weights.safetensors"
    args = ("convert", "--tree", DENSE / "source.json", *ENGINE, "--out", out)
    assert "35 leaves" in portax(*args)
    written = safetensors.numpy.load_file(out)
    assert len(written) == 35
    assert written["vllm_model.model.layers.0.self_attn.qkv_proj.weight"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        written["vllm_model.model.embed_tokens.weight"][:200].astype(np.float32),
        filled("qwen3-8b.scan")["base/token_embedder/embedding"],
    )
    before = out.read_bytes()
    assert "exists; nothing was written" in portax(*args, code=2)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_plan_on_paper(capsys):
    run = ["portax", "plan", "--model", "qwen3-235b-a22b"]
    assert cli.main(cli.parse([*run, *ENGINE])) == 0
    assert "layers.{0...93}.mlp.experts.routed_experts.w13_weight" in capsys.readouterr().out
    assert cli.main(cli.parse([*run, "--layout", "huggingface", "--json"])) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["bytes_out"] == pytest.approx(235e9 * 4, rel=0.01)


def test_a_plan_with_problems_lists_them():
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
            "cannot be read as safetensors",
        ),
        (
            ("convert", "--tree", "tree.bin", "--model", "qwen3-8b", *ENGINE, "--out", "x"),
            "a tree is a .safetensors file",
        ),
        (("explode",), "invalid choice: 'explode'"),
        ((), "the following arguments are required: command"),
    ],
)
def test_unusable_commands(args, message, capsys, caplog):
    try:
        code = cli.main(cli.parse(["portax", *map(str, args)]))
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err + caplog.text
