"""A trainer's tree with known values, twice, and what engines generate that load the checkpoints which hold the same.

A case is a model at a tensor-parallel size of 2; `.adp2` at its end is attention data parallelism of 2 beside that, `.auto`
the implementation that the engine picks by itself: a native JAX model.
Folders and tokens are kept in $PORTAX_LIVE_WORK, if that is set, so that several checks share them.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
GOLDEN = ROOT / "tests" / "golden"
PROMPT, TP = list(range(1, 40)), 2
sys.path.insert(0, str(ROOT / "oracle" / "live"))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with two sets of weights.

    Attributes:
        name: The case.
        config: The trainer's configuration.
        params: The trainer's flat trees, by paths, of numpy arrays.
        folders: Checkpoints with the same weights.
        tokens: What an engine generates that loaded them.
        length: How many tokens.
    """

    name: str
    config: dict
    params: tuple
    folders: tuple
    tokens: tuple
    length: int

    def report(self, results):
        """Prints what was generated beside what was to be; whether all was equal, and the weights tell in the tokens."""
        for what, got, tokens in results:
            verdict = "" if tokens is None else "equal" if got == tokens else f"not {tokens}"
            sys.stdout.write(f"{self.name}  {what:30} {got}  {verdict}\n")
        others = [got for _, got, tokens in results if tokens is None]
        if silent := len({tuple(tokens) for tokens in (*self.tokens, *others)}) < 2 + len(others):
            sys.stdout.write(f"{self.name}  the weights do not tell in the tokens: this check proves nothing\n")
        return not silent and all(tokens in (None, got) for _, got, tokens in results)


def length(name):
    """How many tokens are compared: as many as an engine on simulated devices repeats.

    With no sync in between, by one set of weights, all of 300 generations with experts began with the same two tokens, and 67
    went on in a rarer way than the rest; of a dense model's, 120 on torchax and 120 by the native JAX model, all began with
    the same three, and 6 and 20 went on in a rarer way. The cause was not sought.
    """
    return 3 if name.startswith("qwen3-0.6b") else 2


def engine(name, folder, **options):
    """A live engine over a checkpoint."""
    import live_engine

    attention_dp = int(name.partition(".adp")[2] or 1)
    options |= {"attention_dp": attention_dp} if attention_dp > 1 else {}
    options |= {"implementation": "auto"} if name.endswith(".auto") else {}
    return live_engine.make(folder, TP * attention_dp, **options)


def maxtext_arguments(options):
    """What MaxText's configuration is read from: a small run on this machine in float32, with these options."""
    import maxtext

    options = {
        "override_model_config": True,
        "base_output_directory": "unused",
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "enable_checkpointing": False,
        "log_config": False,
        "dtype": "float32",
        "weight_dtype": "float32",
        "attention": "dot_product",
        "per_device_batch_size": 1,
        "max_target_length": 32,
        "max_prefill_predict_length": 16,
        **options,
    }
    base = f"{next(iter(maxtext.__path__))}/configs/base.yml"
    return ["", base, *(f"{key}={value}" for key, value in options.items())]


@contextlib.contextmanager
def made(name):
    """The case of this name."""
    import numpy as np

    from portax.testing.golden import Tree

    model = name.partition(".adp")[0].removesuffix(".auto")
    tree = Tree.load(GOLDEN / model / "source.json")
    first = {path: np.tanh(leaf) * np.float32(0.25) for path, leaf in tree.fill().items()}
    second = {path: np.flip(leaf).copy() for path, leaf in first.items()}
    with tempfile.TemporaryDirectory() as scratch:
        work = pathlib.Path(os.environ.get("PORTAX_LIVE_WORK", scratch))
        folders = tuple(work / f"{name}.{which}" for which in ("first", "second"))
        for params, folder in zip((first, second), folders, strict=True):
            if not folder.exists():
                _write_checkpoint(params, tree.config, model, folder)
        tokens = tuple(_loaded(name, folder) for folder in folders)
        yield Case(name, tree.config, (first, second), folders, tokens, length(name))


def _write_checkpoint(params, config, model, folder):
    """A hub checkpoint that any engine loads."""
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import save_file

    import portax

    hub = portax.converter_for(config, layout=portax.layouts.HuggingFace(dtype=jnp.bfloat16)).convert(params)
    folder.mkdir()
    save_file({name: np.asarray(leaf) for name, leaf in hub.items()}, folder / "model.safetensors")
    shutil.copy(GOLDEN / model / "config.json", folder)


def _loaded(name, folder):
    """Tokens of an engine that loads the checkpoint from disk, in a process of its own."""
    tokens = folder / "tokens.json"
    if not tokens.exists():
        subprocess.run([sys.executable, "-W", "ignore", __file__, name, folder], check=True)
    return json.loads(tokens.read_text())


def checks(file, names, arguments):
    """The exit code of a script that checks each name in a process of its own, because engines cannot be taken down."""
    codes = [
        subprocess.run([sys.executable, "-W", "ignore", file, "--check", name], check=False).returncode
        for name in arguments or names
    ]
    return max(codes)


def leave(code):
    """Ends the process, whatever threads an engine still has."""
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    import live_engine

    name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    generated = live_engine.generate(engine(name, folder), PROMPT, length(name))
    (folder / "tokens.json").write_text(json.dumps(generated))
    leave(0)
