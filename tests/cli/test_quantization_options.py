"""How an engine or a checkpoint is quantised is said on the command line, and never assumed."""

import json

import pytest
from conftest import GOLDEN, command

ENGINE = ("--engine-version", "0.32", "--tp", "4")
DENSE, TILED = GOLDEN / "qwen3-8b.scan/source.json", GOLDEN / "qwen3-8b-fp8.scan/source.json"
PATTERNS = ("--quantization-setting", "BF16_LINEAR_REQUANTIZE_PATTERNS=re:.*")
INT8 = ("--quantization-setting", "BF16_LINEAR_REQUANTIZE_WEIGHT_DTYPE=int8")
O_PROJ = "vllm_model.model.layers.0.self_attn.o_proj.weight"


def planned(capsys, *args):
    assert command("plan", *args, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_an_engine_that_quantises_online(capsys):
    found = planned(capsys, DENSE, *ENGINE, "--quantization", "bf16", "--scale-form", "narrow", *PATTERNS, *INT8)
    assert found["entries"][O_PROJ]["dtype"] == "int8"
    assert found["entries"][f"{O_PROJ}_scale"]["dtype"] == "float32"
    assert "quantised online" in found["definition"]


def test_an_engine_that_loads_a_quantised_checkpoint(capsys):
    found = planned(capsys, TILED, *ENGINE, "--quantization", "fp8-block", "--scale-form", "xla_cpu")
    assert found["entries"][O_PROJ]["dtype"] == "float8_e4m3fn"
    assert "the checkpoint that recipe fp8-block makes" in found["definition"]


def test_a_checkpoint_of_the_hub(capsys):
    found = planned(capsys, TILED, "--layout", "hf", "--quantization", "ct-int8")
    assert found["entries"]["model.layers.0.self_attn.o_proj.weight"]["dtype"] == "int8"
    assert found["entries"]["model.layers.0.self_attn.o_proj.weight_scale"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((*ENGINE, "--quantization", "fp8-block"), "--quantization needs --scale-form"),
        ((*ENGINE, "--scale-form", "wide"), "go with --quantization"),
        ((*ENGINE, *PATTERNS), "go with --quantization"),
        ((*ENGINE, "--quantization", "bf16", "--scale-form", "wide"), "without settings quantises nothing"),
        (
            (*ENGINE, "--quantization", "bf16", "--scale-form", "wide", *PATTERNS, *PATTERNS),
            "BF16_LINEAR_REQUANTIZE_PATTERNS is given twice",
        ),
        (
            (*ENGINE, "--quantization", "bf16", "--scale-form", "wide", "--quantization-setting", "PATTERNS=x"),
            "--quantization-setting PATTERNS=x: is no NAME=VALUE with one of these names: BF16_LINEAR",
        ),
        (
            (*ENGINE, "--quantization", "ct-fp8", "--scale-form", "wide", *PATTERNS),
            "BF16_LINEAR_REQUANTIZE_PATTERNS: not run with checkpoint='ct-fp8'",
        ),
        (("--layout", "hf", "--quantization", "bf16"), "--layout hf takes a recipe: fp8-block"),
        (
            ("--layout", "hf", "--quantization", "ct-fp8", "--scale-form", "wide"),
            "are for engines, not for --layout hf",
        ),
        (("--layout", "canonical", "--quantization", "ct-fp8"), "--quantization is not for --layout canonical"),
    ],
)
def test_options_that_do_not_go_together_are_refused(args, match, capsys):
    assert command("plan", DENSE, *args) == 2
    assert match in " ".join(capsys.readouterr().err.split())
