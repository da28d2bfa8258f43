"""The engine's layouts for tp 4 by hand: numpy copies between views of raw bits, layer by layer, and nothing else."""

import math

import jax.numpy as jnp
import numpy as np

_LANES = 128
_ROWS = 4096  # of an embedding that are scaled at a time: they stay in the cache


def convert(leaves, *, model, tp):
    """The engine's leaves by name below `vllm_model.`, as bits.

    Args:
        leaves: The trainer's leaves as uint16, by path below `base/`, stacked on axis 1.
        model: `qwen3-moe` or `gemma4`.
        tp: Tensor-parallel size; of the KV heads it is a divisor or a multiple.
    """
    return {"qwen3-moe": _qwen3_moe, "gemma4": _gemma4}[model](leaves, tp)


def _qwen3_moe(leaves, tp):
    embed, head = leaves["token_embedder/embedding"], leaves["decoder/logits_dense/kernel"]
    out = {"model.embed_tokens.weight": embed.copy(), "lm_head.weight": np.ascontiguousarray(head.T)}
    out["model.norm.weight"] = leaves["decoder/decoder_norm/scale"].copy()
    for index, layer in _layers(leaves, "decoder/layers/"):
        named = dict(_attention(layer, tp))
        named["input_layernorm.weight"] = layer["pre_self_attention_layer_norm/scale"].copy()
        named["post_attention_layernorm.weight"] = layer["post_self_attention_layer_norm/scale"].copy()
        named["mlp.gate.weight"] = layer["moe_block/gate/kernel"].copy()
        named |= _experts(layer, "moe_block", "mlp.experts", tp)
        out |= {f"model.layers.{index}.{name}": leaf for name, leaf in named.items()}
    return out


_GEMMA4_NORMS = {
    "pre_self_attention_norm": "input_layernorm",
    "post_self_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "mlp/pre_feedforward_layernorm_2": "pre_feedforward_layernorm_2",
    "mlp/post_feedforward_layernorm_1": "post_feedforward_layernorm_1",
    "mlp/post_feedforward_layernorm_2": "post_feedforward_layernorm_2",
}


def _gemma4(leaves, tp):
    table = leaves["token_embedder/embedding"]
    embed = _divided(table, math.sqrt(table.shape[1]))
    out = {"language_model.model.embed_tokens.weight": embed, "language_model.lm_head.weight": embed.copy()}
    out["language_model.model.norm.weight"] = leaves["decoder/decoder_norm/scale"].copy()
    for slot in range(6):
        for index, layer in _layers(leaves, f"decoder/scanned_blocks/layers_{slot}/"):
            named = dict(_attention(layer, tp))
            for path, name in _GEMMA4_NORMS.items():
                named[f"{name}.weight"] = layer[f"{path}/scale"].copy()
            named["layer_scalar"] = layer["layer_scalar"].copy()
            shared, routed = "mlp/moe_block/shared_experts", "mlp/moe_block/MoeBlock_0"
            named["mlp.gate_up_proj.weight"] = _joined([layer[f"{shared}/wi_{i}/kernel"] for i in (0, 1)], tp)
            named["mlp.down_proj.weight"] = layer[f"{shared}/wo/kernel"].copy()
            named["router.proj.weight"] = np.ascontiguousarray(layer[f"{routed}/gate/kernel"].T)
            named["router.scale"] = layer["mlp/pre_forward_scale_2"].copy()
            named["router.per_expert_scale"] = layer[f"{routed}/per_expert_scale"].copy()
            named |= _experts(layer, routed, "experts", tp)
            at = f"language_model.model.layers.{6 * index + slot}"
            out |= {f"{at}.{name}": leaf for name, leaf in named.items()}
    return out


def _layers(leaves, container):
    stacks = {path.removeprefix(container): leaf for path, leaf in leaves.items() if path.startswith(container)}
    for index in range(next(iter(stacks.values())).shape[1]):
        yield index, {path: leaf[:, index] for path, leaf in stacks.items()}


def _attention(layer, tp):
    query, key = layer["self_attention/query/kernel"], layer["self_attention/key/kernel"]
    value = layer.get("self_attention/value/kernel", key)
    if (shared := tp // key.shape[1]) > 1:
        key, value = (np.repeat(part, shared, axis=1) for part in (key, value))
    yield "self_attn.qkv_proj.weight", _joined([query, key, value], tp)
    projection = layer["self_attention/out/kernel"]
    yield "self_attn.o_proj.weight", projection.reshape(-1, projection.shape[-1]).copy()
    yield "self_attn.q_norm.weight", layer["self_attention/query_norm/scale"].copy()
    yield "self_attn.k_norm.weight", layer["self_attention/key_norm/scale"].copy()


def _experts(layer, path, name, tp):
    w13 = _w13(layer[f"{path}/wi_0"], layer[f"{path}/wi_1"], tp)
    return {f"{name}.routed_experts.w13_weight": w13, f"{name}.routed_experts.w2_weight": layer[f"{path}/wo"].copy()}


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


def _divided(table, by):
    out = np.empty(table.shape, np.uint16)
    for start in range(0, len(table), _ROWS):
        wide = table[start : start + _ROWS].view(jnp.bfloat16).astype(np.float32)
        wide *= np.float32(1) / np.float32(by)
        out[start : start + _ROWS] = wide.astype(jnp.bfloat16).view(np.uint16)
    return out


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
