"""Qwen3-MoE for tp 4 by hand: numpy copies between views of raw bits, layer by layer, and nothing else."""

import numpy as np

_LANES = 128


def convert(leaves, *, tp):
    """The engine's leaves by name below `vllm_model.`, as bits.

    Args:
        leaves: The trainer's leaves as uint16, by path below `base/`, stacked on axis 1.
        tp: Tensor-parallel size; the KV heads are a multiple of it.
    """
    embed, head = leaves["token_embedder/embedding"], leaves["decoder/logits_dense/kernel"]
    out = {"model.embed_tokens.weight": embed.copy(), "lm_head.weight": np.ascontiguousarray(head.T)}
    out["model.norm.weight"] = leaves["decoder/decoder_norm/scale"].copy()
    stacks = {path.removeprefix("decoder/layers/"): leaf for path, leaf in leaves.items() if "/layers/" in path}
    for index in range(stacks["moe_block/wo"].shape[1]):
        layer = {path: leaf[:, index] for path, leaf in stacks.items()}
        out |= {f"model.layers.{index}.{name}": leaf for name, leaf in _layer(layer, tp)}
    return out


def _layer(layer, tp):
    attention = "self_attention"
    parts = [layer[f"{attention}/{part}/kernel"] for part in ("query", "key", "value")]
    yield "self_attn.qkv_proj.weight", _joined(parts, tp)
    projection = layer[f"{attention}/out/kernel"]
    yield "self_attn.o_proj.weight", projection.reshape(-1, projection.shape[-1]).copy()
    yield "self_attn.q_norm.weight", layer[f"{attention}/query_norm/scale"].copy()
    yield "self_attn.k_norm.weight", layer[f"{attention}/key_norm/scale"].copy()
    yield "input_layernorm.weight", layer["pre_self_attention_layer_norm/scale"].copy()
    yield "post_attention_layernorm.weight", layer["post_self_attention_layer_norm/scale"].copy()
    yield "mlp.gate.weight", layer["moe_block/gate/kernel"].copy()
    yield "mlp.experts.routed_experts.w13_weight", _w13(layer["moe_block/wi_0"], layer["moe_block/wi_1"], tp)
    yield "mlp.experts.routed_experts.w2_weight", layer["moe_block/wo"].copy()


def _joined(parts, tp):
    rows = parts[0].shape[0]
    widths = [part[0].size // tp for part in parts]
    out = np.empty((rows, tp, sum(widths)), np.uint16)
    at = 0
    for part, width in zip(parts, widths, strict=True):
        out[:, :, at : at + width] = part.reshape(rows, tp, width)
        at += width
    return out.reshape(rows, -1)


def _w13(gate, up, tp):
    experts, rows, width = gate.shape
    own = width // tp
    padded = -(-own // _LANES) * _LANES
    out = np.empty((experts, rows, tp, 2, padded), np.uint16)
    for i, part in enumerate((gate, up)):
        out[:, :, :, i, :own] = part.reshape(experts, rows, tp, own)
        out[:, :, :, i, own:] = 0
    return out.reshape(experts, rows, -1)


def raw_leaves(params):
    """The trainer's leaves as numpy's views of their bits; on one device nothing is copied."""
    leaves = {}

    def visit(node, path):
        for name, child in node.items():
            below = f"{path}/{name}" if path else name
            if isinstance(child, dict):
                visit(child, below)
            else:
                leaves[below] = np.asarray(child).view(np.uint16)

    visit(params["base"], "")
    return leaves


def differences(weights, expected):
    """Names of the leaves that are not bit for bit those that a converter made."""
    found = {name.removeprefix("vllm_model."): np.asarray(leaf).view(np.uint16) for name, leaf in expected.items()}
    if weights.keys() != found.keys():
        return sorted(weights.keys() ^ found.keys())
    return [name for name, leaf in weights.items() if not np.array_equal(leaf, found[name])]
