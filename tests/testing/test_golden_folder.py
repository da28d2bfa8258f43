"""Goldens below a folder, verified together."""

import json
import shutil

import pytest
from conftest import GOLDEN, command

from portax.testing.golden import Golden, Tree

DENSE = "qwen3-8b.scan"
TP2 = "tpu-inference-0.32.0.tp2.json"


@pytest.fixture
def folder(tmp_path):
    """Two goldens of one tree, and files that are none."""
    (tmp_path / DENSE).mkdir()
    for name in ("source.json", "config.json", "hf.json", TP2):
        shutil.copy(GOLDEN / DENSE / name, tmp_path / DENSE / name)
    return tmp_path


def verified(capsys, folder, *args, code):
    assert command("verify", "--goldens", folder, *args, "--json") == code
    return json.loads(capsys.readouterr().out)


def changed(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_every_golden_below_a_folder_is_held_against_both_dtypes_of_its_tree(folder, capsys):
    assert command("verify", "--goldens", folder, "--source-dtype", "float32", "--source-dtype", "bfloat16") == 0
    out = capsys.readouterr().out
    assert "4 goldens: 4 exact" in out
    assert [out.count(f"{DENSE}/{name}") for name in ("hf.json", TP2, "config.json", "source.json")] == [2, 2, 0, 0]
    assert "47 leaves, all exact" in out


def test_a_leaf_that_differs_is_named(folder, capsys):
    content = json.loads((folder / DENSE / TP2).read_text())
    name = "vllm_model.model.norm.weight"
    content["leaves"][name]["sha256"] = "0" * 16
    (folder / DENSE / TP2).write_text(json.dumps(content))
    changed(folder / DENSE / "hf.json", tensors=None)
    found = verified(capsys, folder, code=1)
    assert not found["exact"]
    hub, engine = found["goldens"]
    assert "is not a golden file" in hub["refused"]
    assert (engine["refused"], engine["leaves"], [*engine["different"]]) == (None, 35, [name])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda f: changed(f / TP2, implementation="Unheard"), "no layout reproduces an engine that runs Unheard"),
        (lambda f: changed(f / TP2, setting="int3"), "no layout reproduces weights quantised as int3"),
        (lambda f: changed(f / TP2, values="unheard"), "values 'unheard' are not known; known: probe, spread, edges"),
        (lambda f: (f / TP2).write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "source.json").unlink(), "there is no source.json beside it"),
        (lambda f: changed(f / "source.json", config={"decoder_block": "mamba"}), "num_decoder_layers: missing"),
    ],
)
def test_what_is_not_supported_is_refused_and_says_why(folder, capsys, spoil, why):
    (folder / DENSE / "hf.json").unlink()
    spoil(folder / DENSE)
    [row] = verified(capsys, folder, code=2)["goldens"]
    assert why in row["refused"]
    assert not row["exact"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--goldens", "gone"), "gone: there is no such folder"),
        (("--goldens", GOLDEN / DENSE, "--model", "qwen3-8b"), "name no weights and no configuration"),
        ((GOLDEN / DENSE / "source.json", "--golden", "x", "--source-dtype", "float32"), "goes with --goldens"),
        (("--goldens", GOLDEN / DENSE, "--golden", "x"), "not allowed with argument"),
        ((), "one of the arguments --golden --goldens is required"),
    ],
)
def test_unusable_commands(args, message, capsys):
    assert command("verify", *args) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_goldens(tmp_path, capsys):
    assert command("verify", "--goldens", tmp_path) == 2
    assert "there is no golden below it" in capsys.readouterr().err


def test_other_packages_read_a_goldens_layout_and_fill_its_tree():
    golden, tree = Golden.load(GOLDEN / DENSE / TP2), Tree.load(GOLDEN / DENSE / "source.json")
    assert golden.layout.tp == 2
    narrow, wide = tree.fill(dtype="bfloat16"), tree.fill()
    assert all((narrow[path].astype(leaf.dtype) == leaf).all() for path, leaf in wide.items())
