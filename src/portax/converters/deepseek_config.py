"""The configuration of DeepSeek's models: the trainer's fields, and the hub's."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from portax.config.hub import DENSE, HubConfig
from portax.config.model_config import ModelConfig
from portax.config.to_hub import SILU, TrainerConfig
from portax.errors import ConfigError

_SIZES = {name: key for name, key in DENSE.items() if name != "head_dim"} | {
    "num_experts": "n_routed_experts",
    "moe_mlp_dim": "moe_intermediate_size",
    "shared_experts": "n_shared_experts",
    "first_num_dense_layers": "first_k_dense_replace",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
_INDEXER = {"indexer_n_heads": "index_n_heads", "indexer_head_dim": "index_head_dim"}
_SCORES = {False: "softmax", True: "sigmoid"}  # of models without and with a bias of the router
_ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekConfig(ModelConfig):
    """A `ModelConfig` with the sizes of latent attention (MLA).

    Attributes:
        head_dim: Unused: keys, values and queries have widths of their own.
        attention_type: `mla`.
        first_num_dense_layers: Number of layers, at the start, with a dense MLP.
        q_lora_rank: Width between the two projections of the queries; 0 if there is only one.
        kv_lora_rank: Width of the latent vector that keys and values are made of.
        qk_nope_head_dim: Width of the part of a head's queries and keys that does not rotate.
        qk_rope_head_dim: Width of the part that does.
        v_head_dim: Width of a head's values.
        routed_score_func: The function of the router's scores; empty where the config does not tell.
        rope_interleave: True if rotary pairs are interleaved.
        mtp_num_layers: Layers that predict further tokens.
        use_indexer: True if an indexer selects the tokens that are attended to, as in V3.2.
        indexer_n_heads: Heads of the indexer.
        indexer_head_dim: Width of one of them.
    """

    head_dim: int = 0
    attention_type: str = "mla"
    first_num_dense_layers: int = 0
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    routed_score_func: str = ""
    rope_interleave: bool = True
    mtp_num_layers: int = 0
    use_indexer: bool = False
    indexer_n_heads: int = 0
    indexer_head_dim: int = 0

    @property
    def hub_type(self) -> str:
        """The hub's `model_type`."""
        return "deepseek_v32" if self.use_indexer else "deepseek_v3" if self.routed_bias else "deepseek_v2"

    @property
    def architecture(self) -> str:
        """The hub's name of the model class."""
        return _ARCHITECTURES[self.hub_type]

    def check(self) -> None:
        """Checks that there can be such a model, and that all of it is converted.

        Raises:
            ConfigError: There cannot, or it is not; names every reason.
        """
        if problems := [*self._contradictions()]:
            raise ConfigError("a model of DeepSeek's that is not converted:\n  " + "\n  ".join(problems))

    def _contradictions(self) -> Iterator[str]:
        if self.attention_type != "mla":
            yield f"attention_type={self.attention_type!r}: all of them have latent attention, 'mla'"
        if self.num_experts <= 1 or not self.shared_experts:
            yield f"num_experts={self.num_experts}, shared_experts={self.shared_experts}: all have both kinds of expert"
        if self.first_num_dense_layers >= self.num_decoder_layers:
            dense, depth = self.first_num_dense_layers, self.num_decoder_layers
            yield f"first_num_dense_layers={dense} of {depth} layers: none is left for experts"
        if not self.mlp_dim:
            yield "mlp_dim: missing, and the first layers are dense (MaxText's key is base_mlp_dim)"
        if self.routed_score_func not in ("", _SCORES[self.routed_bias]):
            yield (
                f"routed_score_func={self.routed_score_func!r} with routed_bias={self.routed_bias}: V2 has softmax and "
                "no bias, and since V3 the router has sigmoid and a bias, which engines need"
            )
        if not self.rope_interleave:
            yield "rope_interleave=False: rotary pairs in another order than the hub's, which was not run"
        if self.mtp_num_layers:
            yield f"mtp_num_layers={self.mtp_num_layers}: layers that predict further tokens (MTP) are not converted"
        if self.use_indexer and not (self.q_lora_rank and self.indexer_n_heads and self.indexer_head_dim):
            yield "use_indexer=True needs q_lora_rank, indexer_n_heads and indexer_head_dim"


def from_hub(hub: HubConfig) -> dict[str, Any]:
    """Returns the fields that a hub `config.json` gives; notes problems in it.

    Args:
        hub: The content of the file.
    """
    biased, sparse = hub.model_type != "deepseek_v2", hub.model_type == "deepseek_v32"
    scores = hub.get("scoring_func", _SCORES[biased])
    if scores != _SCORES[biased] or hub.get("moe_layer_freq", 1) != 1:
        hub.problems.append(
            f"scoring_func: {scores!r}, moe_layer_freq: {hub.get('moe_layer_freq')!r}; a {hub.model_type} has "
            f"{_SCORES[biased]!r} and experts in every layer that is not dense"
        )
    dense, kinds = hub.get("first_k_dense_replace"), hub.get("mlp_layer_types", [])
    told = kinds.count("dense")
    if kinds and (told != dense or kinds != ["dense"] * told + ["sparse"] * (len(kinds) - told)):
        hub.problems.append(f"mlp_layer_types: not {dense} dense layers (first_k_dense_replace) and then experts alone")
    return {
        "decoder_block": "deepseek",
        "logits_via_embedding": hub.get("tie_word_embeddings", False),
        **hub.sizes(_SIZES | (_INDEXER if sparse else {})),
        "q_lora_rank": hub.get("q_lora_rank", 0),
        "rope_type": hub.rope.get("rope_type", "default"),
        "rope_interleave": hub.get("rope_interleave", True),
        "routed_bias": biased,
        "routed_score_func": scores,
        "use_indexer": sparse,
    }


def to_hub(trainer: TrainerConfig) -> dict[str, Any]:
    """Returns the hub `config.json`; notes in `trainer` what keeps it from being derived.

    Args:
        trainer: The trainer's configuration.
    """
    config: Any = trainer.config
    trainer.same(mlp_activations=[SILU], final_logits_soft_cap=(0,), attn_logits_soft_cap=(0,))
    trainer.same(rope_attention_scaling=(False,), rope_interleave=(True,), norm_topk_prob=(False,))
    scale = trainer.need("mscale")
    rope = {**trainer.yarn(), "mscale": scale, "mscale_all_dim": scale}
    rope |= {} if trainer.need("rope_truncate") else {"truncate": False}
    biased = config.routed_bias
    return {
        **trainer.decoder(config.hub_type, config.architecture, _SIZES, **rope),
        "rope_scaling": rope,
        "q_lora_rank": config.q_lora_rank or None,
        "num_experts_per_tok": trainer.need("num_experts_per_tok"),
        "routed_scaling_factor": trainer.need("routed_scaling_factor"),
        "scoring_func": _SCORES[biased],
        "topk_method": "noaux_tc" if biased else "greedy",
        "norm_topk_prob": biased,  # MaxText does, with sigmoid
        **_groups(trainer, biased),
        "moe_layer_freq": 1,
        "attention_bias": False,
        **_of_its_version(trainer),
    }


def _groups(trainer: TrainerConfig, biased: bool) -> dict[str, Any]:
    """The groups of experts of which the router takes some: one of one where the trainer has none."""
    count, taken = (trainer.find(name) for name in ("n_routing_groups", "topk_routing_group"))
    if count in (None, -1):
        return {"n_group": 1, "topk_group": 1}
    if not biased:
        trainer.problems.append(f"n_routing_groups: {count}; transformers' V2 ranks groups in another way than MaxText")
    return {"n_group": count, "topk_group": taken}


def _of_its_version(trainer: TrainerConfig) -> dict[str, Any]:
    config: Any = trainer.config
    if config.use_indexer:
        return {**trainer.sizes(_INDEXER), "index_topk": trainer.need("indexer_topk"), "num_nextn_predict_layers": 0}
    return {"num_nextn_predict_layers": 0} if config.routed_bias else {}
