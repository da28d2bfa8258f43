"""Gemma4 E2B and E4B."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from portax.config.hub import HubConfig
from portax.config.model_config import ModelConfig
from portax.converters.gemma4 import Gemma4Converter
from portax.errors import ConfigError, PlanError
from portax.planning.plan import Plan
from portax.trainer.layer_params import LayerParams
from portax.trainer.scan import LayerSlice, LayerTypes
from portax.weights import blocks
from portax.weights.blocks import Blocks

_OWN_KEYS = "self_attention/key/kernel"


class Gemma4SmallConverter(Gemma4Converter):
    """Gemma4 E2B and E4B, as MaxText 0.2.5 holds them.

    Every layer has an embedding of its own, and the last layers have no keys and values.
    """

    decoder_blocks = ("gemma4_small",)
    hub_types = ("gemma4_text",)
    required = ("hidden_size_per_layer_input", "vocab_size_per_layer_input")
    scan_pattern = None

    def layer_cycle(self, found: Sequence[LayerSlice]) -> tuple[LayerTypes, ...]:
        """Four (E2B) or five (E4B) layers of sliding attention, then one of full.

        MaxText tells the two apart by the model's name. Here the config's cycle interval does, or else the first layer
        with wide heads.

        Raises:
            ConfigError: Neither the config nor a tree tells.
        """
        cycle = super().layer_cycle(found)
        if self.config.inhomogeneous_layer_cycle_interval > 1:
            return cycle
        if not found:
            raise ConfigError(
                "decoder_block='gemma4_small' has full attention every 5 (E2B) or 6 layers (E4B), and this config does "
                "not say which: set inhomogeneous_layer_cycle_interval, or give the parameters"
            )
        wide = [layer.index for layer in found if _head_dim(layer) == self.config.global_head_dim]
        return cycle[1:] if wide[:1] == [4] else cycle

    @classmethod
    def layer_counts(cls, config: ModelConfig, layers: Sequence[LayerSlice]) -> dict[str, int]:
        """The layers without keys of their own, if the model has any."""
        if not config.num_kv_shared_layers:
            return {}
        return {"num_kv_shared_layers": sum(_OWN_KEYS not in layer.leaves for layer in layers)}

    def plan_into(self, target: Mapping[str, Any]) -> Plan:
        """Plans a sync without a trainer's tree. If the config leaves two forms open, the engine's leaves decide.

        Raises:
            PlanError: Neither fits; of the two, what the one that comes closer says.
        """
        if self.config.inhomogeneous_layer_cycle_interval > 1:
            return super().plan_into(target)
        misfits = []
        for interval in (5, 6):
            config = dataclasses.replace(self.config, inhomogeneous_layer_cycle_interval=interval)
            try:
                return self.on(self.mesh, config=config).plan_into(target)
            except PlanError as error:
                misfits.append(error)
        raise min(misfits, key=lambda error: len(error.problems))

    def layer_types(self, found: Sequence[LayerSlice], depth: int) -> list[LayerTypes]:
        """The last layers use the keys and values of earlier ones."""
        first_shared = self.config.num_decoder_layers - self.config.num_kv_shared_layers
        types = super().layer_types(found, depth)
        return [kind | {"kv_shared"} if i >= first_shared else kind for i, kind in enumerate(types)]

    def global_weights(self, model: LayerParams) -> Blocks:
        """The embeddings of each layer, beside the model's own."""
        at, all_layers = "decoder/per_layer_embedder", "num_decoder_layers*hidden_size_per_layer_input"
        table = model.read(f"{at}/embed_tokens_per_layer", f"vocab_size_per_layer_input {all_layers}")
        projection = model.read(f"{at}/per_layer_model_projection/kernel", f"emb_dim {all_layers}")
        norm = f"{at}/per_layer_projection_norm"
        return (
            *super().global_weights(model),
            blocks.Embedding("embed_tokens_per_layer", table),
            blocks.Linear("per_layer_model_projection", projection, "column"),
            self.norm(model, norm, "per_layer_projection_norm", "hidden_size_per_layer_input"),
        )

    def attention(self, layer: LayerParams) -> Blocks:
        """Queries alone, where keys and values are another layer's."""
        if "kv_shared" not in layer.types:
            return super().attention(layer)
        dim = self.attention_axes(layer).head_dim
        query = layer.read("self_attention/query/kernel", f"emb_dim num_query_heads {dim}")
        out = layer.read("self_attention/out/kernel", f"num_query_heads {dim} emb_dim")
        return (
            blocks.Linear("self_attn.q_proj", query, "column"),
            blocks.Linear("self_attn.o_proj", out, "row"),
            self.norm(layer, "self_attention/query_norm", "self_attn.q_norm", dim),
        )

    def norms(self, layer: LayerParams) -> Blocks:
        """Also the way of the per-layer embedding into the layer."""
        gate = layer.read("per_layer_input_gate/kernel", "emb_dim hidden_size_per_layer_input")
        projection = layer.read("per_layer_projection/kernel", "hidden_size_per_layer_input emb_dim")
        return (
            *super().norms(layer),
            blocks.Linear("per_layer_input_gate", gate, "replicated"),
            blocks.Linear("per_layer_projection", projection, "replicated"),
            self.norm(layer, "post_per_layer_input_norm", "post_per_layer_input_norm"),
        )

    def mlp(self, layer: LayerParams) -> Blocks:
        """A gated MLP; E2B's is twice as wide where there are no keys and values."""
        wide = "kv_shared" in layer.types and self.config.use_double_wide_mlp
        return self.gated_mlp(layer, "mlp", "mlp", width="2*mlp_dim" if wide else "mlp_dim")

    @classmethod
    def reads_hub(cls, hub: HubConfig) -> bool:
        """Of a Gemma4 with embeddings of each layer."""
        return hub.model_type in cls.hub_types and bool(hub.get("hidden_size_per_layer_input"))


def _head_dim(layer: LayerSlice) -> int | None:
    query = layer.leaves.get("self_attention/query/kernel")
    return None if query is None else query.shape[-1]
