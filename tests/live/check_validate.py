"""The engine of `portax validate --engine vllm`, given an `LLM` that runs on simulated devices, must generate MaxText's tokens,
as far as it repeats itself.

    python tests/live/check_validate.py      (in an environment made by `.ci/live`; exit code 1 if they differ)

`tests/logits/check_tokens.py` does the same, and more, with transformers.
"""

import dataclasses
import pathlib
import shutil
import sys
import tempfile

import cases

sys.path.insert(0, str(cases.ROOT / "tests" / "logits"))
BFLOAT16 = 0.5  # what the engine computes in bfloat16 decides nothing where MaxText's margin is larger


def check():
    """Whether an engine with random weights, synced by `Vllm`, generates what MaxText does."""
    import live_engine  # before JAX is used: it sets up the simulated devices
    from check_tokens import CHECKPOINTS, DENSE, recorded, report

    from portax.integrations.vllm import Vllm
    from portax.validation import session

    hub, greedy = recorded(DENSE)
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(CHECKPOINTS / DENSE / "hf_config.json", pathlib.Path(scratch) / "config.json")
        llm = live_engine.make(scratch, cases.TP, load_format="dummy")
    good = []
    for expected in greedy:
        repeated = expected["margins"][: cases.length(DENSE)]
        length = next((i for i, margin in enumerate(repeated) if margin < BFLOAT16), len(repeated))
        clear = {key: expected[key][:length] for key in ("tokens", "margins")}
        job = session.prepare(CHECKPOINTS / DENSE / "orbax", hub, expected["prompt"], max_new_tokens=length)
        done = session.carry_out(job, Vllm(llm))
        good.append(report("vllm", dataclasses.asdict(done), clear, BFLOAT16))
    sys.stdout.write(f"{done}\n")
    return all(good)


if __name__ == "__main__":
    cases.leave(0 if check() else 1)
