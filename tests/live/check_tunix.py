"""Tunix's sampler with portax's `update_params` must generate what an engine does that loaded the checkpoint.

    python tests/live/check_tunix.py [CHECK ...]       (in an environment made by `.ci/live`; exit code 1 if tokens differ)

Trainer and engine are on different devices; updates run under the transfer guards of Tunix's `RLCluster.sync_weights`.
"""

import contextlib
import sys

import cases
from cases import PROMPT, TP

CHECKS = {"batch": ("qwen3-0.6b.scan", False), "server": ("qwen3-30b-a3b.scan", True)}
ENGINE = {
    "max_num_batched_tokens": 128,
    "max_num_seqs": 4,
    "dtype": "bfloat16",
    "skip_tokenizer_init": True,
    "seed": 0,
    "enforce_eager": True,
    "num_gpu_blocks_override": 16,
}


class Numbers:
    """A tokenizer of texts such as `1 2 3`."""

    def __init__(self, vocab_size):
        self._last = vocab_size - 1

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def bos_id(self):
        return 0

    def pad_id(self):
        return 0

    def eos_id(self):
        return self._last


def text():
    """The prompt, for `Numbers`."""
    return " ".join(map(str, PROMPT))


def on_trainer(params):
    """A state as Tunix passes it: nnx variables of arrays on the trainer's devices."""
    import jax
    import numpy as np
    from flax import nnx, traverse_util
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    place = NamedSharding(Mesh(np.array(jax.devices()[4:]), ("fsdp",)), PartitionSpec())
    leaves = {path: nnx.Param(jax.device_put(leaf, place)) for path, leaf in params.items()}
    return nnx.State(traverse_util.unflatten_dict(leaves, sep="/"))


def check(name):
    """Updates a sampler three times, and compares its tokens; whether all were equal."""
    import cpu_kernels
    import jax
    import numpy as np
    from flax import nnx
    from tunix.generate.vllm_sampler import VllmConfig

    import portax
    from portax.integrations.tunix import VllmSampler

    model, server_mode = CHECKS[name]
    with cases.made(model) as case:
        (first, second), tokens = case.params, case.tokens
        cpu_kernels.install()
        config = VllmConfig(
            mesh=jax.sharding.Mesh(np.array(jax.devices()[:TP]), ("model",)),
            hbm_utilization=0.05,
            server_mode=server_mode,
            engine_kwargs=dict(model=str(case.folders[0]), max_model_len=128, **ENGINE),
        )
        sampler = VllmSampler(Numbers(case.config["vocab_size"]), config, case.config, verify=True)

        def generated():
            return sampler(text(), case.length).tokens[0].tolist()

        results = [("random weights", generated(), None)]
        for params, expected in ((first, tokens[0]), (second, tokens[1]), (first, tokens[0])):
            state = on_trainer(params)
            with (
                jax.transfer_guard_device_to_host("disallow_explicit"),
                jax.transfer_guard_host_to_device("disallow_explicit"),
            ):
                sampler.update_params(state, (nnx.Param,))
            results.append((f"{name}, update {sampler.report.version}", generated(), expected))
            with contextlib.suppress(portax.SyncError):  # refused, and the engine goes on
                sampler.update_params(state, (nnx.LoRAParam,))
                return False
        return case.report(results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        import live_engine  # noqa: F401  before JAX is used: it sets up the simulated devices

        cases.leave(0 if check(sys.argv[2]) else 1)
    sys.exit(cases.checks(__file__, CHECKS, sys.argv[1:]))
