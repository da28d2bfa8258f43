"""A sync on devices that are not here: what it would cost, from compiled programs."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, command, mesh, tree
from jax.sharding import PartitionSpec as P

import portax
from portax.analysis import cost_model
from portax.trainer.logical_axes import partition

MOE = "qwen3-30b-a3b.scan"
ENGINE = ("--engine-version", "0.32", "--tp", "4")


def test_weights_are_partitioned_as_maxtext_does():
    on = mesh(fsdp=2, tensor=2, expert=2)
    config = dict(tree(MOE).config, num_decoder_layers=4, base_num_decoder_layers=4)
    shapes = portax.converter_for(config, layout=portax.layouts.Canonical()).expected_tree(partition=partition(on))
    layers = "decoder/layers"
    assert {path: shapes[path].sharding.spec for path in shapes if not path.endswith("scale")} == {
        "token_embedder/embedding": P(("tensor",), ("fsdp", "expert")),
        "decoder/logits_dense/kernel": P(("fsdp", "expert"), ("tensor",)),
        f"{layers}/self_attention/query/kernel": P(("fsdp", "expert"), None, ("tensor",), None),
        f"{layers}/self_attention/key/kernel": P(("fsdp", "expert"), None, ("tensor",), None),
        f"{layers}/self_attention/value/kernel": P(("fsdp", "expert"), None, ("tensor",), None),
        f"{layers}/self_attention/out/kernel": P(("tensor",), None, None, ("fsdp", "expert")),
        f"{layers}/moe_block/gate/kernel": P(("fsdp",), None, ("expert",)),
        f"{layers}/moe_block/wi_0": P(("expert",), None, ("fsdp",), ("tensor",)),
        f"{layers}/moe_block/wi_1": P(("expert",), None, ("fsdp",), ("tensor",)),
        f"{layers}/moe_block/wo": P(("expert",), None, ("tensor",), ("fsdp",)),
    }
    assert {shapes[path].sharding.spec for path in shapes if path.endswith("scale")} == {P(None), P(None, None)}


def test_what_does_not_divide_is_not_cut():
    of = partition(mesh(fsdp=4, tensor=2))
    assert of((("emb_dim", 6), ("layers", 2), ("mlp_dim", 8))).spec == P(None, None, ("tensor",))


def test_the_cost_of_a_sync():
    layout = portax.layouts.TpuInference(version="0.32", tp=4)
    converter = portax.converter_for(tree(MOE).config, layout=layout)
    cost = cost_model.estimate(converter, mesh(fsdp=8), mesh(data=2, model=4), dtype=jnp.bfloat16)
    plan = converter.plan(converter.expected_tree())
    assert [(row.what, row.calls) for row in cost.costs] == [("outside the layers", 1), ("layer 0 and 3 like it", 4)]
    vectors = sum(entry.nbytes for entry in plan.entries if not any(entry.spec))  # every device has all of them
    assert cost.output_bytes == (plan.bytes_out - vectors) // 4 + vectors
    assert cost.source_bytes * 8 >= sum(np.prod(x.shape) * 2 for x in converter.expected_tree().values())
    for row in cost.costs:
        assert 0 < row.received_bytes <= 2 * row.output_bytes
        assert row.temporary_bytes <= 2 * row.output_bytes
    largest = max(row.temporary_bytes for row in cost.costs)
    assert cost.peak_bytes == cost.source_bytes + cost.output_bytes + largest
    slow = cost_model.Chip("slow", 1, 2.0, 4.0)
    assert cost.seconds(slow) == ((cost.source_bytes + cost.output_bytes) / 2, cost.received_bytes / 4)


def test_on_the_command_line(capsys):
    arguments = ("plan", "--tree", GOLDEN / MOE / "source.json", *ENGINE, "--compile")
    assert command(*arguments, "--trainer-mesh", "fsdp=4,tensor=2", "--devices", 8) == 0
    out = capsys.readouterr().out
    assert "trainer       8 devices, fsdp 4 x tensor 2\nengines       8 devices, data 2 x model 4, on the same" in out
    assert re.search(r"layer 0 and 3 like it +4 ", out)
    assert re.search(r"TPU v5p +95 GB +[\d.]+ +[\d.]+", out)
    assert command(*arguments, "--devices", 8, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["entries"]
    assert found["compiled"]["trainer"] == {"fsdp": 8}
    assert found["compiled"]["received_bytes"] == sum(
        row["calls"] * row["received_bytes"] for row in found["compiled"]["costs"]
    )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((*ENGINE,), "--compile needs --devices, or --trainer-mesh"),
        ((*ENGINE, "--devices", 6), "6 devices are no multiple of the 4 of one engine"),
        ((*ENGINE, "--devices", 4, "--trainer-mesh", "fsdp=8"), "fsdp=8 has 8 devices, and --devices says 4"),
        ((*ENGINE, "--trainer-mesh", "fsdp:8"), "fsdp:8 is not of the form fsdp=64,tensor=4"),
        (("--layout", "hf", "--devices", 8), "--compile is for engines that spread weights over a mesh, and Hugging"),
    ],
)
def test_meshes_that_make_no_sense(arguments, match, capsys):
    assert command("plan", "--model", "qwen3-0.6b", "--compile", *arguments) == 2
    assert match in capsys.readouterr().err
