"""Two checkpoints or states, leaf by leaf: every kind of difference, from memory and from disk, converted or not."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import CHECKPOINTS, command, nested

import portax
from portax.analysis.compare import Found, compare
from portax.trainer.lazy_array import LazyArray, pieces

QWEN3 = CHECKPOINTS / "qwen3-0.6b.scan"
CONFIG = json.loads((QWEN3 / "maxtext_config.json").read_text())
LAYER = "model.layers.2.mlp.up_proj.weight"


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def kinds(found):
    return {leaf.name: leaf.differences for leaf in found.leaves if leaf.differences}


@pytest.fixture(scope="module")
def trained():
    return {path: leaf[...] for path, leaf in portax.open_checkpoint(QWEN3 / "orbax").items()}


@pytest.fixture(scope="module")
def converter():
    return portax.converter_for(CONFIG, layout=portax.layouts.HuggingFace())


@pytest.fixture(scope="module")
def exported(trained, converter):
    return {name: np.asarray(leaf) for name, leaf in converter.convert(trained).items()}


def saved(tensors, path):
    safetensors.numpy.save_file(tensors, path)
    return path


def test_every_kind_of_difference():
    a = {"same": ones(3), "gone": ones(1), "shape": ones(2, 3), "kind": ones(4), "cast": ones(4), "value": ones(2, 5)}
    b = {"same": ones(3), "shape": ones(3, 2), "kind": ones(4, dtype=np.int32), "new": ones(2)}
    b |= {"cast": ones(4, dtype=ml_dtypes.bfloat16), "value": ones(2, 5)}
    b["value"][1, 2:4] = 1.5, -2
    found = portax.diff(a, b)
    assert not found.equal
    assert kinds(found) == {
        "gone": ("only in A",),
        "shape": ("shape",),
        "kind": ("dtype",),
        "cast": ("dtype",),
        "value": ("values",),
        "new": ("only in B",),
    }
    compared = {leaf.name: leaf.found for leaf in found.leaves if leaf.found}
    assert compared == {"same": Found(), "cast": Found(), "value": Found(2, 3.0)}
    assert found.verdict == (
        "7 leaves: 1 equal, 1 only in A, 1 differs in shape, 2 differ in dtype, 1 differs in values, 1 only in B"
    )


def test_other_dtypes_are_compared_by_value():
    wide = np.array([1, 1 + 2**-12, 3], np.float32)
    [leaf] = portax.diff({"x": wide}, {"x": wide.astype(ml_dtypes.bfloat16)}).leaves
    assert (leaf.differences, leaf.found) == (("dtype", "values"), Found(1, 2.0**-12))
    [leaf] = portax.diff({"x": np.int8([1, -2])}, {"x": np.int32([1, 300])}).leaves
    assert leaf.found == Found(1, 302.0)
    [leaf] = portax.diff({"x": ones(2, dtype=ml_dtypes.float8_e4m3fn)}, {"x": np.array([1, 1.5], np.float16)}).leaves
    assert leaf.found == Found(1, 0.5)
    assert portax.diff({"x": np.uint64([2**60])}, {"x": np.int64([1])}).leaves[0].found is None
    assert portax.diff({"x": np.uint64([2**60])}, {"x": np.float32([1])}).leaves[0].found is None


def test_nans_infinities_and_zeros():
    nan, inf = np.nan, np.inf
    a, b = np.float32([nan, nan, 1, inf, inf, 0.0, 2]), np.float32([nan, 1, nan, inf, 5, -0.0, 2])
    assert compare(a, b, piece_bytes=8) == Found(4, inf, (2, 2))
    assert compare(np.float32([nan, 1]), np.float32([1, nan]), piece_bytes=99) == Found(2, None, (1, 1))
    assert compare(np.float32([0.0]), np.float32([-0.0]), piece_bytes=99) == Found(1, 0.0)
    payload = np.uint16([0x7FC0, 0x7FC1, 0x7FC0]).view(ml_dtypes.bfloat16)
    assert compare(payload, payload[[0, 0, 0]], piece_bytes=99) == Found(1, None, (3, 3))
    found = portax.diff({"x": a}, {"x": b})
    assert json.loads(found.to_json())["leaves"]["x"]["largest"] == "inf"
    assert "4 (57.14%)       inf           2           2" in str(found)


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint64, np.float64, ml_dtypes.float8_e4m3fn, np.complex64])
def test_any_dtype_that_a_checkpoint_may_have(dtype):
    a = np.array([0, 1, 1, 0], dtype)
    b = np.array([0, 1, 0, 0], dtype)
    assert compare(a, a, piece_bytes=1) == Found()
    assert compare(a, b, piece_bytes=1) == Found(1, 1.0)


def test_scalars_and_empty_leaves():
    assert portax.diff({"x": np.float32(1), "y": ones(0, 3)}, {"x": np.float32(1), "y": ones(0, 3)}).equal
    assert portax.diff({"x": np.float32(1)}, {"x": np.float32(2)}).leaves[0].found == Found(1, 1.0)


class Stored(LazyArray):
    def __init__(self, values, chunk):
        self.values, self.shape, self.dtype, self.chunk = values, values.shape, values.dtype, chunk
        self.read = []

    def __getitem__(self, at):
        self.read.append(self.values[at].nbytes)
        return self.values[at]


def test_a_large_leaf_is_read_in_pieces():
    values = np.arange(7 * 11 * 13, dtype=np.float32).reshape(7, 11, 13)
    other = values.copy()
    other[6, 10, 12] += 1
    a, b = Stored(values, (2, 4, 13)), Stored(other, (1, 11, 5))
    seen = []
    assert compare(a, b, piece_bytes=2000, progress=seen.append) == Found(1, 1.0)
    assert sum(a.read) == sum(b.read) == sum(seen) == values.nbytes
    assert len(a.read) == 4
    assert max(a.read) <= 2 * 11 * 13 * 4


def test_pieces_cover_every_element_once():
    for shape, chunk, most in (((5, 7), (2, 3), 6), ((5, 7), (1, 1), 1), ((4, 1, 6), (4, 1, 6), 1), ((), (), 9)):
        count = np.zeros(shape, int)
        for at in pieces(shape, chunk, most):
            count[at] += 1
        assert (count == 1).all()


def test_trees_of_any_form(trained):
    flat = {f"params/{path}": leaf for path, leaf in trained.items()}
    deep = jax.tree.map(jnp.asarray, nested({path.removeprefix("base/"): leaf for path, leaf in trained.items()}))
    assert portax.diff(flat, deep).equal
    assert portax.diff(portax.open_checkpoint(QWEN3 / "orbax"), deep, piece_bytes=1000).equal
    assert portax.diff(flat, deep).leaves[0].name.startswith("params/base/decoder/")


def test_roots_count_where_names_are_the_same():
    found = portax.diff({"params/x": ones(1)}, {"params/x": ones(1), "stats/y": ones(1)})
    assert kinds(found) == {"stats/y": ("only in B",)}
    assert portax.diff({"params/params/x": ones(1)}, {"base/x": ones(1)}).equal


def test_a_trainers_checkpoint_against_the_hubs(converter, exported, tmp_path):
    hub = {name: leaf.copy() for name, leaf in exported.items()}
    hub |= {"lm_head.weight": hub["model.embed_tokens.weight"].copy(), "visual.patch_embed.weight": ones(2)}
    mine, theirs = portax.open_checkpoint(QWEN3 / "orbax"), saved(hub, tmp_path / "model.safetensors")
    for sides in (mine, portax.open_checkpoint(theirs)), (portax.open_checkpoint(theirs), mine):
        found = portax.diff(*sides, converter=converter)
        assert found.equal
        assert len(found.leaves) == 46
        assert all(leaf.found for leaf in found.leaves)
        assert found.beside == {
            "lm_head.weight": "repeats model.embed_tokens.weight",
            "visual.patch_embed.weight": "no weight of the language model",
        }
    hub["lm_head.weight"][3, 4] += 1
    hub[LAYER][0, 0] += 0.5
    del hub["model.norm.weight"]
    found = portax.diff(mine, hub, converter=converter)
    assert kinds(found) == {LAYER: ("values",), "lm_head.weight": ("only in B",), "model.norm.weight": ("only in A",)}
    assert f" {LAYER} " in str(found)
    assert "beside   visual.patch_embed.weight: no weight of the language model" in str(found)
    assert "model.layers.{0,1,3}.mlp.up_proj.weight" in str(found)


def test_scanned_against_unscanned_goes_by_way_of_the_hub(converter, trained, exported):
    unscanned = converter.restore(exported, scanned=False)
    unscanned["decoder/layers_3/mlp/wo/kernel"][5, 7] += 2
    found = portax.diff(trained, unscanned, converter=converter)
    assert kinds(found) == {"model.layers.3.mlp.down_proj.weight": ("values",)}
    assert not portax.diff(trained, unscanned).equal


def test_shapes_are_enough_without_values(trained):
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in trained.items()}
    assert portax.diff(trained, shapes, values=False).equal
    with pytest.raises(portax.CheckpointError, match="decoder_norm/scale: a shape has no values to compare"):
        portax.diff(trained, shapes)
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(portax.CheckpointError, match="x: a deleted array has no values"):
        portax.diff({"x": ones(3)}, {"x": gone})


def test_names_that_only_dots_and_slashes_tell_apart_are_refused():
    with pytest.raises(portax.PlanError, match="a/b: found two leaves of this path"):
        portax.diff({"a/b": ones(1), "a.b": ones(2)}, {"a/b": ones(1)})


def main(*args):
    return command("diff", *args)


def test_the_command(tmp_path, capsys, exported):
    hub = saved(exported, tmp_path / "model.safetensors")
    config = ("--config", QWEN3 / "maxtext_config.json")
    assert main(QWEN3 / "orbax", hub, *config) == 0
    assert "verdict  46 leaves: 46 equal" in capsys.readouterr().out
    other = saved(exported | {LAYER: exported[LAYER] + 1}, tmp_path / "other.safetensors")
    assert main(hub, other, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert [name for name, leaf in found["leaves"].items() if leaf["differences"]] == [LAYER]
    assert found["leaves"][LAYER]["different"] == exported[LAYER].size
    assert main(hub, other, "--dry-run") == 0
    assert "46 leaves: 46 equal in shape and dtype; values were not compared" in capsys.readouterr().out
    assert main(QWEN3 / "orbax", hub) == 1
    assert "no leaf is on both sides" in capsys.readouterr().out
    bad = ((hub, tmp_path / "none"), (hub, other, "--dtype", "bfloat16"), (QWEN3 / "orbax", hub, "--model", "qwen3-8b"))
    for args, text in zip(bad, ("there is no such checkpoint", "add --model", "cannot be compared"), strict=True):
        assert main(*args) == 2
        assert text in capsys.readouterr().err


def test_an_interrupted_command(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    path = saved({"x": ones(1)}, tmp_path / "a.safetensors")
    monkeypatch.setattr("portax.cli.diff.diff", stop)
    assert main(path, path) == 130


def test_a_file_cut_short_is_no_difference(tmp_path, capsys):
    path = saved({"x": ones(100)}, tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    whole = saved({"x": ones(100)}, tmp_path / "b.safetensors")
    assert main(path, whole) == 2
    assert "a.safetensors: is cut short: " in capsys.readouterr().err
