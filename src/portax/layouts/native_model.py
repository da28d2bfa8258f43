"""`NativeModel`: what sets one of tpu-inference's native JAX models apart."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class NativeModel:
    """The form in which one of the engine's native JAX models holds weights; a family states it, `FlaxNnx` applies it.

    Attributes:
        architecture: The hub's name of the class.
        kernel: Its name for the weight of a linear.
        norm: Its name for the weight of a norm.
        embedding: Its name for the token embedding.
        head: Its name for the output projection; None if only tied models were run.
        tied: True if a model with a tied output projection was run.
        pads_heads: True if it pads head_dim and repeats KV heads; other classes refuse sizes that need this.
        pads_vocab: True if it pads the vocabulary to a multiple of tp.
        merges_gate_up: True if gate and up are one matrix.
        cuts_wide_kv: True if KV heads that tp does not divide are cut along head_dim.
        block_checkpoints: True if it was run on fp8 checkpoints in blocks.
        quantises_experts: True if its experts were run quantised online.

    Example:
        >>> NativeModel("Qwen3ForCausalLM", pads_vocab=True).norm
        'weight'
    """

    architecture: str
    kernel: str = "weight"
    norm: str = "weight"
    embedding: str = "embed_tokens.weight"
    head: str | None = "lm_head.weight"
    tied: bool = True
    pads_heads: bool = False
    pads_vocab: bool = False
    merges_gate_up: bool = False
    cuts_wide_kv: bool = False
    block_checkpoints: bool = False
    quantises_experts: bool = False
