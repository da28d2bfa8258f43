"""What the weights of a plain decoder are: the hooks that a model family overrides where it differs."""

import itertools
from collections.abc import Sequence
from typing import ClassVar, Literal, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from portax.config.model_config import ModelConfig
from portax.errors import ConfigError
from portax.trainer import scan
from portax.trainer.layer_params import LayerParams
from portax.weights import blocks
from portax.weights.scale_shift import ScaleShift

Blocks: TypeAlias = tuple[blocks.Block, ...]


class PlainDecoder:
    """Embedding, layers of attention and gated MLP with a norm before each, final norm and output projection.

    Every hook sees one layer, unscanned, or the model outside its layers, and returns blocks. It knows no scan axis, no
    tensor parallelism, no padding and no engine.

    Attributes:
        decoder_blocks: MaxText's `decoder_block` values that this class converts.
        required: Config fields that must be set for this family.
        default_module_prefix: What the engine's usual model class wraps its language model in.
        scan_pattern: How MaxText stacks the layers; None if it never does.
        shared_head_module: Whether vLLM's model shares the embedding *module* with a tied output projection.
        starts_with_bos: Whether every prompt of this family begins with its `<bos>`; without, it generates nonsense.
        config: The model's configuration.
    """

    decoder_blocks: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[tuple[str, ...]] = ()
    default_module_prefix: ClassVar[str] = ""
    scan_pattern: ClassVar[scan.ScanPattern | None] = scan.ScanPattern()
    shared_head_module: ClassVar[bool] = True
    starts_with_bos: ClassVar[bool] = False
    config: ModelConfig

    def check_config(self) -> None:
        """Raises a `ConfigError` for what this family cannot convert; `required` fields are set."""

    @property
    def architecture(self) -> str | None:
        """The hub's name of the model class, for engines that hold each class in a way of its own; None if unknown."""
        return None

    @property
    def embedding_scale_shift(self) -> ScaleShift | None:
        """How the hub's embedding follows from the trainer's; None if they are the same."""
        return None

    @property
    def norm_scale_shift(self) -> ScaleShift | None:
        """How the hub's norm weights follow from the trainer's; None if they are the same."""
        return None

    def layer_cycle(self, found: Sequence[scan.LayerSlice]) -> tuple[scan.LayerTypes, ...]:
        """What is special about each layer, up to where it repeats; by default all layers are the same.

        Args:
            found: The layers of the trainer's tree, for what no config says; none when planning without a tree.
        """
        return (frozenset(),)

    def layer_types(self, found: Sequence[scan.LayerSlice], depth: int) -> list[scan.LayerTypes]:
        """What is special about each of the first `depth` layers."""
        return list(itertools.islice(itertools.cycle(self.layer_cycle(found)), depth))

    def global_weights(self, model: LayerParams) -> Blocks:
        """Embedding, final norm and output projection."""
        table = model.read("token_embedder/embedding", "vocab_size emb_dim", self.embedding_scale_shift)
        if self.config.logits_via_embedding:
            head: blocks.Block = blocks.TiedLMHead(table, to="embed_tokens", shared_module=self.shared_head_module)
        else:
            head = blocks.LMHead(model.read("decoder/logits_dense/kernel", "emb_dim vocab_size"))
        return blocks.Embedding("embed_tokens", table), self.norm(model, "decoder/decoder_norm", "norm"), head

    def attention(self, layer: LayerParams) -> Blocks:
        """Projections of one attention layer and the norms within it; by default grouped-query attention."""
        return self.grouped_query_attention(layer, "self_attention")

    def norms(self, layer: LayerParams) -> Blocks:
        """Norms around attention and MLP; by default one before each."""
        return (
            self.norm(layer, "pre_self_attention_layer_norm", "input_layernorm"),
            self.norm(layer, "post_self_attention_layer_norm", "post_attention_layernorm"),
        )

    def mlp(self, layer: LayerParams) -> Blocks:
        """A gated MLP."""
        return self.gated_mlp(layer, "mlp", "mlp", width="mlp_dim")

    def moe(self, layer: LayerParams) -> Blocks:
        """Router and experts of a mixture-of-experts layer."""
        raise ConfigError(
            f"num_experts={self.config.num_experts}: {type(self).__name__} converts no mixtures of experts"
        )

    def layer_blocks(self, layer: LayerParams) -> Blocks:
        """All of one layer."""
        feed_forward = self.moe(layer) if self.config.num_experts > 1 else self.mlp(layer)
        return self.attention(layer) + self.norms(layer) + feed_forward

    def norm(self, layer: LayerParams, path: str, name: str, size: str = "emb_dim") -> blocks.Param:
        """The weight of one norm.

        Args:
            layer: The layer, or the model.
            path: Where the trainer has it, e.g. `self_attention/query_norm`.
            name: Module name on the hub, e.g. `self_attn.q_norm`.
            size: What the config calls its size.
        """
        return blocks.Param(f"{name}.weight", layer.read(f"{path}/scale", size, self.norm_scale_shift))

    def grouped_query_attention(
        self,
        layer: LayerParams,
        path: str,
        *,
        kv_heads: str = "num_kv_heads",
        dim: str = "head_dim",
        query_dim: str | None = None,
        out: str | None = None,
        shares_kv: bool = False,
        norms: bool = False,
    ) -> Blocks:
        """The projections of one attention layer; with biases, if the config has them.

        Args:
            layer: The layer.
            path: Where the trainer has them, e.g. `self_attention`.
            kv_heads: What the config calls the number of KV heads.
            dim: What it calls the width of a head.
            query_dim: Width of a query head, if a gate rides along.
            out: Axes of the output kernel, if heads and width are not apart.
            shares_kv: Whether the keys are the values, too.
            norms: Whether queries and keys have norms, one for all heads.
        """
        kv_axes = f"emb_dim {kv_heads} {dim}"
        query = layer.read(f"{path}/query/kernel", f"emb_dim num_query_heads {query_dim or dim}")
        key = layer.read(f"{path}/key/kernel", kv_axes)
        value = None if shares_kv else layer.read(f"{path}/value/kernel", kv_axes)
        output = layer.read(f"{path}/out/kernel", out or f"num_query_heads {dim} emb_dim")
        projections = (
            blocks.QKV("self_attn", query, key, value, self._qkv_bias(layer, path)),
            blocks.Linear("self_attn.o_proj", output, "row"),
        )
        if not norms:
            return projections
        return (
            *projections,
            self.norm(layer, f"{path}/query_norm", "self_attn.q_norm", dim),
            self.norm(layer, f"{path}/key_norm", "self_attn.k_norm", dim),
        )

    def _qkv_bias(self, layer: LayerParams, path: str) -> tuple[Shaped[Array, "_ _"], ...]:
        if not self.config.attention_bias:
            return ()
        heads = {"query": "num_query_heads", "key": "num_kv_heads", "value": "num_kv_heads"}
        return tuple(layer.read(f"{path}/{name}/bias", f"{count} head_dim") for name, count in heads.items())

    def gated_mlp(self, layer: LayerParams, path: str, name: str, *, width: str) -> Blocks:
        """A gated MLP, gate and up apart or pre-fused.

        Args:
            layer: The layer.
            path: Where the trainer has it, e.g. `mlp`.
            name: Module name on the hub.
            width: What the config calls its width.
        """
        if f"{path}/wi/kernel" in layer:
            gate, up = _halves(layer.read(f"{path}/wi/kernel", f"emb_dim 2 {width}"), axis=1)
        else:
            gate = layer.read(f"{path}/wi_0/kernel", f"emb_dim {width}")
            up = layer.read(f"{path}/wi_1/kernel", f"emb_dim {width}")
        return (
            blocks.MergedLinear(f"{name}.gate_up_proj", (f"{name}.gate_proj", f"{name}.up_proj"), ((gate,), (up,))),
            blocks.Linear(f"{name}.down_proj", layer.read(f"{path}/wo/kernel", f"{width} emb_dim"), "row"),
        )

    def experts(self, layer: LayerParams, path: str, name: str, *, hub: Literal["each", "stacked"]) -> blocks.FusedMoE:
        """The routed experts below `path`, gate and up apart or pre-fused.

        Args:
            layer: The layer.
            path: Where the trainer has them, e.g. `moe_block`.
            name: Module name on the hub, e.g. `mlp.experts`.
            hub: How the hub stores them; see `blocks.FusedMoE`.
        """
        if f"{path}/wi" in layer:
            gate, up = jnp.split(layer.read(f"{path}/wi", "num_experts emb_dim 2*moe_mlp_dim"), 2, axis=2)
        else:
            gate = layer.read(f"{path}/wi_0", "num_experts emb_dim moe_mlp_dim")
            up = layer.read(f"{path}/wi_1", "num_experts emb_dim moe_mlp_dim")
        return blocks.FusedMoE(name, gate, up, layer.read(f"{path}/wo", "num_experts moe_mlp_dim emb_dim"), hub)


def _halves(fused: Shaped[Array, "..."], *, axis: int) -> list[Shaped[Array, "..."]]:
    return [jnp.squeeze(half, axis) for half in jnp.split(fused, 2, axis)]
