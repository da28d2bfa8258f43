"""`PlainDecoder`: embedding, layers of attention and gated MLP, final norm and output projection."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from portax.converters.base import BaseConverter
from portax.errors import ConfigError
from portax.trainer.layer_params import LayerParams
from portax.weights import blocks
from portax.weights.blocks import Blocks
from portax.weights.scale_shift import ScaleShift


@dataclasses.dataclass(frozen=True)
class AttentionAxes:
    """The config's names for the sizes of an attention layer.

    Attributes:
        kv_heads: The number of KV heads.
        head_dim: The width of a head.
        query_dim: The width of a query head, if a gate rides along; None for `head_dim`.
        out: All axes of the output kernel, if it has heads and width on one axis; None if on two.

    Example:
        >>> AttentionAxes(query_dim="2*head_dim").kv_heads  # a gate rides along with the queries
        'num_kv_heads'
    """

    kv_heads: str = "num_kv_heads"
    head_dim: str = "head_dim"
    query_dim: str | None = None
    out: str | None = None


@dataclasses.dataclass(frozen=True)
class Attention:
    """The weights of one attention layer, as read.

    Attributes:
        query: Kernel of the queries.
        key: Kernel of the keys.
        value: Kernel of the values; None if the keys are also the values.
        output: Kernel of the output projection.
        bias: Biases of queries, keys and values, `[heads, dim]` each; empty without.

    Example:
        >>> kernel = jnp.ones((64, 4, 16))
        >>> read = Attention(kernel, kernel, None, jnp.ones((4, 16, 64)))
        >>> [block.name for block in converter.attention_blocks(read)]
        ['self_attn', 'self_attn.o_proj']
    """

    query: Shaped[Array, "in heads query_dim"]
    key: Shaped[Array, "in kv_heads dim"]
    value: Shaped[Array, "in kv_heads dim"] | None
    output: Shaped[Array, "..."]
    bias: tuple[Shaped[Array, "_ _"], ...] = ()


class PlainDecoder(BaseConverter):
    """A decoder with one norm before attention and one before a gated MLP; a family overrides what differs.

    Attributes:
        shared_head_module: True if vLLM's model shares the embedding *module* with a tied output projection.

    Example:
        >>> class MyConverter(PlainDecoder):
        ...     decoder_blocks = ("my_decoder",)
        ...
        ...     def attention(self, layer):
        ...         return self.grouped_query_attention(layer, "self_attention", norms=True)
        >>> mine = MyConverter({**config, "decoder_block": "my_decoder"}, layout=layout)
        >>> mine.expected_tree()["decoder/decoder_norm/scale"].shape
        (64,)
    """

    shared_head_module: ClassVar[bool] = True

    @property
    def embedding_scale_shift(self) -> ScaleShift | None:
        """Makes the hub's embedding of the trainer's; None if they are the same."""
        return None

    @property
    def norm_scale_shift(self) -> ScaleShift | None:
        """Makes the hub's norm weights of the trainer's; None if they are the same."""
        return None

    @property
    def query_scale_shift(self) -> ScaleShift | None:
        """Makes the hub's queries of the trainer's; None if they are the same."""
        return None

    def global_weights(self, model: LayerParams) -> Blocks:
        """Returns the embedding, the final norm and the output projection."""
        table = model.read("token_embedder/embedding", "vocab_size emb_dim", self.embedding_scale_shift)
        if self.config.logits_via_embedding:
            head: blocks.Block = blocks.TiedLMHead(table, to="embed_tokens", shared_module=self.shared_head_module)
        else:
            head = blocks.LMHead(model.read("decoder/logits_dense/kernel", "emb_dim vocab_size"))
        return blocks.Embedding("embed_tokens", table), self.norm(model, "decoder/decoder_norm", "norm"), head

    def attention(self, layer: LayerParams) -> Blocks:
        """Returns the projections of one attention layer, and its norms; by default grouped-query attention."""
        return self.grouped_query_attention(layer, "self_attention")

    def norms(self, layer: LayerParams) -> Blocks:
        """Returns the norms around attention and MLP; by default one before each."""
        return (
            self.norm(layer, "pre_self_attention_layer_norm", "input_layernorm"),
            self.norm(layer, "post_self_attention_layer_norm", "post_attention_layernorm"),
        )

    def mlp(self, layer: LayerParams) -> Blocks:
        """Returns a gated MLP."""
        return self.gated_mlp(layer, "mlp", "mlp", width="mlp_dim")

    def moe(self, layer: LayerParams) -> Blocks:
        """Refuses mixtures of experts; a family with experts returns its router and experts."""
        raise ConfigError(
            f"num_experts={self.config.num_experts}: {type(self).__name__} converts no mixtures of experts"
        )

    def norm(self, layer: LayerParams, path: str, name: str, size: str = "emb_dim") -> blocks.Param:
        """Returns the weight of one norm.

        Args:
            layer: The layer, or the model.
            path: The trainer's path, e.g. `self_attention/query_norm`.
            name: Module name on the hub, e.g. `self_attn.q_norm`.
            size: The config's name of its size.
        """
        return blocks.Param(f"{name}.weight", layer.read(f"{path}/scale", size, self.norm_scale_shift))

    def grouped_query_attention(
        self,
        layer: LayerParams,
        path: str,
        axes: AttentionAxes = AttentionAxes(),
        *,
        shares_kv: bool = False,
        norms: bool = False,
    ) -> Blocks:
        """Returns an attention layer whose kernels are only reshaped; with biases, if the config has them.

        To move a kernel in another way, change the result of `read_attention` and pass it to `attention_blocks`.

        Args:
            layer: The layer.
            path: The trainer's path, e.g. `self_attention`.
            axes: The config's names of its sizes.
            shares_kv: True if the keys are also the values.
            norms: True if queries and keys have norms, one for all heads.
        """
        found = self.attention_blocks(self.read_attention(layer, path, axes, shares_kv=shares_kv))
        return (*found, *self.query_key_norms(layer, path, axes.head_dim)) if norms else found

    def read_attention(
        self, layer: LayerParams, path: str, axes: AttentionAxes = AttentionAxes(), *, shares_kv: bool = False
    ) -> Attention:
        """Reads the weights of one attention layer, with the queries scaled as the hub's are.

        Args:
            layer: The layer.
            path: The trainer's path.
            axes: The config's names of their sizes.
            shares_kv: True if the keys are also the values.

        Raises:
            ConfigError: The keys are also the values, and have biases.
        """
        if shares_kv and self.config.attention_bias:
            raise ConfigError("attention_bias=True with keys that are the values, too: no such model was run")
        heads = {
            "query": f"num_query_heads {axes.query_dim or axes.head_dim}",
            "key": f"{axes.kv_heads} {axes.head_dim}",
            **({} if shares_kv else {"value": f"{axes.kv_heads} {axes.head_dim}"}),
        }
        scales = {"query": self.query_scale_shift}
        kernels = {
            name: layer.read(f"{path}/{name}/kernel", f"emb_dim {of}", scales.get(name)) for name, of in heads.items()
        }
        biases = heads if self.config.attention_bias else {}
        return Attention(
            kernels["query"],
            kernels["key"],
            kernels.get("value"),
            layer.read(f"{path}/out/kernel", axes.out or f"num_query_heads {axes.head_dim} emb_dim"),
            tuple(layer.read(f"{path}/{name}/bias", of, scales.get(name)) for name, of in biases.items()),
        )

    def attention_blocks(self, read: Attention, name: str = "self_attn") -> Blocks:
        """Returns the projections of one attention layer.

        Args:
            read: Their weights.
            name: Module name on the hub.
        """
        return (
            blocks.QKV(name, read.query, read.key, read.value, read.bias),
            blocks.Linear(f"{name}.o_proj", read.output, "row"),
        )

    def query_key_norms(self, layer: LayerParams, path: str, size: str = "head_dim", name: str = "self_attn") -> Blocks:
        """Returns the norms of queries and keys.

        Args:
            layer: The layer.
            path: The trainer's path, e.g. `self_attention`.
            size: The config's name of their size.
            name: Module name on the hub.
        """
        return (
            self.norm(layer, f"{path}/query_norm", f"{name}.q_norm", size),
            self.norm(layer, f"{path}/key_norm", f"{name}.k_norm", size),
        )

    def gated_mlp(self, layer: LayerParams, path: str, name: str, *, width: str) -> Blocks:
        """Returns a gated MLP, from kernels of gate and up that are separate or fused.

        Args:
            layer: The layer.
            path: The trainer's path, e.g. `mlp`.
            name: Module name on the hub.
            width: The config's name of its width.
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

    def experts(
        self,
        layer: LayerParams,
        path: str,
        name: str,
        *,
        hub: Literal["each", "stacked", "alternating"],
        hub_names: blocks.ExpertNames = blocks.EXPERT_NAMES,
        width: str = "moe_mlp_dim",
    ) -> blocks.FusedMoE:
        """Returns the routed experts below `path`, from kernels of gate and up that are separate or fused.

        Args:
            layer: The layer.
            path: The trainer's path, e.g. `moe_block`.
            name: Module name on the hub, e.g. `mlp.experts`.
            hub: The form in which the hub stores them; see `blocks.FusedMoE`.
            hub_names: The hub's names of their matrices.
            width: The config's name of the width of one expert.
        """
        if f"{path}/wi" in layer:
            gate, up = jnp.split(layer.read(f"{path}/wi", f"num_experts emb_dim 2*{width}"), 2, axis=2)
        else:
            gate = layer.read(f"{path}/wi_0", f"num_experts emb_dim {width}")
            up = layer.read(f"{path}/wi_1", f"num_experts emb_dim {width}")
        down = layer.read(f"{path}/wo", f"num_experts {width} emb_dim")
        return blocks.FusedMoE(name, gate, up, down, hub, hub_names)


def _halves(fused: Shaped[Array, "..."], *, axis: int) -> list[Shaped[Array, "..."]]:
    return [jnp.squeeze(half, axis) for half in jnp.split(fused, 2, axis)]
