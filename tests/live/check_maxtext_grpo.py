"""Tunix's `RLCluster` with MaxText's model on both sides: one GRPO step, and the rollout generates by the new weights.

    python tests/live/check_maxtext_grpo.py        (in an environment made by `.ci/live`; exit code 1 if tokens differ)

The engine boots with random weights, as MaxText's RL trainer starts it, and gets the actor's through portax. What it generates
after the step must be what an engine generates that loads the trained weights itself, from a checkpoint written by Orbax.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import cases
from cases import PROMPT, TP

sys.path.insert(0, str(cases.ROOT / "oracle"))

NAME = "qwen3-30b-a3b"
MODEL = f"{NAME}.scan"
OPTIONS = {
    "max_num_batched_tokens": 128,
    "max_num_seqs": 4,
    "dtype": "bfloat16",
    "skip_tokenizer_init": True,
    "seed": 0,
    "enforce_eager": True,
    "num_gpu_blocks_override": 16,
    "hf_overrides": {"architectures": ["MaxTextForCausalLM"]},
}


def sizes():
    """MaxText's options for a model of the golden's size."""
    return json.loads((cases.ROOT / "oracle" / "dims_dev.json").read_text())["models"][NAME] | {"model_name": NAME}


def told(**options):
    """What the engine's MaxText is told."""
    return {"maxtext_config": {**sizes(), "override_model_config": True, "log_config": False, **options}}


def boot():
    """What has to be done before an engine with MaxText's model is made."""
    os.environ.update(MODEL_IMPL_TYPE="auto", NEW_MODEL_DESIGN="1")
    import live_engine
    import maxtext.integration.vllm.maxtext_vllm_adapter as adapter

    adapter.register()
    live_engine.cpu_kernels.install()


def train(work):
    """Trains for one step; writes down the trained weights, and what the rollout generates before and after."""
    boot()
    import jax
    import numpy as np
    import optax
    from check_maxtext import fill
    from check_tunix import Numbers, text
    from flax import nnx
    from jax.sharding import Mesh
    from maxtext.configs import pyconfig
    from maxtext.utils import maxtext_utils, model_creation_utils
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout.base_rollout import RolloutConfig

    from portax.integrations.tunix import MaxTextVllmRollout
    from portax.testing.golden import Tree

    config = pyconfig.initialize(
        cases.maxtext_arguments(sizes() | {"scan_layers": True, "run_name": "live", "ici_fsdp_parallelism": 8})
    )
    trainer = Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    actor = model_creation_utils.from_pretrained(config, mesh=trainer, wrap_with_tunix_adapter=True, tokenizer_pad_id=0)
    tree = Tree.load(cases.GOLDEN / MODEL / "source.json").fill()
    fill(actor, {path: np.tanh(leaf) * np.float32(0.25) for path, leaf in tree.items()})
    rollout = RolloutConfig(
        max_tokens_to_generate=8,
        max_prompt_length=len(PROMPT),
        kv_cache_size=128,
        temperature=1.0,
        rollout_vllm_model_version=str(hub_folder(work)),
        rollout_vllm_hbm_utilization=0.05,
        rollout_vllm_tpu_backend_type="maxtext",
        rollout_vllm_additional_config=told(),
        rollout_vllm_kwargs=OPTIONS,
    )
    numbers = Numbers(config.vocab_size)
    role = rl_cluster.Role
    cluster = rl_cluster.RLCluster(
        actor=actor,
        tokenizer=numbers,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role.ACTOR: trainer, role.ROLLOUT: Mesh(np.array(jax.devices()[:TP]), ("model",))},
            rollout_engine=functools.partial(MaxTextVllmRollout, maxtext_config=config),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.sgd(10.0), eval_every_n_steps=10, max_steps=1, mini_batch_size=1
            ),
            rollout_config=rollout,
        ),
    )

    def generated():
        greedy = dataclasses.replace(rollout, temperature=0.0, max_tokens_to_generate=cases.length(MODEL))
        return cluster.rollout.generate([text()], greedy).tokens[0].tolist()

    def reward(completions, **_):
        return [float(sum(map(int, completion.split()))) for completion in completions]

    before = generated()
    learner = GRPOLearner(cluster, reward_fns=reward, algo_config=GRPOConfig(num_generations=2, beta=0.0))
    learner.train([{"prompts": np.array([text()])}])
    report = cluster.rollout.sampler.report
    state = nnx.state(cluster.actor_trainer.model, nnx.Param)
    trained = {
        "/".join(("base", *(str(part) for part in path if part != "base"))): np.asarray(variable.get_value())
        for path, variable in state.flat_state()
    }
    np.savez(pathlib.Path(work) / "trained.npz", **trained)
    moved = sum(not np.array_equal(trained[path], np.tanh(leaf) * np.float32(0.25)) for path, leaf in tree.items())
    found = {"before": before, "after": generated(), "version": report.version, "moved": moved, "of": len(tree)}
    (pathlib.Path(work) / "rollout.json").write_text(json.dumps(found))
    return True


def hub_folder(work):
    """A folder with nothing but the model's config.json."""
    folder = pathlib.Path(work) / "hub"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((cases.GOLDEN / MODEL / "config.json").read_text())
    return folder


def load(work):
    """Whether an engine that loads the trained weights generates the same, and those before the step do not."""
    boot()
    import live_engine
    import numpy as np
    import orbax.checkpoint as ocp
    import run_maxtext_in_vllm as oracle
    from flax import traverse_util
    from vllm import LLM

    found = json.loads((pathlib.Path(work) / "rollout.json").read_text())
    leaves = oracle.unrolled(dict(np.load(pathlib.Path(work) / "trained.npz")))
    tree = traverse_util.unflatten_dict({(*path.split("/"), "value"): leaf for path, leaf in leaves.items()})
    checkpoint = pathlib.Path(work) / "orbax"
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)).save(checkpoint, tree)
    llm = LLM(
        model=str(hub_folder(work)),
        tensor_parallel_size=TP,
        max_model_len=128,
        gpu_memory_utilization=0.05,
        additional_config={
            **told(load_parameters_path=str(checkpoint), prefuse_moe_weights=True, enable_checkpointing=False),
            "sharding": {"sharding_strategy": {"device_indexes": list(range(TP))}},
        },
        **OPTIONS,
    )
    tokens = live_engine.generate(llm, PROMPT, cases.length(MODEL))
    sys.stdout.write(
        f"{MODEL}  {found['moved']} of {found['of']} leaves moved in one GRPO step; {found['version']} syncs; generated "
        f"{found['before']} before it, {found['after']} after it, {tokens} by an engine that loaded the trained weights\n"
    )
    return found["moved"] > 0 and found["after"] == tokens != found["before"]


def check():
    """Both, each in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        steps = [[sys.executable, "-W", "ignore", __file__, step, work] for step in ("--train", "--load")]
        return all(subprocess.run(step, check=False).returncode == 0 for step in steps)


if __name__ == "__main__":
    os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
    if sys.argv[1:2] in (["--train"], ["--load"]):
        import live_engine  # noqa: F401  before JAX is used: it sets up the simulated devices

        cases.leave(0 if globals()[sys.argv[1].removeprefix("--")](sys.argv[2]) else 1)
    sys.exit(0 if check() else 1)
