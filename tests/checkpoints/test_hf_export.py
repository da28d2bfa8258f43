"""Exports: exact, whole or not there, resumed or begun anew, never mixed."""

import errno
import fcntl
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from conftest import CHECKPOINTS, filled, tree

import portax

QWEN3 = CHECKPOINTS / "qwen3-0.6b.scan"
CONFIG = json.loads((QWEN3 / "maxtext_config.json").read_text())
HUB_CONFIG = json.loads((QWEN3 / "hf_config.json").read_text())
SHARDS = {"shard_bytes": 100_000, "bucket_bytes": 50_000}


@pytest.fixture(scope="module")
def converter():
    return portax.converter_for(CONFIG, layout=portax.layouts.HuggingFace())


@pytest.fixture(scope="module")
def expected(converter):
    return converter.convert({path: leaf[...] for path, leaf in opened().items()})


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def opened(path=QWEN3 / "orbax"):
    return portax.open_checkpoint(path)


def read(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {file: safetensors.numpy.load_file(folder / file) for file in {*index["weight_map"].values()}}
    assert {name: file for file, tensors in files.items() for name in tensors} == index["weight_map"]
    tensors = {name: tensor for found in files.values() for name, tensor in found.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(tensors[name], leaf)


@pytest.mark.parametrize(
    ("name", "stacks", "together"),
    [
        ("qwen3-0.6b.scan", 11, 1),
        ("qwen3-30b-a3b.scan", 12, 3),
        ("gemma4-31b.scan", 27, 1),
        ("qwen3.5-35b-a3b.scan", 67, 2),
    ],
)
def test_few_stacks_are_in_the_scratch_at_a_time(name, stacks, together, out, monkeypatch):
    """Tensors of experts alternate between stacks, or are made of two; else one stack is done with before the next."""
    made, make = [], tempfile.TemporaryFile

    def temporary_file(**options):
        file = make(**options)
        made.append(weakref.ref(file))
        alive.append(sum(ref() is not None for ref in made))
        return file

    alive = []
    monkeypatch.setattr("portax.checkpoints.rechunk.tempfile.TemporaryFile", temporary_file)
    config = json.loads((CHECKPOINTS / name / "maxtext_config.json").read_text())
    converter = portax.converter_for(config, layout=portax.layouts.HuggingFace())
    checkpoint = opened(CHECKPOINTS / name / "orbax")
    portax.export(converter, checkpoint, out)
    assert_same(read(out), converter.convert({path: leaf[...] for path, leaf in checkpoint.items()}))
    assert (len(made), max(alive)) == (stacks, together)
    assert [ref() for ref in made] == [None] * stacks


class StopHere(KeyboardInterrupt):
    pass


def stopping_after(nbytes, error):
    def progress(count, _):
        progress.seen += count
        if progress.seen >= nbytes:
            raise error

    progress.seen = 0
    return progress


def interrupted(converter, out, nbytes=400_000, error=None, **options):
    with pytest.raises((StopHere, portax.CheckpointError)):
        portax.export(
            converter, opened(), out, progress=stopping_after(nbytes, error or StopHere()), **{**SHARDS, **options}
        )
    assert not out.exists()
    return out.with_name(".out.unfinished")


def test_what_is_written_is_what_is_converted(converter, expected, out):
    seen = []
    done = portax.export(
        converter, opened(), out, hub_config=HUB_CONFIG, progress=lambda *at: seen.append(at), **SHARDS
    )
    assert_same(read(out), expected)
    assert sum(count for count, _ in seen) == done.nbytes == converter.plan(opened()).bytes_out
    assert {total for _, total in seen} == {done.nbytes}
    assert (done.tensors, done.resumed) == (len(expected), 0)
    names = sorted(path.name for path in out.iterdir())
    shards = [f"model-{i:05}-of-{done.shards:05}.safetensors" for i in range(1, done.shards + 1)]
    assert names == ["config.json", *shards, "model.safetensors.index.json"]
    assert done.shards > 5
    assert json.loads((out / "config.json").read_text()) == HUB_CONFIG
    with safetensors.safe_open(out / shards[0], framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_every_tensor_is_aligned_and_the_config_says_the_dtype(out):
    config = tree("qwen3.5-35b-a3b.scan").config
    converter = portax.converter_for(config, layout=portax.layouts.HuggingFace(dtype=jnp.bfloat16))
    hub = json.loads((CHECKPOINTS / "qwen3.5-35b-a3b.scan" / "hf_config.json").read_text())
    plan = converter.plan(filled("qwen3.5-35b-a3b.scan"))
    from portax.checkpoints import config_json, safetensors_shards

    for shard in safetensors_shards.make_shards(plan.entries, 10**5):
        sizes = {entry.name: entry.dtype.itemsize for entry in plan.entries}
        assert all(offset % sizes[name] == 0 for name, offset in shard.offsets.items())
    written = config_json.with_dtype({**hub, "torch_dtype": "float32"}, plan)
    assert written["dtype"] == written["text_config"]["dtype"] == "bfloat16"
    assert "torch_dtype" not in written


def test_an_engines_layout_from_memory(out):
    params = filled("qwen3-0.6b.scan")
    layout = portax.layouts.TpuInference(version="0.32", tp=2)
    converter = portax.converter_for(tree("qwen3-0.6b.scan").config, layout=layout)
    portax.export(converter, params, out)
    assert_same(read(out), converter.convert(params))


def test_what_is_there_is_not_touched(converter, out):
    out.mkdir()
    with pytest.raises(portax.CheckpointError, match="out: exists; nothing was written"):
        portax.export(converter, opened(), out)
    assert [*out.parent.iterdir()] == [out]


def test_an_interrupted_export_goes_on(converter, expected, out):
    unfinished = interrupted(converter, out)
    kept = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.safetensors")}
    assert kept
    assert not [*unfinished.glob("*.part")]
    done = portax.export(converter, opened(), out, **SHARDS)
    assert done.resumed == len(kept)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert_same(read(out), expected)


def test_a_file_that_is_not_whole_is_written_again(converter, expected, out):
    unfinished = interrupted(converter, out)
    first, second, *_ = sorted(unfinished.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(b"\0" * second.stat().st_size)
    kept = len([*unfinished.glob("*.safetensors")])
    assert portax.export(converter, opened(), out, **SHARDS).resumed == kept - 2
    assert_same(read(out), expected)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ("shards", {"shard_bytes": 120_000}),
        ("dtype", {}),
        ("source", {}),
        ("manifest", {}),
        ("memory", {}),
    ],
)
def test_another_export_begins_anew(converter, expected, out, tmp_path, change, options):
    unfinished = interrupted(converter, out)
    params = opened()
    if change == "dtype":
        converter = portax.converter_for(CONFIG, layout=portax.layouts.HuggingFace(dtype=jnp.bfloat16))
        expected = {name: leaf.astype(jnp.bfloat16) for name, leaf in expected.items()}
    if change == "source":
        shutil.copytree(QWEN3 / "orbax", tmp_path / "copy")
        params = opened(tmp_path / "copy")
    if change == "manifest":
        (unfinished / "portax-export.json").write_text("{")
    if change == "memory":
        params = {path: leaf[...] for path, leaf in params.items()}
    assert portax.export(converter, params, out, **{**SHARDS, **options}).resumed == 0
    assert_same(read(out), expected)


def test_a_full_disk(converter, expected, out):
    unfinished = interrupted(converter, out, error=OSError(errno.ENOSPC, "No space left on device"))
    assert not (unfinished / "model.safetensors.index.json").exists()
    with pytest.raises(portax.CheckpointError, match=r"out: the disk is full; .* whole are kept in .*out.unfinished"):
        portax.export(converter, opened(), out, progress=stopping_after(1, OSError(errno.ENOSPC, "full")), **SHARDS)
    portax.export(converter, opened(), out, **SHARDS)
    assert_same(read(out), expected)


def test_too_little_space_is_found_before_writing(converter, out, monkeypatch):
    monkeypatch.setattr(
        "portax.checkpoints.atomic_dir.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000)
    )
    with pytest.raises(portax.CheckpointError, match=r"1 kB are free, and 76\d kB would be written"):
        portax.export(converter, opened(), out)
    assert not out.exists()


def test_two_exports_at_once(converter, out):
    unfinished = interrupted(converter, out)
    with (unfinished / "portax-export.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(portax.CheckpointError, match="another export is writing there"):
            portax.export(converter, opened(), out, **SHARDS)
    portax.export(converter, opened(), out, **SHARDS)


def test_a_folder_in_the_way(converter, out):
    mine = out.with_name(".out.unfinished")
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(portax.CheckpointError, match="is in the way, and was not made by an export"):
        portax.export(converter, opened(), out)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_config_of_another_model(converter, out):
    for changed in ({"hidden_size": 128}, {"num_hidden_layers": 3}, {"tie_word_embeddings": False}):
        with pytest.raises(
            portax.ConfigError, match=r"the hub config is of another model: \d+ tensors? differs?, such as"
        ):
            portax.export(converter, opened(), out, hub_config={**HUB_CONFIG, **changed})
    assert not out.exists()


class OfAFork(portax.Qwen3Converter):
    """A fork's own name for a decoder that is on the hub what Qwen3 is; no package registers it."""

    decoder_blocks = ("qwen3_fork",)
    hub_types = ("qwen3",)

    @classmethod
    def from_hub(cls, hub):
        return super().from_hub(hub) | {"decoder_block": "qwen3_fork"}


def test_the_hub_config_is_read_by_the_converters_own_family(out):
    converter = OfAFork({**CONFIG, "decoder_block": "qwen3_fork"}, layout=portax.layouts.HuggingFace())
    portax.export(converter, opened(), out, hub_config=HUB_CONFIG)
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen3"
    with pytest.raises(portax.ConfigError, match=r"of another model than OfAFork converts: its model_type is 'llama'"):
        portax.export(converter, opened(), out.with_name("other"), hub_config={**HUB_CONFIG, "model_type": "llama"})


@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
def test_tensors_that_are_not_quantised_get_no_config_that_says_so(converter, out, name):
    message = rf"says {name} \(fp8\), and the tensors are not quantised: they are in float32, .* Take {name} out"
    with pytest.raises(portax.ConfigError, match=message):
        portax.export(converter, opened(), out, hub_config={**HUB_CONFIG, name: {"quant_method": "fp8"}})
    with pytest.raises(portax.ConfigError, match=f"says {name}, and"):
        portax.export(converter, opened(), out, hub_config={**HUB_CONFIG, "text_config": {name: {"bits": 8}}})
    assert not out.exists()


def test_a_checkpoint_that_breaks_off_leaves_nothing_that_looks_whole(converter, out, tmp_path):
    shutil.copytree(QWEN3 / "orbax", tmp_path / "copy")
    (tmp_path / "copy/base.decoder.layers.mlp.wo.kernel.value/0.0.0").unlink()
    with pytest.raises(portax.CheckpointError, match="mlp/wo/kernel/value: cannot be read"):
        portax.export(converter, opened(tmp_path / "copy"), out, **SHARDS)
    assert not out.exists()
    assert not [*tmp_path.rglob("*index.json")]


def test_a_killed_export_never_leaves_what_loads_and_is_not_whole(converter, expected, out, tmp_path_factory):
    """Killed as it keeps its manifest, its shards, its index, the folder's names, and the name itself."""
    job = {"config": str(QWEN3 / "maxtext_config.json"), "checkpoint": str(QWEN3 / "orbax"), "out": str(out)}
    unfinished = out.with_name(".out.unfinished")
    script = pathlib.Path(__file__).with_name("export_worker.py")
    command = [sys.executable, script, tmp_path_factory.mktemp("programs")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        for die_at, shards, indexed in ((1, 0, False), (3, 1, False), (4, 4, False), (2, 4, True)):
            worker.stdin.write(json.dumps(job | {"die_at": die_at}) + "\n")
            worker.stdin.flush()
            assert int(worker.stdout.readline()) == -signal.SIGKILL
            assert not out.exists()
            assert len([*unfinished.glob("*.safetensors")]) == shards
            assert (unfinished / "model.safetensors.index.json").exists() == indexed
            if not indexed:
                with pytest.raises(portax.CheckpointError):
                    portax.open_checkpoint(unfinished)
        worker.stdin.close()
    assert_same(read(unfinished), expected)
    assert portax.export(converter, opened(), out, shard_bytes=200_000).resumed == 4
    assert_same(read(out), expected)
