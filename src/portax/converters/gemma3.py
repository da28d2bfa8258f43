"""Gemma3."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from portax.config.hub import HubConfig
from portax.config.to_hub import TrainerConfig
from portax.converters.decoder import PlainDecoder
from portax.errors import ConfigError
from portax.trainer.layer_params import LayerParams
from portax.trainer.scan import LayerSlice, LayerTypes, ScanPattern
from portax.weights.blocks import Blocks
from portax.weights.scale_shift import ScaleShift


class Gemma3Converter(PlainDecoder):
    """Gemma3 4B, 12B and 27B, as MaxText 0.2.5 holds them; local and global layers have the same weights.

    MaxText's norm weights are the hub's plus one, and its embedding is the hub's times sqrt(emb_dim), in bfloat16.
    """

    decoder_blocks = ("gemma3",)
    hub_types = ("gemma3_text",)
    default_module_prefix = "language_model."
    scan_pattern: ClassVar[ScanPattern | None] = ScanPattern("decoder/layers", "layers_")
    shared_head_module = False
    starts_with_bos = True

    @property
    def architecture(self) -> str | None:
        """As the hub's `config.json` says."""
        return "Gemma3ForConditionalGeneration"

    @property
    def embedding_scale_shift(self) -> ScaleShift | None:
        """The divisor is rounded to bfloat16 (MaxText 0.2.5, checkpoint_conversion/utils/param_mapping.py)."""
        return ScaleShift(over=float(np.asarray(math.sqrt(self.config.emb_dim)).astype(jnp.bfloat16)))

    @property
    def norm_scale_shift(self) -> ScaleShift | None:
        """MaxText keeps what a norm multiplies with, the hub what it adds to one."""
        return ScaleShift(minus=1.0)

    def layer_cycle(self, found: Sequence[LayerSlice]) -> tuple[LayerTypes, ...]:
        """Six layers, whose weights are alike (MaxText 0.2.5, models/gemma3.py)."""
        return (frozenset(),) * 6

    def attention(self, layer: LayerParams) -> Blocks:
        """Grouped-query attention with per-head norms on queries and keys."""
        return self.grouped_query_attention(layer, "self_attention", norms=True)

    def norms(self, layer: LayerParams) -> Blocks:
        """Norms before and after attention and MLP."""
        return (
            self.norm(layer, "pre_self_attention_norm", "input_layernorm"),
            self.norm(layer, "post_self_attention_norm", "post_attention_layernorm"),
            self.norm(layer, "pre_ffw_norm", "pre_feedforward_layernorm"),
            self.norm(layer, "post_ffw_norm", "post_feedforward_layernorm"),
        )

    @classmethod
    def from_hub(cls, hub: HubConfig) -> dict[str, Any]:
        """Returns a dense model's fields; where the hub does not say, it ties the output projection."""
        return {**super().from_hub(hub), "logits_via_embedding": hub.get("tie_word_embeddings", True)}

    @classmethod
    def to_hub(cls, trainer: TrainerConfig) -> dict[str, Any]:
        """Refuses: MaxText scales Gemma3's queries by the model's name, which no configuration tells."""
        raise ConfigError(
            "no config.json is derived for decoder_block='gemma3': MaxText scales its queries by the model's name, so "
            "the configuration does not say all that results depend on; take the model's config.json from the hub"
        )
