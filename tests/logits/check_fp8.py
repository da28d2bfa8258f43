"""fp8 export -> transformers: it finds every tensor, dequantises, and computes what the dequantised tensors compute.

    python tests/logits/check_fp8.py     (needs requirements.txt beside this; exit code 1 if anything differs)

Weights are random and of whole tiles. transformers dequantises blocks of 128 x 128 by itself; the model beside it holds the
same checkpoint as `portax.checkpoints.dequantised` reads it, so every weight and every logit has to be equal, bit for bit.
"""

import json
import pathlib
import sys
import tempfile

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

import portax
from portax.checkpoints.dequantised import dequantised

DENSE = {
    "decoder_block": "qwen3",
    "num_decoder_layers": 2,
    "emb_dim": 256,
    "num_query_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "mlp_dim": 384,
    "vocab_size": 512,
    "rope_max_timescale": 1_000_000,
    "normalization_layer_epsilon": 1e-6,
}
MOE = DENSE | {
    "decoder_block": "qwen3_moe",
    "moe_mlp_dim": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
MODELS = {"Qwen3": DENSE, "Qwen3-MoE": MOE}
RECIPES = ("fp8-block", "fp8-block-hf")


def weights(converter):
    """A trainer's tree of random numbers."""
    random = np.random.default_rng(0)
    return {
        path: (random.standard_normal(leaf.shape, np.float32) / np.float32(16)).astype(jnp.bfloat16)
        for path, leaf in converter.expected_tree().items()
    }


def load(folder, hub, **settings):
    """The model as transformers loads it, and what it says of the loading."""
    made = getattr(transformers, hub["architectures"][0])
    model, info = made.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **settings)
    return model.eval(), info


def check(name, config, recipe, folder):
    """Prints one line; whether transformers computes what the dequantised tensors compute."""
    converter = portax.converter_for(config, layout=portax.layouts.HuggingFace(dtype=jnp.bfloat16, quantization=recipe))
    hub = portax.derive_hub_config(config)
    portax.export(converter, weights(converter), folder, hub_config=hub)
    loaded, info = load(folder, hub, quantization_config=transformers.FineGrainedFP8Config(dequantize=True))
    tensors = {path: np.asarray(leaf[...]) for path, leaf in dequantised(portax.open_checkpoint(folder)).items()}
    plain_folder = folder.with_name("plain")
    plain_folder.mkdir()
    save_file(tensors, plain_folder / "model.safetensors", metadata={"format": "pt"})
    (plain_folder / "config.json").write_text(json.dumps(hub))
    plain, _ = load(plain_folder, hub)
    held = loaded.state_dict()
    different = [path for path, value in plain.state_dict().items() if not torch.equal(value, held[path])]
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        farthest = float((loaded(tokens).logits - plain(tokens).logits).abs().max())
    good = not (different or info["missing_keys"] or info["unexpected_keys"] or farthest)
    sys.stdout.write(
        f"{name} {recipe:13} {len(tensors)} tensors, different {different}, missing {info['missing_keys']}, unexpected "
        f"{info['unexpected_keys']}, logits {farthest:.1e} apart  {'ok' if good else 'WRONG'}\n"
    )
    return good


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    results = []
    for model, settings in MODELS.items():
        for one in RECIPES:
            with tempfile.TemporaryDirectory() as scratch:
                results.append(check(model, settings, one, pathlib.Path(scratch) / "hub"))
    sys.exit(0 if all(results) else 1)
