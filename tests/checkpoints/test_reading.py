"""Checkpoints on disk: what is read, how often, and what is said of those that cannot be."""

import collections
import errno
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from conftest import CHECKPOINTS, filled, mesh, nested, tree
from jax.sharding import NamedSharding, PartitionSpec

import portax
from portax.checkpoints.orbax_reader import StoredArray
from portax.checkpoints.rechunk import Scratch
from portax.trainer.lazy_array import LazyArray

QWEN3 = CHECKPOINTS / "qwen3-0.6b.scan"
CONFIG = json.loads((QWEN3 / "maxtext_config.json").read_text())
HUB = portax.layouts.HuggingFace()


def save(path, params, **options):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(params))
    return path


def copied(tmp_path):
    shutil.copytree(QWEN3 / "orbax", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture(scope="module")
def restored():
    """What Orbax itself restores."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = ocp.tree.to_flat_dict(checkpointer.restore(QWEN3 / "orbax"), sep="/")
    return {path.removesuffix("/value"): np.asarray(leaf) for path, leaf in found.items()}


def test_a_real_checkpoint_is_planned_from_its_metadata_and_converts_exactly(restored, monkeypatch):
    checkpoint = portax.open_checkpoint(QWEN3 / "orbax")
    converter = portax.converter_for(CONFIG, layout=HUB)
    with monkeypatch.context() as patch:
        patch.setattr(StoredArray, "__getitem__", None)
        plan = converter.plan(checkpoint)
    assert plan.bytes_in == checkpoint.nbytes == sum(leaf.nbytes for leaf in restored.values())
    assert {path: leaf.shape for path, leaf in checkpoint.items()} == {p: x.shape for p, x in restored.items()}
    expected = converter.convert(restored)
    streamed = {}
    for bucket in converter.stream(checkpoint, bucket_bytes=200_000):
        streamed |= bucket
    assert streamed.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(streamed[name], leaf)


@pytest.mark.parametrize("ocdbt", [True, False], ids=["ocdbt", "files"])
@pytest.mark.parametrize("zarr3", [True, False], ids=["zarr3", "zarr"])
def test_every_way_of_storing(tmp_path, ocdbt, zarr3):
    rng = np.random.default_rng(0)
    wi = rng.random((16, 3, 8), np.float32)
    spread = jax.device_put(wi, NamedSharding(mesh(fsdp=4, tp=2), PartitionSpec("fsdp", None, "tp")))
    low = jax.numpy.asarray(wi[:, 0], jax.numpy.bfloat16)
    path = save(tmp_path / "c", {"params": {"a": {"wi": spread}, "b": low}}, use_ocdbt=ocdbt, use_zarr3=zarr3)
    checkpoint = portax.open_checkpoint(path)
    assert checkpoint.form == f"Orbax, {'zarr3' if zarr3 else 'zarr'}{' in OCDBT' if ocdbt else ''}"
    assert checkpoint["params/a/wi"].chunk == (4, 3, 4)
    np.testing.assert_array_equal(checkpoint["params/a/wi"][...], wi)
    for layer in range(3):
        np.testing.assert_array_equal(checkpoint["params/a/wi"][:, layer], wi[:, layer])
    np.testing.assert_array_equal(checkpoint["params/a/wi"][2:6, 1, 4:], wi[2:6, 1, 4:])
    np.testing.assert_array_equal(checkpoint["params/b"][...], np.asarray(low))


@pytest.mark.parametrize(
    ("wrap", "root", "others"),
    [
        (lambda p: p, "", 0),
        (lambda p: {"base": p}, "", 0),
        (lambda p: {"params": {"params": p}}, "", 0),
        (
            lambda p: {"params": {"params": p}, "opt_state": {"mu": {"params": p}, "count": np.int32(3)}, "step": 7},
            "",
            15,
        ),
        (lambda p: {"model": {**p, "rngs": {"count": np.uint32(1)}}, "optimizer": {"mu": p}}, "model/", 14),
    ],
    ids=["bare", "base", "params", "train-state", "nnx-train-state"],
)
@pytest.mark.parametrize("form", ["qwen3-0.6b.scan", "qwen3-0.6b.unscan"])
def test_every_root_with_and_without_an_optimizer(tmp_path, wrap, root, others, form):
    params = {path.removeprefix("base/"): leaf for path, leaf in filled(form).items()}
    checkpoint = portax.open_checkpoint(save(tmp_path / "c", wrap(nested(params))))
    assert checkpoint.root == root
    assert len(checkpoint.others) == (others and others - 13 + len(params))
    plan = portax.converter_for(tree(form).config, layout=HUB).plan(checkpoint)
    assert plan.bytes_in == sum(leaf.nbytes for leaf in params.values())
    found = next(leaf for path, leaf in checkpoint.items() if path.endswith("token_embedder/embedding"))
    np.testing.assert_array_equal(found[...], params["token_embedder/embedding"])


def test_stacks_on_the_first_axis(tmp_path):
    params = {
        path: np.moveaxis(leaf, 1, 0) if "/layers/" in path else leaf
        for path, leaf in filled("qwen3-0.6b.scan").items()
    }
    checkpoint = portax.open_checkpoint(save(tmp_path / "c", nested(params)))
    config = {**tree("qwen3-0.6b.scan").config, "param_scan_axis": 0}
    converter = portax.converter_for(config, layout=HUB)
    expected = converter.convert(params)
    for name, leaf in converter.convert(checkpoint).items():
        np.testing.assert_array_equal(leaf, expected[name])


def test_a_step_and_a_run_are_found(tmp_path):
    params = nested({"base/a": np.ones(3, np.float32)})
    with ocp.CheckpointManager(tmp_path / "run", item_names=("items",)) as manager:
        manager.save(3, args=ocp.args.Composite(items=ocp.args.PyTreeSave(params)))
        manager.wait_until_finished()
        one = {portax.open_checkpoint(tmp_path / "run" / rest).path for rest in ("", "3", "3/items")}
        assert one == {str(tmp_path / "run/3/items")}
        manager.save(4, args=ocp.args.Composite(items=ocp.args.PyTreeSave(params)))
        manager.wait_until_finished()
    with pytest.raises(portax.CheckpointError, match=r"holds several steps; name one: .*run/3, .*run/4"):
        portax.open_checkpoint(tmp_path / "run")


class Pieces:
    """An array that is stored in pieces, and counts how many of its elements are decoded."""

    def __init__(self, values, chunk):
        self.values, self.shape, self.chunk, self.decoded = values, values.shape, chunk, 0

    def __getitem__(self, at):
        bounds = [where.indices(size)[:2] for where, size in zip(at, self.shape, strict=True)]
        touched = [-(-b // c) * c - a // c * c for (a, b), c in zip(bounds, self.chunk, strict=True)]
        self.decoded += int(np.prod(touched))
        self.found = self.values[at]
        return self

    def read(self):
        found = self.found

        class Done:
            def result(self):
                return found

        return Done()


@pytest.mark.parametrize("slab_bytes", [1, 300, 10**6])
@pytest.mark.parametrize(
    ("shape", "chunk", "axes"),
    [
        ((16, 3, 8), (16, 3, 8), (1,)),
        ((16, 3, 8), (4, 3, 8), (1,)),
        ((16, 3, 8), (16, 3, 2), (1,)),
        ((6, 3, 8, 4), (2, 3, 4, 4), (1,)),
        ((6, 3, 8, 4), (6, 3, 3, 4), (1,)),
        ((6, 2, 3, 8), (3, 2, 3, 8), (1, 2)),
        ((3, 16, 8), (3, 4, 8), (0,)),
        ((5, 3), (5, 3), (1,)),
        ((3,), (3,), (0,)),
    ],
)
def test_a_stack_is_decoded_once_whatever_its_chunks(shape, chunk, axes, slab_bytes, monkeypatch, tmp_path):
    monkeypatch.setattr("portax.checkpoints.rechunk._SLAB_BYTES", slab_bytes)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    store, scratch = Pieces(values, chunk), Scratch(tmp_path)
    scratch.unstack(Pieces(values, chunk), chunk, values.dtype, axes)  # something in front of it
    unstacked = scratch.unstack(store, chunk, values.dtype, axes)
    assert store.decoded <= np.prod([-(-n // c) * c for n, c in zip(shape, chunk, strict=True)])
    first = np.moveaxis(values, axes, range(len(axes)))
    for position in np.ndindex(unstacked.scan):
        np.testing.assert_array_equal(unstacked.read(position), first[position])
        if first[position].ndim:
            np.testing.assert_array_equal(unstacked.read(position, (slice(1, 2),)), first[position][1:2])
    assert [*tmp_path.iterdir()] == []


MLP = (("gate", "wi_0"), ("down", "wo"))  # the tensor between them is not asked for


class Watched(LazyArray):
    """A lazy array that notes what is read of it."""

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.reads = values, values.shape, values.dtype, []

    def __getitem__(self, at):
        self.reads.append(at)
        return self.values[at]


def test_a_layer_is_read_once_however_small_the_buckets():
    params = {path: Watched(leaf) for path, leaf in filled("qwen3-30b-a3b.scan").items()}
    converter = portax.converter_for(tree("qwen3-30b-a3b.scan").config, layout=portax.layouts.Canonical())
    buckets = [*converter.stream(params, bucket_bytes=1)]
    assert len(buckets) == len(converter.plan(params).entries)
    for path, leaf in params.items():
        at = [(slice(None), layer) for layer in range(4)] if "/layers/" in path else [...]
        assert leaf.reads == at, path


@pytest.mark.parametrize("bucket_bytes", [1, 2**30])
def test_only_what_is_asked_for_is_read(bucket_bytes):
    params = {path: Watched(leaf) for path, leaf in filled("qwen3-0.6b.scan").items()}
    converter = portax.converter_for(tree("qwen3-0.6b.scan").config, layout=HUB)
    paths = {f"model.layers.2.mlp.{of}_proj.weight": f"base/decoder/layers/mlp/{leaf}/kernel" for of, leaf in MLP}
    found = dict(collections.ChainMap(*converter.stream(params, bucket_bytes=bucket_bytes, only={*paths})))
    assert {*found} == {*paths}
    for name, path in paths.items():
        np.testing.assert_array_equal(found[name], params[path].values[:, 2].T)
    assert {path: len(leaf.reads) for path, leaf in params.items() if leaf.reads} == dict.fromkeys(paths.values(), 1)


def test_each_device_reads_its_share_of_a_layer():
    params = {path: Watched(leaf) for path, leaf in filled("qwen3-8b.scan").items()}
    layout = portax.layouts.TpuInference(version="0.32", tp=2)
    converter = portax.converter_for(tree("qwen3-8b.scan").config, layout=layout, mesh=mesh(model=2))
    expected = converter.convert({path: leaf.values for path, leaf in params.items()})
    weights = converter.convert(params)
    for name, leaf in expected.items():
        assert weights[name].sharding == leaf.sharding
        np.testing.assert_array_equal(weights[name], leaf)
    kernel = params["base/decoder/layers/mlp/wi_0/kernel"]
    assert len(kernel.reads) == 8
    assert {at[1] for at in kernel.reads} == {0, 1, 2, 3}
    assert {kernel.values[at].size for at in kernel.reads} == {kernel.values[:, 0].size // 2}


def test_a_sync_from_a_checkpoint():
    layout = portax.layouts.TpuInference(version="0.32", tp=2)
    converter = portax.converter_for(CONFIG, layout=layout, mesh=mesh(model=2))
    checkpoint = portax.open_checkpoint(QWEN3 / "orbax")
    expected = converter.convert({path: leaf[...] for path, leaf in checkpoint.items()})
    engine = {name: jax.device_put(jax.numpy.zeros_like(leaf), leaf.sharding) for name, leaf in expected.items()}
    portax.WeightSync(converter, engine)(checkpoint)
    for name, leaf in expected.items():
        np.testing.assert_array_equal(engine[name], leaf)


def test_one_sync_from_a_checkpoint_from_the_host_and_from_devices_in_turn():
    layout = portax.layouts.TpuInference(version="0.32", tp=2)
    converter = portax.converter_for(CONFIG, layout=layout, mesh=mesh(model=2))
    checkpoint = portax.open_checkpoint(QWEN3 / "orbax")
    on_host = {path: leaf[...] for path, leaf in checkpoint.items()}
    expected = converter.convert(on_host)
    engine = {name: jax.device_put(jax.numpy.zeros_like(leaf), leaf.sharding) for name, leaf in expected.items()}
    sync = portax.WeightSync(converter, engine)
    for source in (checkpoint, on_host, jax.tree.map(jax.numpy.asarray, on_host), on_host, checkpoint):
        for name, leaf in engine.items():
            engine[name] = jax.device_put(jax.numpy.zeros_like(leaf), leaf.sharding)
        sync(source)
        for name, leaf in expected.items():
            np.testing.assert_array_equal(engine[name], leaf)


def damaged(name):
    def spoil(path):
        (path / name).write_bytes((path / name).read_bytes()[:40])

    return spoil


KERNEL = "base.decoder.layers.mlp.wo.kernel.value"


@pytest.mark.parametrize("spoil", [damaged(f"{KERNEL}/0.0.0"), lambda path: (path / KERNEL / "0.0.0").unlink()])
def test_files_that_are_cut_short_or_gone_are_named(tmp_path, spoil):
    path = copied(tmp_path)
    spoil(path)
    converter = portax.converter_for(CONFIG, layout=HUB)
    checkpoint = portax.open_checkpoint(path)
    converter.plan(checkpoint)
    with pytest.raises(portax.CheckpointError, match=r"mlp/wo/kernel/value: cannot be read .* gone or cut short"):
        converter.convert(checkpoint)


@pytest.mark.parametrize(
    "spoil", [damaged("_METADATA"), damaged(f"{KERNEL}/.zarray"), lambda p: shutil.rmtree(p / KERNEL)]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's own coroutines
def test_broken_metadata_is_named(tmp_path, spoil):
    path = copied(tmp_path)
    spoil(path)
    with pytest.raises(
        portax.CheckpointError, match=r"Orbax cannot read its metadata .* not written or copied to its end"
    ):
        portax.open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "gone: there is no such checkpoint"),
        ("empty", "holds no _METADATA file, so no Orbax checkpoint"),
        ("3.orbax-checkpoint-tmp-1", "Orbax has not finished writing this checkpoint"),
        ("file.txt", "is neither an Orbax checkpoint's folder nor a .safetensors file"),
        ("weights.pt", r"weights.pt is a pickle, which can run code .* refused"),
        ("torch", r"pytorch_model.bin is a pickle, which can run code .* refused"),
        ("two", r"holds 2 .safetensors files and no model.safetensors.index.json"),
        ("one", r"holds one of 2 .safetensors files and no model.safetensors.index.json"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, name, message):
    for folder in ("empty", "3.orbax-checkpoint-tmp-1", "torch", "two", "one"):
        (tmp_path / folder).mkdir()
    shards = ("two/a.safetensors", "two/b.safetensors", "one/model-00001-of-00002.safetensors")
    for file in ("file.txt", "weights.pt", "torch/pytorch_model.bin", *shards):
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(portax.CheckpointError, match=message):
        portax.open_checkpoint(tmp_path / name)


def test_a_checkpoint_without_parameters(tmp_path):
    with pytest.raises(portax.CheckpointError, match="holds no parameters, only rngs/count"):
        portax.open_checkpoint(save(tmp_path / "c", {"rngs": {"count": np.ones(3, np.uint32)}}))


def test_orbax_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(portax.CheckpointError, match=r"needs orbax.checkpoint, .* pip install 'portax\[orbax\]'"):
        portax.open_checkpoint(QWEN3 / "orbax")


def test_the_wrong_model_for_a_checkpoint():
    config = json.loads((CHECKPOINTS / "qwen3-30b-a3b.scan" / "maxtext_config.json").read_text())
    with pytest.raises(portax.PlanError, match="decoder/layers/moe_block/wi_0: found nothing"):
        portax.converter_for(config, layout=HUB).plan(portax.open_checkpoint(QWEN3 / "orbax"))


def test_no_space_for_the_scratch(monkeypatch, tmp_path):
    monkeypatch.setattr("portax.checkpoints.rechunk.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    leaf = portax.open_checkpoint(QWEN3 / "orbax", scratch=tmp_path)["base/decoder/layers/mlp/wo/kernel"]
    with pytest.raises(portax.CheckpointError, match=r"0 B of temporary space is left, and it takes 98.3 kB more"):
        leaf[:, 0]


def test_a_disk_that_fills_up_under_the_scratch(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    leaf = portax.open_checkpoint(QWEN3 / "orbax", scratch=tmp_path)["base/decoder/layers/mlp/wo/kernel"]
    with monkeypatch.context() as patch:
        patch.setattr("portax.checkpoints.rechunk.write_at", full)
        with pytest.raises(portax.CheckpointError, match=r"no temporary space is left, .*another folder with scratch="):
            leaf[:, 0]
    assert leaf[:, 0].shape == (leaf.shape[0], *leaf.shape[2:])


@pytest.fixture
def sharded(tmp_path) -> pathlib.Path:
    params = filled("qwen3-0.6b.scan")
    files = {"a.safetensors": {}, "b.safetensors": {}}
    for i, (path, leaf) in enumerate(params.items()):
        files[sorted(files)[i % 2]][path] = leaf
    for file, tensors in files.items():
        safetensors.numpy.save_file(tensors, tmp_path / file)
    weight_map = {path: file for file, tensors in files.items() for path in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_safetensors_are_read_leaf_by_leaf(sharded):
    checkpoint = portax.open_checkpoint(sharded)
    assert checkpoint.form == "safetensors, 2 files"
    for path, leaf in filled("qwen3-0.6b.scan").items():
        np.testing.assert_array_equal(checkpoint[path][...], leaf)
        if leaf.ndim > 1:
            np.testing.assert_array_equal(checkpoint[path][:, 1], leaf[:, 1])


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/secret.safetensors", "..", "", "a\\b.safetensors", "x.pt"]
)
def test_an_index_that_leads_out_of_its_folder(sharded, file):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(portax.CheckpointError, match=r"is no such file's name: an index names .* of its own folder"):
        portax.open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"weight_map": 3}', "holds no weight_map"),
        (b'{"weight_map": {"w": 3}}', "holds no weight_map"),
        (b"[]", "holds no weight_map"),
        (b"{", "cannot be read as JSON"),
        (b'{"weight_map": {"w": "a.safetensors"}}', "the index and the file differ over base/"),
        (b'{"weight_map": {"w": "gone.safetensors"}}', "gone.safetensors: missing, 1 of 1 files that"),
    ],
)
def test_an_index_that_is_wrong(sharded, content, message):
    (sharded / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(portax.CheckpointError, match=message):
        portax.open_checkpoint(sharded)


@pytest.mark.parametrize(
    "content",
    [
        (10**15).to_bytes(8, "little") + b"{}",  # a header of a petabyte
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_a_safetensors_header_that_cannot_be(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(portax.CheckpointError, match="cannot be read as safetensors"):
        portax.open_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "0 bytes are there, of at least 8"),
        ((2).to_bytes(8, "little") + b"{", "9 bytes are there, of at least 10"),
        (
            (60).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}   ',
            "68 bytes are there, of 464",
        ),
    ],
)
def test_a_file_that_was_not_downloaded_to_its_end(tmp_path, content, found):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(
        portax.CheckpointError, match=rf"x\.safetensors: is cut short: {found}\. Likely cause: it was not"
    ):
        portax.open_checkpoint(tmp_path / "x.safetensors")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 3945441440\n"


@pytest.mark.parametrize("file", ["a.safetensors", "model.safetensors.index.json"])
def test_a_pointer_of_git_lfs_is_not_the_file(sharded, file):
    (sharded / file).write_bytes(POINTER)
    with pytest.raises(portax.CheckpointError, match=rf"{file}: is a Git LFS pointer, .* git lfs pull"):
        portax.open_checkpoint(sharded)


def test_shards_that_are_missing_are_named(sharded):
    names = [f"model-{i:05}-of-00007.safetensors" for i in range(1, 8)]
    index = {f"w{i}": name for i, name in enumerate(names)} | {"a": "a.safetensors"}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    message = rf"{names[0]}, .*{names[4]} \.\.\.: missing, 7 of 8 files .* not downloaded to its end"
    with pytest.raises(portax.CheckpointError, match=message):
        portax.open_checkpoint(sharded)


def test_an_index_of_nothing(sharded):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(portax.CheckpointError, match=r"index\.json: names no tensors"):
        portax.open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("url", "package", "message"),
    [
        ("gs://run/1000/items", "gcsfs", r"gs:// needs a package .*: pip install 'portax\[gcs\]'"),
        ("s3://run/1000/items", "s3fs", r"s3:// needs a package .*: pip install 'portax\[s3\]'"),
        ("ftp://run/1000/items", "gcsfs", r"ftp:// is no place that Orbax reads from"),
    ],
)
def test_a_cloud_without_its_package(monkeypatch, url, package, message):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(portax.CheckpointError, match=message):
        portax.open_checkpoint(url)
