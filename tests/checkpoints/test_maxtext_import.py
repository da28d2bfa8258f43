"""Imports: what was exported comes back as a trainer's checkpoint, whole or not there."""

import fcntl
import json
import resource
import shutil
import sys

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from conftest import CHECKPOINTS, command

import portax
from portax.checkpoints.orbax_writer import chunk_shape

QWEN3 = CHECKPOINTS / "qwen3-0.6b.scan"
INDEX = "model.safetensors.index.json"


def converter_of(folder):
    config = json.loads((folder / "maxtext_config.json").read_text())
    return portax.converter_for(config, layout=portax.layouts.HuggingFace())


def exported(folder, out):
    hub_config = json.loads((folder / "hf_config.json").read_text())
    checkpoint = portax.open_checkpoint(folder / "orbax")
    portax.export(converter_of(folder), checkpoint, out, hub_config=hub_config, shard_bytes=200_000)
    return out


@pytest.fixture(scope="module")
def converter():
    return converter_of(QWEN3)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return exported(QWEN3, tmp_path_factory.mktemp("import") / "hub")


@pytest.fixture
def out(tmp_path):
    (tmp_path / "to").mkdir()
    return tmp_path / "to" / "out"


@pytest.fixture
def copy(hub, tmp_path):
    return shutil.copytree(hub, tmp_path / "copy")


def main(*args):
    return command("import", *args)


def read(path, root):
    return {name.removeprefix(root): leaf[...] for name, leaf in portax.open_checkpoint(path).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [path for path, leaf in expected.items() if found[path].tobytes() != leaf.tobytes()] == []


def test_a_real_checkpoint_comes_back(converter, hub, out):
    """As Orbax restores it, which is how MaxText does."""
    seen = []
    done = portax.import_checkpoint(converter, portax.open_checkpoint(hub), out, progress=lambda *at: seen.append(at))
    expected = read(QWEN3 / "orbax", "base/")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = ocp.tree.to_flat_dict(checkpointer.restore(out / "items")["params"]["params"], sep="/")
    assert_same(found, expected)
    assert {total for _, total in seen} == {done.nbytes}
    assert sum(count for count, _ in seen) == done.nbytes == sum(leaf.nbytes for leaf in expected.values())
    assert (done.leaves, done.items) == (len(expected), str(out / "items"))
    assert json.loads((out / "_CHECKPOINT_METADATA").read_text())["custom_metadata"] == {"scan_layers": True}
    assert [*out.parent.iterdir()] == [out]


def test_stacks_of_two_scan_axes_come_back_and_are_cut_into_layers(out, tmp_path):
    folder = CHECKPOINTS / "gemma4-31b.scan"
    converter = converter_of(folder)
    portax.import_checkpoint(converter, portax.open_checkpoint(exported(folder, tmp_path / "hub")), out)
    assert_same(read(out, "params/params/"), read(folder / "orbax", "base/"))
    checkpoint = portax.open_checkpoint(out)
    assert checkpoint.form == "Orbax, zarr3 in OCDBT"
    for path, leaf in checkpoint.items():
        depth = (1, 1) if "/local_layers/" in path else (1,) if "/global_layer/" in path else ()
        assert leaf.chunk == leaf.shape[:1] + depth + leaf.shape[1 + len(depth) :]


@pytest.mark.parametrize(
    ("shape", "scan", "most", "chunk"),
    [
        ((8, 4, 6), (1,), 10**6, (8, 1, 6)),
        ((8, 4, 6), (1,), 48, (2, 1, 6)),
        ((8, 2, 5, 6), (1, 2), 96, (4, 1, 1, 6)),
        ((7, 10), (), 40, (1, 10)),
        ((7, 10), (), 39, (1, 5)),
        ((7, 10), (), 1, (1, 1)),
        ((4,), (0,), 10**6, (1,)),
        ((), (), 10**6, ()),
    ],
)
def test_chunks_hold_one_layer_and_no_more_than_they_may(shape, scan, most, chunk):
    assert chunk_shape(shape, np.dtype(np.float32), scan, most) == chunk


def test_unscanned_and_in_another_dtype_by_command(hub, out, capsys):
    args = (hub, "--unscanned", "--dtype", "bfloat16", "--out", out)
    assert main(*args, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "params/params/decoder/layers_{0...3}/mlp/wo/kernel" in shown
    assert "would write   46 leaves, at most 378 kB, to" in shown
    assert main(*args, "--dry-run", "--json") == 0
    leaf = json.loads(capsys.readouterr().out)["params/params/decoder/layers_3/mlp/wo/kernel"]
    assert leaf == {"shape": [96, 64], "dtype": "bfloat16", "bytes": 12288, "chunk": [96, 64]}
    assert not out.exists()
    assert main(*args) == 0
    assert f"load_parameters_path={out / 'items'}" in capsys.readouterr().out
    found, stacks = read(out, "params/params/"), read(QWEN3 / "orbax", "base/")
    expected = stacks["decoder/layers/mlp/wo/kernel"][:, 3].astype(ml_dtypes.bfloat16)
    assert found["decoder/layers_3/mlp/wo/kernel"].tobytes() == expected.tobytes()
    assert json.loads((out / "_CHECKPOINT_METADATA").read_text())["custom_metadata"] == {"scan_layers": False}
    assert main(*args) == 2


@pytest.mark.parametrize(
    ("error", "raised", "code"),
    [(KeyboardInterrupt(), KeyboardInterrupt, 130), (portax.CheckpointError("gone"), portax.CheckpointError, 2)],
)
def test_nothing_is_left_of_an_import_that_stops(converter, hub, out, monkeypatch, error, raised, code):
    def stop(*_):
        raise error

    with pytest.raises(raised):
        portax.import_checkpoint(converter, portax.open_checkpoint(hub), out, progress=stop)
    assert [*out.parent.iterdir()] == []
    monkeypatch.setattr("portax.cli.import_.import_checkpoint", lambda *_, **__: stop(0))
    assert main(hub, "--out", out) == code


def test_a_disk_that_takes_no_more(converter, hub, out):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(portax.CheckpointError, match=r"out: cannot be written \(.*File too large"):
            portax.import_checkpoint(converter, portax.open_checkpoint(hub), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [*out.parent.iterdir()] == []


def test_what_a_killed_import_left_is_cleared_away(converter, hub, out):
    left = out.with_name(".out.unfinished")
    (left / "items.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
    (left / "portax-export.lock").touch()
    with pytest.raises(portax.CheckpointError, match="no _METADATA file"):
        portax.open_checkpoint(left)
    with (left / "portax-export.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(portax.CheckpointError, match="is writing there"):
            portax.import_checkpoint(converter, portax.open_checkpoint(hub), out)
    portax.import_checkpoint(converter, portax.open_checkpoint(hub), out)
    assert [*out.parent.iterdir()] == [out]
    assert sorted(path.name for path in out.iterdir()) == ["_CHECKPOINT_METADATA", "items"]


def test_too_little_space_is_found_before_writing(converter, hub, out, monkeypatch):
    monkeypatch.setattr(
        "portax.checkpoints.atomic_dir.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000)
    )
    with pytest.raises(portax.CheckpointError, match=r"1 kB are free, and 757 kB would be written"):
        portax.import_checkpoint(converter, portax.open_checkpoint(hub), out)
    assert [*out.parent.iterdir()] == []


def test_orbax_is_an_extra(converter, hub, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(portax.CheckpointError, match=r"needs orbax.checkpoint, .* pip install 'portax\[orbax\]'"):
        portax.import_checkpoint(converter, portax.open_checkpoint(hub), out)
    assert [*out.parent.iterdir()] == []


def first_shard(folder):
    return min(folder.glob("*.safetensors"))


def reindexed(change):
    def spoil(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def without_a_tensor(folder):
    tensors = safetensors.numpy.load_file(first_shard(folder))
    del tensors["model.norm.weight"]
    safetensors.numpy.save_file(tensors, first_shard(folder))
    reindexed(lambda files: files.pop("model.norm.weight"))(folder)


def with_another_tensor(folder):
    safetensors.numpy.save_file({"adapter": np.ones(3, np.float32)}, folder / "z.safetensors")
    reindexed(lambda files: files.update(adapter="z.safetensors"))(folder)


def as_pickle(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "options", "code", "message"),
    [
        (without_a_tensor, (), 1, "model.norm.weight: found nothing; expected a tensor of shape [64]"),
        (with_another_tensor, (), 1, "adapter: found a tensor that no leaf needs"),
        (None, ("--model", "qwen3-8b"), 1, "model.layers.35.mlp.down_proj.weight: found nothing"),
        (None, ("--config", CHECKPOINTS / "gemma4-31b.scan" / "hf_config.json"), 1, "found nothing"),
        (lambda f: first_shard(f).unlink(), (), 2, "missing, 1 of "),
        (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-1]), (), 2, "is cut short: "),
        (lambda f: first_shard(f).write_bytes(b"\xff" * 7 + b"\x7f{}"), (), 2, "cannot be read as safetensors"),
        (reindexed(lambda files: files.update(x="../../x.safetensors")), (), 2, "is no such file's name"),
        (reindexed(lambda files: files.update(x="/etc/x.safetensors")), (), 2, "is no such file's name"),
        (as_pickle, (), 2, "pytorch_model.bin is a pickle, which can run code"),
        (lambda f: (f / "config.json").unlink(), (), 2, "no configuration: pass --model or --config; there is no"),
        (lambda f: (f / "config.json").write_text("{"), (), 2, "config.json: Expecting property name"),
        (lambda f: (f / "config.json").write_text('{"model_type": "mamba"}'), (), 2, "'mamba' is not known"),
        (shutil.rmtree, (), 2, "there is no such checkpoint"),
    ],
)
def test_what_cannot_be_imported(copy, out, capsys, spoil, options, code, message):
    if spoil is not None:
        spoil(copy)
    assert main(copy, *options, "--out", out) == code
    assert message in capsys.readouterr().err
    assert [*out.parent.iterdir()] == []


def test_what_is_there_is_not_touched(hub, out, capsys):
    out.write_text("years of work")
    assert main(hub, "--out", out) == 2
    assert "out: exists; nothing was written" in capsys.readouterr().err
    assert out.read_text() == "years of work"


def test_a_trainers_own_checkpoint_is_none_of_the_hubs(out, capsys):
    assert main(QWEN3 / "orbax", "--config", QWEN3 / "hf_config.json", "--out", out) == 2
    assert "a trainer's checkpoint, not the hub's" in capsys.readouterr().err
