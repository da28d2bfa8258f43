"""Vocabularies that are larger than a bucket: read and converted some rows at a time, to the same bytes."""

import json

import numpy as np
import pytest
from conftest import CHECKPOINTS, filled, tree

import portax
from portax.checkpoints import vocab_chunks
from portax.checkpoints.orbax_reader import StoredArray
from portax.trainer.lazy_array import LazyArray

BUCKET = 9_000
HUB = portax.layouts.HuggingFace()


def opened(name, layout=HUB):
    config = json.loads((CHECKPOINTS / name / "maxtext_config.json").read_text())
    return portax.converter_for(config, layout=layout), portax.open_checkpoint(CHECKPOINTS / name / "orbax")


@pytest.fixture
def reads(monkeypatch):
    """Bytes of every part that is read, by leaf."""
    found = {}
    read = StoredArray.__getitem__

    def reading(self, at):
        part = read(self, at)
        found.setdefault(self.name, []).append(part.nbytes)
        return part

    monkeypatch.setattr(StoredArray, "__getitem__", reading)
    return found


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("qwen3-0.6b.scan", ["model.embed_tokens.weight"]),
        ("qwen3-30b-a3b.scan", ["lm_head.weight", "model.embed_tokens.weight"]),  # the one transposed
        ("gemma4-26b.scan", ["model.language_model.embed_tokens.weight"]),  # scaled
    ],
)
def test_pieces_are_the_rows_of_the_whole(reads, name, cut):
    converter, checkpoint = opened(name)
    entries = vocab_chunks.in_pieces(converter, checkpoint, BUCKET)
    assert sorted(entry.name for entry in entries) == cut
    for entry in entries:
        reads.clear()
        found = np.concatenate([piece for _, piece in vocab_chunks.pieces(converter, checkpoint, entry, BUCKET)])
        [source] = entry.sources
        [sizes] = [sizes for leaf, sizes in reads.items() if leaf.startswith(source)]
        assert len(sizes) > 5
        assert max(sizes) <= BUCKET
        [whole] = converter.stream(checkpoint, bucket_bytes=2**30, only={entry.name})
        np.testing.assert_array_equal(found, whole[entry.name])


def test_pieces_of_one_size_share_their_program(compilations):
    converter, checkpoint = opened("qwen3-30b-a3b.scan")
    (entry,) = (e for e in vocab_chunks.in_pieces(converter, checkpoint, BUCKET) if e.name == "lm_head.weight")
    with compilations.measured() as box:
        found = [(first, piece.shape[0]) for first, piece in vocab_chunks.pieces(converter, checkpoint, entry, BUCKET)]
    assert [first for first, _ in found] == [*range(0, entry.shape[0], found[0][1])]
    assert sum(count for _, count in found) == entry.shape[0]
    assert box == [len({count for _, count in found})]


def test_what_is_not_cut():
    converter, checkpoint = opened("qwen3-30b-a3b.scan")
    assert vocab_chunks.in_pieces(converter, checkpoint, 2**30) == ()  # nothing is larger than a bucket
    in_memory = {path: leaf[...] for path, leaf in checkpoint.items()}
    assert vocab_chunks.in_pieces(converter, in_memory, BUCKET) == ()


class Stored(LazyArray):
    """Stands for a leaf on disk."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def __getitem__(self, at):
        return self.values[at]


def test_a_vocabulary_that_the_engine_pads_is_not_cut():
    name = "qwen3-30b-a3b.scan"
    params = {path: Stored(leaf) for path, leaf in filled(name).items()}
    layout = portax.layouts.TpuInference(version="0.32", tp=2)
    converter = portax.converter_for(tree(name).config, layout=layout)
    embedding = next(e for e in converter.plan(params).entries if e.name.endswith("embed_tokens.weight"))
    assert embedding.shape[0] > converter.config.vocab_size
    assert vocab_chunks.in_pieces(converter, params, BUCKET) == ()


def test_beside_leaves_in_memory():
    name = "qwen3-30b-a3b.scan"
    head = "base/decoder/logits_dense/kernel"
    params = {**filled(name), head: Stored(filled(name)[head])}
    converter = portax.converter_for(tree(name).config, layout=HUB)
    (entry,) = vocab_chunks.in_pieces(converter, params, BUCKET)
    found = np.concatenate([piece for _, piece in vocab_chunks.pieces(converter, params, entry, BUCKET)])
    np.testing.assert_array_equal(found, params[head].values.T)
