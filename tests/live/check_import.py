"""Hub checkpoint -> `portax import` -> MaxText: the logits must be those that MaxText recorded.

    python tests/live/check_import.py [CHECKPOINT ...]     (in an environment made by `.ci/live`; exit code 1 if not)

Each checkpoint under tests/checkpoints is exported to safetensors, imported from there, scanned and not, and loaded both
ways that MaxText has: by `from_pretrained`, which post-training uses, and by `load_params_from_path`.
"""

import json
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")  # MaxText without Google's cloud packages
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cases
import jax
import numpy as np
from flax import nnx
from maxtext.common import checkpointing
from maxtext.configs import pyconfig
from maxtext.utils import model_creation_utils

import portax
from portax.cli.main import main as portax_command

CHECKPOINTS = pathlib.Path(__file__).parents[1] / "checkpoints"
TOLERANCE = 1e-4  # float32, summed in another order by another XLA
SIZES = ["num_decoder_layers", "emb_dim", "num_query_heads", "num_kv_heads", "mlp_dim", "moe_mlp_dim"]
OTHERS = [
    "attention_bias",
    "decoder_block",
    "gdn_conv_kernel_dim",
    "gdn_key_head_dim",
    "gdn_num_key_heads",
    "gdn_num_value_heads",
    "gdn_value_head_dim",
    "global_head_dim",
    "global_num_kv_heads",
    "head_dim",
    "logits_via_embedding",
    "model_name",
    "num_experts",
    "num_experts_per_tok",
    "share_kv_projections",
    "shared_experts",
    "sliding_window_size",
    "vocab_size",
]


def config_of(recorded, path, scanned):
    """MaxText's own configuration; with a path, it loads from there."""
    options = {f"base_{name}": recorded[f"base_{name}"] for name in SIZES} | {name: recorded[name] for name in OTHERS}
    if recorded["decoder_block"] == "qwen3_5":  # a split of the rotary frequencies in three, for so narrow heads
        half = recorded["head_dim"] // 4 // 2
        options["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    options |= {
        **({"load_parameters_path": path} if path else {}),
        "scan_layers": scanned,
        "run_name": "import",
        "megablox": False,
        "sparse_matmul": False,
    }
    return pyconfig.initialize_pydantic(cases.maxtext_arguments(options))


def logits(model, tokens):
    """What a MaxText model makes of tokens: no padding, one segment."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    segments = np.ones(tokens.shape, np.int32)
    return np.asarray(model(tokens, positions, segments, enable_dropout=False))


def made(config):
    """A model, and its parameters from where the config says, if it does."""
    model = model_creation_utils.from_pretrained(config)
    return model[0] if isinstance(model, tuple) else model


def loaded(recorded, path, scanned):
    """The model as each of MaxText's two ways loads it."""
    yield "from_pretrained", made(config_of(recorded, path, scanned))
    model = made(config_of(recorded, None, scanned))
    state = nnx.state(model, nnx.Param)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    nnx.update(model, checkpointing.load_params_from_path(path, shapes, 96))
    yield "load_params_from_path", model


def check(folder):
    """Prints a line for each way; whether all logits are MaxText's."""
    recorded = np.load(folder / "logits.npz")
    config = json.loads((folder / "maxtext_config.json").read_text())
    hub = json.loads((folder / "hf_config.json").read_text())
    converter = portax.converter_for(config, layout=portax.layouts.HuggingFace())
    good = []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        portax.export(converter, portax.open_checkpoint(folder / "orbax"), scratch / "hub", hub_config=hub)
        for form in ("--scanned", "--unscanned"):
            out = scratch / form
            if portax_command(["import", str(scratch / "hub"), form, "--out", str(out)]):
                return False
            path = str(out / "items")
            for way, model in loaded(config, path, form == "--scanned"):
                found = logits(model, recorded["tokens"].astype(np.int32))
                largest = float(np.abs(found - recorded["logits"]).max())
                same = bool((found.argmax(-1) == recorded["logits"].argmax(-1)).all())
                good.append(same and largest <= TOLERANCE)
                sys.stdout.write(
                    f"{folder.name:22} {form[2:]:10} {way:22} largest difference {largest:.1e}  "
                    f"argmax {'equal' if same else 'DIFFERENT'}  {'ok' if good[-1] else 'WRONG'}\n"
                )
    return all(good)


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(path.name for path in CHECKPOINTS.glob("*.scan"))
    results = [check(CHECKPOINTS / name) for name in names]
    sys.exit(0 if all(results) else 1)
