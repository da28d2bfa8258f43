"""Families are told from a tree's leaves alone."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import CHECKPOINTS, tree

import portax
from portax.analysis.identify import identify
from portax.config.model_config import ModelConfig
from portax.config.shipped import configs
from portax.converters import families
from portax.extend import PlainDecoder, blocks

SHIPPED = [portax.read_config(path) for path in configs()]
SOME_TREES = (
    "gemma2-2b.scan",
    "gemma2-2b.unscan",
    "olmo3-7b.scan",
    "gemma3-4b.scan",
    "gemma4-e2b.unscan",
    "llama3.1-8b.unscan",
    "mistral-7b.scan",
    "mixtral-8x7b.scan",
    "qwen2.5-7b.scan",
    "qwen3-next-80b-a3b.scan",
    "qwen3.5-35b-a3b.unscan",
    "gpt-oss-20b.scan",
    "deepseek2-16b.scan",
    "deepseek2-16b.unscan",
    "deepseek3-671b-mla.scan",
)
AMBIGUOUS = ({"qwen3_5", "qwen3_next"}, {"llama2", "mistral"})  # unscanned or always, their trees are the same


def told(params, known=None):
    return identify(params, known or families(), SHIPPED)


@pytest.mark.parametrize("name", sorted(path.name for path in CHECKPOINTS.glob("*.scan")))
def test_every_real_checkpoint_is_named(name):
    config = ModelConfig.of(json.loads((CHECKPOINTS / name / "maxtext_config.json").read_text()))
    match = told(portax.open_checkpoint(CHECKPOINTS / name / "orbax"))[0]
    assert match.decoder_block == config.decoder_block
    assert match.usual
    assert match.scan_axis == 1
    for field, size in match.sizes.items():
        assert config.size(field) == size, field


@pytest.mark.parametrize("name", SOME_TREES)
def test_every_tree_is_named(name):
    config = portax.read_config(tree(name).config)
    matches = told(tree(name).shapes)
    twins = [blocks for blocks in AMBIGUOUS if config.decoder_block in blocks and len(matches) > 1]
    if twins:
        assert [{match.decoder_block for match in matches}] == twins
        return
    match = matches[0]
    assert match.decoder_block == config.decoder_block
    if match.config is not None:
        plan = portax.converter_for(match.config, layout=portax.layouts.HuggingFace()).plan(tree(name).shapes)
        assert (
            plan.entries
            == portax.converter_for(config, layout=portax.layouts.HuggingFace()).plan(tree(name).shapes).entries
        )


def test_stacks_on_the_first_axis():
    shapes = {
        path: np.moveaxis(np.empty(leaf.shape, leaf.dtype), 1, 0) if "/layers/" in path else leaf
        for path, leaf in tree("qwen3-8b.scan").shapes.items()
    }
    match = told(shapes)[0]
    assert (match.decoder_block, match.scan_axis, match.sizes["num_decoder_layers"]) == ("qwen3", 0, 4)


def test_what_fits_no_family_gets_the_nearest():
    shapes = dict(tree("qwen3-8b.scan").shapes)
    shapes["base/decoder/layers/lora/kernel"] = jax.ShapeDtypeStruct((3, 4), np.float32)
    (match,) = told(shapes)
    assert match.decoder_block == "qwen3"
    assert match.odd == ("decoder/layers/lora/kernel",)
    shapes = dict(tree("qwen3-8b.scan").shapes)
    shapes["base/decoder/decoder_norm/scale"] = jax.ShapeDtypeStruct((65,), np.float32)
    (match,) = told(shapes)
    assert match.odd == ("emb_dim = [65, 128]",)


class Tiny(PlainDecoder):
    """A family that no shipped configuration is of."""

    decoder_blocks = ("tiny",)

    def layer_blocks(self, layer):
        return (blocks.Linear("mix", layer.read("mix/kernel", "emb_dim 3*mlp_dim"), "column"),)


def test_a_family_of_another_package():
    shapes = {
        "decoder/layers/mix/kernel": (8, 5, 36),
        "token_embedder/embedding": (32, 8),
        "decoder/decoder_norm/scale": (8,),
    }
    found = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
    match = told(found, {**families(), "tiny": Tiny})[0]
    assert (match.decoder_block, match.converter) == ("tiny", Tiny)
    assert match.sizes == {"num_decoder_layers": 5, "emb_dim": 8, "vocab_size": 32, "mlp_dim": 12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WideConfig(ModelConfig):
    mix_dim: int = 0


class Wide(PlainDecoder):
    """A family with a size of its own, which refuses sizes that do not go together."""

    decoder_blocks = ("wide",)
    config_class = WideConfig

    def layer_blocks(self, layer):
        return (blocks.Linear("mix", layer.read("mix/kernel", "emb_dim mix_dim"), "column"),)

    def check_config(self):
        if self.config.mix_dim <= 2 * self.config.emb_dim:
            raise portax.ConfigError(f"mix_dim={self.config.mix_dim} is too narrow")


def wide(mix_dim):
    shapes = {
        "decoder/layers/mix/kernel": (8, 5, mix_dim),
        "token_embedder/embedding": (32, 8),
        "decoder/decoder_norm/scale": (8,),
    }
    found = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
    return told(found, {"wide": Wide})[0]


def test_sizes_that_only_another_packages_family_has_are_told():
    match = wide(20)
    assert (match.odd, match.untold, match.config.mix_dim) == ((), (), 20)


def test_what_a_family_refuses_counts_for_the_leaves_sizes_and_not_for_an_examples():
    match = wide(12)
    assert (match.odd, match.config) == (("mix_dim=12 is too narrow",), None)
