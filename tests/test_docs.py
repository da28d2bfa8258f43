"""Every example of README and docs runs, every name in them resolves, and the two commands are the ones that CI runs."""

import pathlib
import re
import subprocess
import sys

import pytest

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


DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
EXAMPLES = [path for path in DOCUMENTS if "```python\n" in path.read_text()]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


@pytest.mark.parametrize("document", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_runs(document):
    """What cannot run here (a live engine, a class to fill in) is fenced as `py`, or as nothing."""
    names: dict = {}
    for example in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL):
        exec(compile(example, str(document), "exec"), names)  # noqa: S102


RESOLVE = """
import sys
import portax, portax.extend
names, imports = sys.argv[1].split(), sys.argv[2]
exec(imports)
for name in names:
    found = portax
    try:
        for part in name.split(".")[1:]:
            found = getattr(found, part)
    except portax.MissingPackageError:  # it is there, and needs what is not installed here
        pass
    except AttributeError as error:
        print(f"{name}: {error}")
"""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_dotted_name_resolves_after_the_imports_that_stand_there(document):
    text = document.read_text()
    names = sorted(set(re.findall(r"(?<![\w./-])portax(?:\.[A-Za-z_]\w*)+", text)))
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    imports = "\n".join(re.findall(r"^import portax\S*$", blocks, re.MULTILINE))
    command = [sys.executable, "-c", RESOLVE, " ".join(names), imports]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == ""
