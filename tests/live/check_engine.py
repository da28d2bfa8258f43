"""A live vLLM engine, booted with random weights and synced, must generate what one does that loaded the checkpoint.

    python tests/live/check_engine.py [CASE ...]      (in an environment made by `.ci/live`; exit code 1 if tokens differ)

A case is a model at a tensor-parallel size of 2; `.adp2` at its end is attention data parallelism of 2 beside that.
The trainer is a real MaxText tree filled with known values. What the other engine loads is written through
`HuggingFace()`, whose every tensor equals MaxText's own export (tests/test_golden.py).
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
GOLDEN = ROOT / "tests" / "golden"
PROMPT, LENGTH, TP = list(range(1, 40)), 8, 2
CASES = ("qwen3-0.6b.scan", "qwen3-30b-a3b.scan", "qwen3-30b-a3b.scan.adp2")


def engine(case, folder, **options):
    """A live engine over a checkpoint."""
    import live_engine

    attention_dp = int(case.partition(".adp")[2] or 1)
    split = {"attention_dp": attention_dp} if attention_dp > 1 else {}
    return live_engine.make(folder, TP * attention_dp, **split, **options)


def write_checkpoint(params, config, model, folder):
    """A hub checkpoint that any engine loads."""
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import save_file

    import portax

    hub = portax.converter_for(config, layout=portax.layouts.HuggingFace(dtype=jnp.bfloat16)).convert(params)
    folder.mkdir()
    save_file({name: np.asarray(leaf) for name, leaf in hub.items()}, folder / "model.safetensors")
    shutil.copy(GOLDEN / model / "config.json", folder)


def loaded(case, folder):
    """Tokens of an engine that loads the checkpoint from disk, in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--load", case, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def load(case, folder):
    """The same, in this process."""
    import live_engine

    sys.stdout.write(json.dumps(live_engine.generate(engine(case, folder), PROMPT, LENGTH)) + "\n")


def check(case):
    """Boots an engine with random weights, syncs twice, and compares its tokens; whether all were equal."""
    import live_engine
    import numpy as np

    from portax.golden import Tree
    from portax.integrations import tpu_inference

    model = case.partition(".adp")[0]
    tree = Tree.load(GOLDEN / model / "source.json")
    first = {path: np.tanh(leaf) * np.float32(0.25) for path, leaf in tree.fill().items()}
    second = {path: np.flip(leaf).copy() for path, leaf in first.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folders = [pathlib.Path(scratch) / name for name in ("first", "second")]
        for params, folder in zip((first, second), folders, strict=True):
            write_checkpoint(params, tree.config, model, folder)
        expected = [loaded(case, folder) for folder in folders]
        llm = engine(case, folders[0], load_format="dummy")
        results = [("random weights", live_engine.generate(llm, PROMPT, LENGTH), None)]
        sync = tpu_inference.weight_sync(llm, tree.config, verify=True)
        for params, tokens in ((first, expected[0]), (second, expected[1]), (first, expected[0])):
            with tpu_inference.updating(llm):
                report = sync(params)
            results.append((f"sync {report.version}", live_engine.generate(llm, PROMPT, LENGTH), tokens))
    equal = all(tokens in (None, got) for _, got, tokens in results)
    distinct = len({tuple(got) for _, got, _ in results}) == 3
    for what, got, tokens in results:
        sys.stdout.write(f"{case}  {what:15} {got}  {'' if tokens is None else 'equal' if got == tokens else tokens}\n")
    if not distinct:
        sys.stdout.write(f"{case}  the weights do not tell in the tokens: this check proves nothing\n")
    return equal and distinct


def main(arguments):
    """Checks each case in a process of its own, because an engine cannot be taken down."""
    sys.path.insert(0, str(ROOT / "oracle" / "live"))
    import live_engine  # noqa: F401  before JAX is used: it sets up the simulated devices

    if arguments[:1] == ["--load"]:
        load(*arguments[1:])
        return 0
    if arguments[:1] == ["--check"]:
        return 0 if check(arguments[1]) else 1
    codes = [
        subprocess.run([sys.executable, "-W", "ignore", __file__, "--check", case], check=False).returncode
        for case in arguments or CASES
    ]
    return max(codes)


if __name__ == "__main__":
    import os

    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # an engine's threads outlive it
