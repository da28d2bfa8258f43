"""`NativeModel`: what sets one of tpu-inference's native JAX models apart."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class NativeModel:
    """How one of the engine's native JAX model classes holds weights; a model family states it, `FlaxNnx` goes by it.

    Attributes:
        architecture: The hub's name of the class.
        kernel: What it calls the weight of a linear.
        norm: What it calls the weight of a norm.
        embedding: What it calls the token embedding.
        head: Where its output projection is; None where none that is not tied was run.
        tied: Whether a model without one was run.
        pads_heads: Whether it pads head_dim and repeats KV heads; the others' loader refuses what would need that.
        pads_vocab: Whether it pads the vocabulary to a multiple of tp.
        merges_gate_up: Whether gate and up are one matrix.
        cuts_wide_kv: Whether KV heads that tp does not divide are cut along head_dim.
        block_checkpoints: Whether it was run on fp8 checkpoints in blocks.
        quantises_experts: Whether its experts were run quantised online.

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
