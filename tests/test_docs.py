"""The README's example runs, and its two commands are the ones that CI runs."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_the_example_runs(capsys):
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(example.strip().splitlines()) <= 10
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102
    assert names["weights"]["vllm_model.model.layers.0.self_attn.qkv_proj.weight"].shape == (64, 128)
    assert "layers.{0...1}.mlp.gate_up_proj.weight" in capsys.readouterr().out


def test_ci_runs_the_two_commands():
    readme, gate = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    assert "pip install -e . && portax demo\npip install -e '.[test]' && pytest\n" in readme
    for command in ("pip install -q -e .\nportax demo\n", "pip install -q -e '.[test]'\npytest\n"):
        assert command in gate
