"""The examples in docstrings run, everything public has one, and no docstring opens with a riddle."""

import ast
import doctest
import importlib
import inspect
import io
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh
from safetensors.numpy import save_file

import portax
import portax.extend

SRC = pathlib.Path(portax.__file__).parent
NEEDS_MORE = ("integrations", "validation")  # an engine, or transformers: their examples run in .ci/live
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def docstrings(path: pathlib.Path) -> dict[str, str]:
    """Docstrings by name and line of what they are of."""
    nodes = ast.walk(ast.parse(path.read_text()))
    documented = [node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    found = {
        f"{getattr(node, 'name', '')}:{getattr(node, 'lineno', 1)}": ast.get_docstring(node) for node in documented
    }
    return {name: text for name, text in found.items() if text}


def examples(path: pathlib.Path) -> dict[str, str]:
    return {name: text for name, text in docstrings(path).items() if ">>>" in text}


MODULES = [
    path.relative_to(SRC)
    for path in sorted(SRC.rglob("*.py"))
    if path.relative_to(SRC).parts[0] not in NEEDS_MORE and examples(path)
]


def public() -> dict[str, object]:
    """Classes and functions of `portax` and `portax.extend`, and of the modules that are among their names."""
    found = {}
    for room in (portax, portax.extend):
        for name in room.__all__:
            thing = getattr(room, name)
            if isinstance(thing, types.ModuleType):
                names = getattr(thing, "__all__", [member for member in vars(thing) if member[0] != "_"])
                members = {f"{name}.{member}": getattr(thing, member) for member in names}
                found |= {at: member for at, member in members.items() if _is_of(member, thing)}
            else:
                found[name] = thing
    return {name: thing for name, thing in found.items() if inspect.isclass(thing) or inspect.isroutine(thing)}


def _is_of(member: object, module: types.ModuleType) -> bool:
    return getattr(member, "__module__", "").startswith(module.__name__)


@pytest.fixture(scope="module")
def names():
    """The names that examples may use without a word: those of the README's example, `mesh`, and those of `portax.extend`."""
    config = {"decoder_block": "qwen3", "num_decoder_layers": 2, "emb_dim": 64, "num_query_heads": 4}
    config |= {"num_kv_heads": 2, "head_dim": 16, "mlp_dim": 128, "vocab_size": 256}
    layout = portax.layouts.TpuInference(version="0.32", tp=2)
    converter = portax.converter_for(config, layout=layout)
    params = {path: np.ones(leaf.shape, leaf.dtype) for path, leaf in converter.expected_tree().items()}
    known = {name: getattr(portax.extend, name) for name in portax.extend.__all__}
    known |= {"portax": portax, "jax": jax, "jnp": jnp, "np": np, "mesh": mesh(model=2)}
    return known | {"config": config, "layout": layout, "converter": converter, "params": params}


@pytest.mark.parametrize("name", sorted(public()))
def test_everything_public_has_an_example(name):
    text = public()[name].__doc__ or ""
    assert "Example:\n" in text
    assert ">>> " in text


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_the_examples_of_a_module_run(path, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("checkpoint").mkdir()
    save_file(names["params"], "checkpoint/model.safetensors")
    module = importlib.import_module(".".join(("portax", *path.with_suffix("").parts)).removesuffix(".__init__"))
    for name, text in examples(SRC / path).items():
        example = doctest.DocTestParser().get_doctest(text, {**vars(module), **names}, name, str(path), 0)
        out = io.StringIO()
        doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(example, out=out.write)
        assert out.getvalue() == ""


def test_docstrings_say_first_what_a_thing_is_or_does():
    opening = re.compile(r"(?m)(\A|^ +\**\w+: )(What|How|Where|Whether|Which|When|Why)\b")
    found = {path.relative_to(SRC): docstrings(path) for path in SRC.rglob("*.py")}
    assert not [
        f"{path}:{name}" for path, texts in found.items() for name, text in texts.items() if opening.search(text)
    ]
