"""The made-up trees of the benchmarks, with MaxText's names and shapes; imports nothing but numpy and JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

EMBED = 1024


@dataclasses.dataclass(frozen=True)
class Model:
    """One tree: what it is, its config under MaxText's names, and the shape of every leaf below `base/`."""

    title: str
    config: dict
    shapes: dict[str, tuple[int, ...]]


def _qwen3_moe() -> Model:
    layers, experts, width, heads, kv_heads, head_dim, vocab = 8, 32, 768, 16, 4, 128, 151936
    at = "decoder/layers"
    config = {
        "decoder_block": "qwen3_moe",
        "num_decoder_layers": layers,
        "emb_dim": EMBED,
        "num_query_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "mlp_dim": width,
        "moe_mlp_dim": width,
        "num_experts": experts,
        "vocab_size": vocab,
    }
    shapes = {
        "token_embedder/embedding": (vocab, EMBED),
        "decoder/decoder_norm/scale": (EMBED,),
        "decoder/logits_dense/kernel": (EMBED, vocab),
        f"{at}/pre_self_attention_layer_norm/scale": (EMBED, layers),
        f"{at}/post_self_attention_layer_norm/scale": (EMBED, layers),
        f"{at}/self_attention/query/kernel": (EMBED, layers, heads, head_dim),
        f"{at}/self_attention/key/kernel": (EMBED, layers, kv_heads, head_dim),
        f"{at}/self_attention/value/kernel": (EMBED, layers, kv_heads, head_dim),
        f"{at}/self_attention/out/kernel": (heads, layers, head_dim, EMBED),
        f"{at}/self_attention/query_norm/scale": (head_dim, layers),
        f"{at}/self_attention/key_norm/scale": (head_dim, layers),
        f"{at}/moe_block/gate/kernel": (EMBED, layers, experts),
        f"{at}/moe_block/wi_0": (experts, layers, EMBED, width),
        f"{at}/moe_block/wi_1": (experts, layers, EMBED, width),
        f"{at}/moe_block/wo": (experts, layers, width, EMBED),
    }
    return Model("Qwen3-MoE, 8 layers, 32 experts, D 1024, F 768", config, shapes)


def _gemma4() -> Model:
    """In the older form, a stack for each layer of the cycle: the only one that MaxText's own converter reads."""
    blocks, experts, width, shared, vocab = 2, 32, 704, 2112, 262144
    heads, local, wide = 16, (8, 128), (2, 256)
    config = {
        "decoder_block": "gemma4",
        "num_decoder_layers": 6 * blocks,
        "emb_dim": EMBED,
        "num_query_heads": heads,
        "num_kv_heads": local[0],
        "head_dim": local[1],
        "global_num_kv_heads": wide[0],
        "global_head_dim": wide[1],
        "share_kv_projections": True,
        "mlp_dim": shared,
        "moe_mlp_dim": width,
        "num_experts": experts,
        "shared_experts": 1,
        "vocab_size": vocab,
        "logits_via_embedding": True,
    }
    shapes = {"token_embedder/embedding": (vocab, EMBED), "decoder/decoder_norm/scale": (EMBED,)}
    for slot in range(6):
        kv_heads, head_dim = wide if slot == 5 else local
        layer = {
            "layer_scalar": (1, blocks),
            "self_attention/query/kernel": (EMBED, blocks, heads, head_dim),
            "self_attention/key/kernel": (EMBED, blocks, kv_heads, head_dim),
            "self_attention/out/kernel": (heads, blocks, head_dim, EMBED),
            "self_attention/query_norm/scale": (head_dim, blocks),
            "self_attention/key_norm/scale": (head_dim, blocks),
            "mlp/pre_forward_scale_2": (EMBED, blocks),
            "mlp/moe_block/MoeBlock_0/gate/kernel": (EMBED, blocks, experts),
            "mlp/moe_block/MoeBlock_0/per_expert_scale": (experts, blocks),
            "mlp/moe_block/MoeBlock_0/wi_0": (experts, blocks, EMBED, width),
            "mlp/moe_block/MoeBlock_0/wi_1": (experts, blocks, EMBED, width),
            "mlp/moe_block/MoeBlock_0/wo": (experts, blocks, width, EMBED),
            "mlp/moe_block/shared_experts/wi_0/kernel": (EMBED, blocks, shared),
            "mlp/moe_block/shared_experts/wi_1/kernel": (EMBED, blocks, shared),
            "mlp/moe_block/shared_experts/wo/kernel": (shared, blocks, EMBED),
        }
        if slot < 5:
            layer["self_attention/value/kernel"] = (EMBED, blocks, kv_heads, head_dim)
        for norm in ("pre_self_attention", "post_self_attention", "pre_ffw", "post_ffw"):
            layer[f"{norm}_norm/scale"] = (EMBED, blocks)
        for norm in ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"):
            layer[f"mlp/{norm}/scale"] = (EMBED, blocks)
        shapes |= {f"decoder/scanned_blocks/layers_{slot}/{path}": shape for path, shape in layer.items()}
    return Model("Gemma4 26B's kinds of layer, 12 layers, 32 experts, D 1024, F 704", config, shapes)


MODELS = {"qwen3-moe": _qwen3_moe(), "gemma4": _gemma4()}


def random_tree(model: Model, devices: list | None = None) -> dict:
    """The parameters in bfloat16, every matrix cut over all devices on its embed axis, as an fsdp mesh does."""
    mesh, values = Mesh(np.array(devices or jax.devices()), ("fsdp",)), np.random.default_rng(0)
    tree: dict = {}
    for path, shape in model.shapes.items():
        # bfloat16 numbers below 2, none so small that XLA takes it, or a fraction of it, for zero
        bits = values.integers(0x0800, 0x4000, shape, np.uint16)
        cut = shape.index(EMBED) if len(shape) > 1 and EMBED in shape else None
        spec = PartitionSpec(*("fsdp" if axis == cut else None for axis in range(len(shape))))
        node = tree
        for part in ("base", *path.split("/")[:-1]):
            node = node.setdefault(part, {})
        node[path.rpartition("/")[2]] = jax.device_put(bits.view(jnp.bfloat16), NamedSharding(mesh, spec))
    return tree
