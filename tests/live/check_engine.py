"""A live vLLM engine, booted with random weights and synced, must generate what one does that loaded the checkpoint.

    python tests/live/check_engine.py [CASE ...]      (in an environment made by `.ci/live`; exit code 1 if tokens differ)

The trainer is a real MaxText tree filled with known values. What the other engine loads is written through
`HuggingFace()`, whose every tensor equals MaxText's own export (tests/test_golden.py).
"""

import sys

import cases
from cases import PROMPT

CASES = ("qwen3-0.6b.scan", "qwen3-30b-a3b.scan", "qwen3-30b-a3b.scan.adp2", "qwen3-0.6b-nnx.scan.auto")


def check(name):
    """Boots an engine with random weights, syncs three times, and compares its tokens; whether all were equal."""
    import live_engine

    from portax.integrations import tpu_inference

    with cases.made(name) as case:
        (first, second), tokens = case.params, case.tokens
        llm = cases.engine(name, case.folders[0], load_format="dummy")
        results = [("random weights", live_engine.generate(llm, PROMPT, case.length), None)]
        sync = tpu_inference.weight_sync(llm, case.config, verify=True)
        for params, expected in ((first, tokens[0]), (second, tokens[1]), (first, tokens[0])):
            with tpu_inference.updating(llm):
                report = sync(params)
            results.append((f"sync {report.version}", live_engine.generate(llm, PROMPT, case.length), expected))
        return case.report(results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        import live_engine  # noqa: F401  before JAX is used: it sets up the simulated devices

        cases.leave(0 if check(sys.argv[2]) else 1)
    sys.exit(cases.checks(__file__, CASES, sys.argv[1:]))
