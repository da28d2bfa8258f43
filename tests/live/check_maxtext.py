"""A real MaxText model, trained by Tunix's `RLCluster` or MaxText's own engine, with portax between it and the rollout.

    python tests/live/check_maxtext.py [CHECK ...]     (in an environment made by `.ci/live`; exit code 1 if it differs)

`cluster`: after `RLCluster.sync_weights` a live vLLM engine generates what one does that loaded the checkpoint. `engine`:
what `MaxTextTrainingEngine.prepare_weight_sync` stages is bit for bit what the rollout engine holds (the goldens). The PyPI
Tunix 0.1.7 lacks what that engine imports; the stand-ins for it, and for the transport, hold no values.
"""

import functools
import json
import os
import sys
import types

import cases
from cases import TP

MODEL, NAME = "qwen3-0.6b.scan", "qwen3-0.6b"
CHECKS = ("engine", "cluster")
os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")  # MaxText without Google's cloud packages


def maxtext_config():
    """MaxText's own configuration of the golden's model, on all eight devices."""
    from maxtext.configs import pyconfig

    sizes = json.loads((cases.ROOT / "oracle" / "dims_dev.json").read_text())["models"][NAME]
    options = sizes | {
        "model_name": NAME,
        "scan_layers": True,
        "run_name": "live",
        "ici_fsdp_parallelism": 4,
        "ici_tensor_parallelism": 2,
    }
    return pyconfig.initialize(cases.maxtext_arguments(options))


def fill(model, params):
    """Gives a model these values, placed as its own were; paths with or without the adapter's `base`."""
    import jax
    from flax import nnx

    state = nnx.state(model, nnx.Param)
    for path, variable in state.flat_state():
        leaf = params["/".join(("base", *(str(part) for part in path if part != "base")))]
        variable.set_value(jax.device_put(leaf, variable.get_value().sharding))
    nnx.update(model, state)


def stand_in(name, **contents):
    """A module that the PyPI package lacks."""
    module = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(contents)
    sys.modules[name] = module


class Transport:
    """Notes what it is to send."""

    active = False

    def __init__(self, **_):
        self.bound = []

    def bind(self, weights):
        self.bound.append(dict(weights))

    def metrics(self):
        return {}

    def work_unit_metadata_all(self):
        return [types.SimpleNamespace(variables=list(self.bound[-1]), mesh_axes=())]


def check_engine():
    """Whether MaxText's training engine stages, twice, what tpu-inference holds."""
    import jax
    import numpy as np
    import tunix.sft.utils

    empty = {
        name: type(name, (), {}) for name in ("RLTrainerPayload", "TrainerPayload", "LossOutput", "WeightedMetric")
    }
    for name in ("LossOutput", "WeightedMetric"):
        setattr(tunix.sft.utils, name, empty[name])
    stand_in("tunix.experimental")
    stand_in("tunix.experimental.common")
    stand_in("tunix.experimental.common.datatypes", **empty)
    synchronizer = types.SimpleNamespace(RaidenSynchronizer=Transport)
    stand_in("tunix.experimental.weight_sync", raiden_synchronizer=synchronizer)

    from maxtext.training_engine.maxtext_engine import MaxTextTrainingEngine

    import portax
    from portax.integrations import maxtext
    from portax.testing.golden import Golden, Tree, compare

    config = maxtext_config()
    engine = MaxTextTrainingEngine(config)
    converter = portax.converter_for(config, layout=portax.layouts.TpuInference(version="0.32", tp=TP))
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1, TP), ("data", "model"))
    maxtext.install(engine, converter, mesh)
    params = Tree.load(cases.GOLDEN / MODEL / "source.json").fill()
    golden = Golden.load(cases.GOLDEN / MODEL / f"tpu-inference-0.32.0.tp{TP}.json")
    different = []
    for values in ({path: -leaf for path, leaf in params.items()}, params):
        fill(engine.model, values)
        engine.prepare_weight_sync()
        engine.release_weight_sync()
        rows = compare(engine._raiden_sync.bound[-1], golden)
        different.append(sum(bool(row.difference) for row in rows))
    sys.stdout.write(
        f"{MODEL}  staged leaves: {len(rows)}; unlike the golden: {different[0]} with other values, then {different[1]}\n"
    )
    return different[0] > 0 and different[1] == 0


def check_cluster():
    """Whether the engine behind Tunix's `RLCluster` generates by a real MaxText model's weights, before and after a sync."""
    import cpu_kernels
    import jax
    import numpy as np
    import optax
    from check_tunix import ENGINE, Numbers, text
    from jax.sharding import Mesh
    from maxtext.integration.vllm import maxtext_vllm_rollout
    from maxtext.utils import maxtext_utils, model_creation_utils
    from tunix.rl import rl_cluster
    from tunix.rl.rollout.base_rollout import RolloutConfig

    from portax.integrations.tunix import MaxTextVllmRollout

    config = maxtext_config()
    trainer = Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    model = model_creation_utils.from_pretrained(config, mesh=trainer, wrap_with_tunix_adapter=True, tokenizer_pad_id=0)
    with cases.made(MODEL) as case:
        (first, second), tokens = case.params, case.tokens
        fill(model, first)
        rollout = Mesh(np.array(jax.devices()[:TP]), ("model",))
        rollout_config = RolloutConfig(
            max_tokens_to_generate=case.length,
            kv_cache_size=128,
            temperature=0.0,
            rollout_vllm_model_version=str(case.folders[0]),
            rollout_vllm_hbm_utilization=0.05,
            rollout_vllm_kwargs=ENGINE,
        )
        tokenizer = Numbers(case.config["vocab_size"])
        try:
            maxtext_vllm_rollout.MaxTextVllmRollout(model, tokenizer, rollout, rollout_config, maxtext_config=config)
        except AttributeError as error:
            sys.stdout.write(f"MaxText's own MaxTextVllmRollout: {error}\n")
        cpu_kernels.install()
        cluster = rl_cluster.RLCluster(
            actor=model,
            tokenizer=tokenizer,
            cluster_config=rl_cluster.ClusterConfig(
                role_to_mesh={rl_cluster.Role.ACTOR: trainer, rl_cluster.Role.ROLLOUT: rollout},
                rollout_engine=functools.partial(MaxTextVllmRollout, maxtext_config=config),
                training_config=rl_cluster.RLTrainingConfig(
                    actor_optimizer=optax.sgd(1e-3), eval_every_n_steps=1, max_steps=1
                ),
                rollout_config=rollout_config,
            ),
        )

        def generated():
            return cluster.rollout.generate([text()], rollout_config).tokens[0].tolist()

        results = [("cluster, as made", generated(), tokens[0])]
        for params, expected in ((second, tokens[1]), (first, tokens[0])):
            fill(cluster.actor_trainer.model, params)
            cluster.sync_weights()
            results.append(("cluster, synced", generated(), expected))
        return case.report(results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        import live_engine  # noqa: F401  before JAX is used: it sets up the simulated devices

        cases.leave(0 if globals()[f"check_{sys.argv[2]}"]() else 1)
    sys.exit(cases.checks(__file__, CHECKS, sys.argv[1:]))
