"""Greedy continuations by MaxText itself, of the checkpoints under tests/checkpoints.      (run in the MaxText environment)

usage: python greedy_maxtext.py ../tests/checkpoints [NAME ...]
Loads each checkpoint into MaxText's own model, holds its logits against those recorded in logits.npz, and writes greedy.json: for
each prompt the tokens that follow, each the argmax of a full forward pass over all before it (no cache), and the margins: how far
below it the second best logit was. Of many random prompts of each length that one is kept which tells most: whose continuation is
clear (no margin is small) and varied (a model with tied embeddings likes to repeat its last token whatever its layers do).
"""
import json
import pathlib
import sys

import export_maxtext as E      # sets the environment up before jax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils as MC

LENGTH, PROMPTS, TRIED = 8, (1, 4, 16), 128      # tokens to generate; lengths of prompts; how many of each length are tried
CLEAR = 0.1                          # margin that no rounding of two frameworks reaches
PADDED = 32                          # one shape for all passes, so that one program serves; causal, so what follows is not seen

# What maxtext_config.json records and MaxText derives from the base_* sizes by itself.
DERIVED = {"emb_dim", "num_decoder_layers", "model_name", "rollout_tensor_parallelism"}


def make_config(recorded):
    sizes = {k: v for k, v in recorded.items() if k not in DERIVED}
    sizes = {k: json.dumps(v) if isinstance(v, list) else v for k, v in sizes.items()}
    if recorded["decoder_block"] == "qwen3_5":
        sizes["mrope_section"] = E.mrope_section(recorded["head_dim"], 0.25)
    over = dict(sizes, model_name=recorded["model_name"], override_model_config=True, run_name="greedy", base_output_directory="unused",
                attention="dot_product", skip_jax_distributed_system=True, hardware="cpu", per_device_batch_size=1,
                max_target_length=PADDED, max_prefill_predict_length=PADDED // 2, enable_checkpointing=False, megablox=False,
                sparse_matmul=False, log_config=False, use_multimodal=False)
    return pyconfig.initialize_pydantic(["", f"{E.MAXTEXT}/configs/base.yml"] + [f"{k}={v}" for k, v in over.items()])


def load(folder):
    """MaxText's model with the checkpoint's parameters, as a compiled function from tokens to logits."""
    config = make_config(json.loads((folder / "maxtext_config.json").read_text()))
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    model = MC.from_config(config, mesh=mesh, rngs=nnx.Rngs(0))
    stored = ocp.PyTreeCheckpointer().restore((folder / "orbax").absolute())["base"]
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    for path, variable in params.flat_state():
        leaf = stored
        for part in path:
            leaf = leaf[str(part)]
        leaf = leaf.pop("value")
        if leaf.shape != variable.get_value().shape:
            raise SystemExit(f"{folder.name}: {path} is {leaf.shape} in the checkpoint and {variable.get_value().shape} in the model")
        variable.set_value(jnp.asarray(leaf))
    if left := [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(stored)]:
        raise SystemExit(f"{folder.name}: MaxText's model has no {left}")

    @jax.jit
    def logits(params, rest, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        with mesh:
            return nnx.merge(graph, params, rest)(tokens, positions, jnp.ones_like(tokens), enable_dropout=False)

    return lambda tokens: np.asarray(logits(params, rest, jnp.asarray(tokens, jnp.int32)))


def greedy(logits, prompts):
    """Continuations of prompts of one length, and their margins."""
    end = prompts.shape[1]
    tokens, margins = np.zeros((len(prompts), PADDED), np.int32), []
    tokens[:, :end] = prompts
    for at in range(end, end + LENGTH):
        rows = logits(tokens)[:, at - 1]
        tokens[:, at] = rows.argmax(-1)
        second, best = np.sort(rows)[:, -2:].T
        margins.append(best - second)
    return tokens[:, end:end + LENGTH], np.stack(margins, 1)


def telling(logits, prompts):
    """The prompt whose continuation tells most."""
    tokens, margins = greedy(logits, prompts)
    least = margins.min(1)
    at = max(range(len(prompts)), key=lambda i: (least[i] >= CLEAR, len({*tokens[i].tolist()}), least[i]))
    return {"prompt": prompts[at].tolist(), "tokens": tokens[at].tolist(), "margins": [round(float(m), 6) for m in margins[at]]}


def first_token(hub):
    """Gemma's prompts begin with a <bos>."""
    text = hub.get("text_config", hub)
    return [text["bos_token_id"]] if text["model_type"].startswith("gemma") else []


if __name__ == "__main__":
    root = pathlib.Path(sys.argv[1])
    for name in sys.argv[2:] or sorted(path.name for path in root.iterdir() if path.is_dir()):
        recorded = np.load(root / name / "logits.npz")
        logits = load(root / name)
        difference = float(np.abs(logits(recorded["tokens"]) - recorded["logits"]).max())
        print(f"{name:22} recorded logits within {difference:.1e}", flush=True)
        if difference > 1e-4:
            raise SystemExit(f"{name}: this is not the model whose logits are recorded")
        random, vocabulary = np.random.default_rng(0), recorded["logits"].shape[-1]
        bos = first_token(json.loads((root / name / "hf_config.json").read_text()))
        found = []
        for length in PROMPTS:
            prompts = random.integers(3, vocabulary, (TRIED, length))
            found.append(telling(logits, np.concatenate([np.tile(bos, (TRIED, 1)).astype(int), prompts], 1)))
            print(f"  {found[-1]}", flush=True)
        (root / name / "greedy.json").write_text(json.dumps(found, indent=1) + "\n")
