"""MaxText's own model in a real tpu-inference worker, booted with random weights and synced, holds what a loaded one does.

    python tests/live/check_maxtext_vllm.py [CASE ...]     (in an environment made by `.ci/live`; exit code 1 if it differs)

A case is a trainer's tree and the sizes of the engine, as in the name of a golden. The tree is scanned; what the other
worker loads is the same, unrolled and written by Orbax, fused, padded and repeated by MaxText's own loader.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import cases

sys.path.insert(0, str(cases.ROOT / "oracle"))

CASES = (
    "qwen3-30b-a3b.scan.tp2",
    "qwen3-30b-a3b.scan.tp4.adp2",
    "qwen3.5-35b-a3b.scan.tp2",
    "qwen3.5-35b-a3b.scan.tp1.ep4",
)


def booted(name, work, load_format):
    """A worker's runner over the case's model."""
    import run_maxtext_in_vllm as oracle

    tag, tp, adp, ep = re.fullmatch(r"(.*scan)\.tp(\d+)(?:\.adp(\d+))?(?:\.ep(\d+))?", name).groups()
    job = oracle.Job(tag, int(tp), int(adp or 1), int(ep or 1))
    dims = json.loads((cases.ROOT / "oracle" / "dims_dev.json").read_text())["models"][tag.rsplit(".", 1)[0]]
    oracle.import_engine()
    if load_format == "auto":
        oracle.save_checkpoint(str(cases.GOLDEN), work, tag)
    return oracle.load_runner(str(cases.GOLDEN), work, job, dims, load_format), tag


def held(runner):
    """Digest of each leaf of the trainer's."""
    import run_maxtext_in_vllm as oracle

    from portax.testing.golden import digest

    return {name: digest(leaf) for name, kind, leaf in oracle.named_leaves(runner.state) if kind in oracle.TRAINED}


def load(name, work):
    """Writes down what a worker holds that loaded the checkpoint."""
    runner, _ = booted(name, work, "auto")
    (pathlib.Path(work) / "held.json").write_text(json.dumps(held(runner)))
    return True


def sync(name, work):
    """Whether a worker with random weights holds the same after a sync, and its step functions see it."""
    import jax

    from portax.integrations import tpu_inference
    from portax.testing.golden import Tree

    expected = json.loads((pathlib.Path(work) / "held.json").read_text())
    runner, tag = booted(name, work, "dummy")
    tree = Tree.load(cases.GOLDEN / tag / "source.json")
    weight_sync = tpu_inference.weight_sync(runner, tree.config, verify=True)
    params = tree.fill()
    different = [differing(held(runner), expected)]
    for values in ({path: -leaf for path, leaf in params.items()}, params):
        weight_sync(values)
        runner.refresh_state_leaves()
        different.append(differing(held(runner), expected))
    stepped = {id(leaf) for leaf in jax.tree.leaves(runner.state_leaves)}
    stale = sum(id(leaf) not in stepped for _, _, leaf in _named(runner))
    sys.stdout.write(
        f"{name}  {len(expected)} leaves; unlike the loaded ones: {different[0]} as booted, {different[1]} with other "
        f"values, {different[2]} synced; {stale} unseen by the step functions\n"
    )
    return different[0] > 0 and different[1] > 0 and different[2] == stale == 0


def _named(runner):
    import run_maxtext_in_vllm as oracle

    return [leaf for leaf in oracle.named_leaves(runner.state) if leaf[1] in oracle.TRAINED]


def differing(found, expected):
    """How many leaves of either differ."""
    return sum(found.get(name) != expected.get(name) for name in {*found, *expected})


def check(name):
    """Both, each in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        steps = [[sys.executable, "-W", "ignore", __file__, f"--{step}", name, work] for step in ("load", "sync")]
        return all(subprocess.run(step, check=False).returncode == 0 for step in steps)


if __name__ == "__main__":
    os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
    if sys.argv[1:2] in (["--load"], ["--sync"]):
        cases.leave(0 if globals()[sys.argv[1].removeprefix("--")](*sys.argv[2:]) else 1)
    results = {name: check(name) for name in sys.argv[1:] or CASES}
    sys.exit(0 if all(results.values()) else 1)
