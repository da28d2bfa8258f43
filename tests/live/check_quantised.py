"""A live quantised engine, synced, must hold and generate what one does that loaded the checkpoint, leaf by leaf, bit by bit.

    python tests/live/check_quantised.py [CASE ...]     (in an environment made by `.ci/live`; exit code 1 if anything differs)

A case is a tree and how its engine quantises. `online`: a bfloat16 checkpoint, whose linears the engine quantises while it
loads. A recipe: an fp8 checkpoint, written by `portax.export`; the engine dequantises and quantises it again.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import cases
from cases import GOLDEN, PROMPT, TP

ONLINE = {"BF16_LINEAR_REQUANTIZE_PATTERNS": "re:.*"}
CASES = {
    "qwen3-0.6b.scan online": {"environment": ONLINE, "recipe": None},
    "qwen3-30b-a3b-fp8.scan fp8-block": {"environment": {}, "recipe": "fp8-block"},
}
WEIGHTS = ("first", "second")


@dataclasses.dataclass(frozen=True)
class Held:
    """An engine's trainer-owned leaves, by digest, and what it generates."""

    leaves: dict
    tokens: list

    def unlike(self, other):
        """Names of the leaves that differ."""
        return sorted(name for name in self.leaves | other.leaves if self.leaves.get(name) != other.leaves.get(name))


def config_and_weights(name):
    """The trainer's configuration, and two trees of known values."""
    import numpy as np

    from portax.testing.golden import Tree

    tree = Tree.load(GOLDEN / name.split()[0] / "source.json")
    first = {path: np.tanh(leaf) * np.float32(0.25) for path, leaf in tree.fill().items()}
    return tree.config, (first, {path: np.flip(leaf).copy() for path, leaf in first.items()})


def write(name, work):
    """Exports both trees, as checkpoints that the engine loads."""
    import jax.numpy as jnp

    import portax

    config, weights = config_and_weights(name)
    layout = portax.layouts.HuggingFace(dtype=jnp.bfloat16, quantization=CASES[name]["recipe"])
    hub_config = json.loads((GOLDEN / name.split()[0] / "config.json").read_text())
    for which, params in zip(WEIGHTS, weights, strict=True):
        portax.export(portax.converter_for(config, layout=layout), params, work / which, hub_config=hub_config)


def boot(name, folder):
    """A live engine over a checkpoint."""
    os.environ.update(CASES[name]["environment"])  # which the engine reads while it loads
    import live_engine

    return live_engine.make(folder, TP)


def held(name, llm, names=None):
    """What an engine holds under these names (None: all), and generates."""
    import live_engine

    from portax.integrations import tpu_inference
    from portax.sync.engine_state import EngineState
    from portax.testing.golden import digest

    leaves = EngineState(tpu_inference.engine_state(llm)).leaves()
    return Held(
        {leaf: digest(leaves[leaf]) for leaf in (leaves if names is None else names)},
        live_engine.generate(llm, PROMPT, cases.length(name)),
    )


def load(name, work, which):
    """Writes down what an engine holds that loaded a checkpoint."""
    (work / f"{which}.json").write_text(json.dumps(dataclasses.asdict(held(name, boot(name, work / which)))))
    return True


def check(name, work):
    """Whether an engine over the second weights becomes what one over the first is, by a sync, and back again."""
    from portax.integrations import tpu_inference

    loaded = {which: Held(**json.loads((work / f"{which}.json").read_text())) for which in WEIGHTS}
    config, weights = config_and_weights(name)
    llm = boot(name, work / "second")
    sync = tpu_inference.weight_sync(llm, config, recipe=CASES[name]["recipe"], verify=True)
    before = sync.verify(weights[1])
    sys.stdout.write(f"{name}: before the first sync, with what it loaded itself: {before}\n")
    good = [not before.different, loaded["first"].tokens != loaded["second"].tokens]
    planned = [entry.name for entry in sync.plan.entries]
    for which, params in zip((*WEIGHTS, "first"), (*weights, weights[0]), strict=True):
        with tpu_inference.updating(llm):
            report = sync(params)
        now, cold = held(name, llm, planned), loaded[which]
        cold = dataclasses.replace(cold, leaves={leaf: cold.leaves.get(leaf) for leaf in planned})
        different = now.unlike(cold)
        good += [not different, now.tokens == cold.tokens]
        told = (
            f"{len(different)} of {len(planned)} leaves differ {different[:3]}; tokens {now.tokens}, cold {cold.tokens}"
        )
        sys.stdout.write(f"{name}: sync {report.version}, {which} weights: {told}\n")
    return all(good)


def whole(name):
    """Runs the parts of a case, each in a process of its own, because engines cannot be taken down; whether all passed."""
    with tempfile.TemporaryDirectory() as work:
        parts = (["--write"], *(["--load", which] for which in WEIGHTS), ["--check"])
        commands = ([sys.executable, "-W", "ignore", __file__, part, name, work, *rest] for part, *rest in parts)
        return all(subprocess.run(command, check=False).returncode == 0 for command in commands)


if __name__ == "__main__":
    if sys.argv[1:2] in (["--load"], ["--check"]):
        import live_engine  # noqa: F401  before JAX is used: it sets up the simulated devices
    if sys.argv[1:2] in (["--write"], ["--load"], ["--check"]):
        part, name, work, *which = sys.argv[1:]
        done = {"--write": write, "--load": load, "--check": check}[part](name, pathlib.Path(work), *which)
        cases.leave(1 if done is False else 0)
    passed = [whole(name) for name in sys.argv[1:] or CASES]
    sys.exit(0 if all(passed) else 1)
