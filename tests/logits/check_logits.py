"""MaxText checkpoint -> portax -> safetensors -> transformers: the logits must be those that MaxText itself computed.

    python tests/logits/check_logits.py [CHECKPOINT ...]      (needs requirements.txt beside this; exit code 1 if not)

Every checkpoint under tests/checkpoints comes with tokens and MaxText's own float32 logits for them. Where a config.json can
be derived, the export is made with that one, beside the hub's own.
"""

import contextlib
import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers
import yaml

import portax
from portax.config.shipped import config_path

CHECKPOINTS = pathlib.Path(__file__).parents[1] / "checkpoints"
TOLERANCE = 2e-4  # two frameworks sum float32 products in different orders; a wrong layout is off by 0.1 and more


def hub_configs(folder):
    """The hub's config of this model, and the one that is derived from the trainer's, if one can be."""
    yield "hub's config", json.loads((folder / "hf_config.json").read_text())
    recorded = json.loads((folder / "maxtext_config.json").read_text())
    shipped = yaml.safe_load(config_path(recorded["model_name"]).read_text())  # what is not recorded
    with contextlib.suppress(portax.ConfigError):
        yield "derived", portax.derive_hub_config(shipped | recorded)


def exported(folder, hub, out):
    """The model as transformers loads it."""
    config = json.loads((folder / "maxtext_config.json").read_text())
    converter = portax.converter_for(config, layout=portax.layouts.HuggingFace())
    portax.export(converter, portax.open_checkpoint(folder / "orbax"), out, hub_config=hub)
    model, info = getattr(transformers, hub["architectures"][0]).from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    lost = [name for name in info["missing_keys"] if "vision" not in name]
    if lost or info["unexpected_keys"] or info["mismatched_keys"]:
        raise SystemExit(f"{folder.name}: transformers does not find its tensors: {info}")
    return model.eval()


def check(folder, name, hub):
    """Prints one line; whether the logits are MaxText's."""
    recorded = np.load(folder / "logits.npz")
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        model = exported(folder, hub, pathlib.Path(scratch) / "hub")
        tokens = torch.tensor(recorded["tokens"], dtype=torch.long)
        if hub["tie_word_embeddings"]:  # then MaxText rounds the table to bfloat16 in its forward pass, as the head
            head = model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.bfloat16().float())
        logits = model(tokens).logits.numpy()
    largest = float(np.abs(logits - recorded["logits"]).max())
    same = bool((logits.argmax(-1) == recorded["logits"].argmax(-1)).all())
    good = same and largest <= TOLERANCE
    sys.stdout.write(
        f"{folder.name:22} {name:13} largest difference {largest:.1e}  argmax {'equal' if same else 'DIFFERENT'}"
        f"  {'ok' if good else 'WRONG'}\n"
    )
    return good


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()  # else it warns of a vision tower, which these checkpoints lack
    transformers.utils.logging.disable_progress_bar()
    names = sys.argv[1:] or sorted(path.name for path in CHECKPOINTS.glob("*.scan"))
    folders = [CHECKPOINTS / name for name in names]
    results = [check(folder, name, hub) for folder in folders for name, hub in hub_configs(folder)]
    sys.exit(0 if all(results) else 1)
