"""A real engine that runs MaxText's own model, booted with random weights and synced, gives the trainer's log-probabilities.

    python tests/live/check_maxtext_logits.py [CASE ...]     (in an environment made by `.ci/live`; exit code 1 if not)

The trainer's are MaxText's own float32 logits, recorded with the checkpoint (tests/checkpoints). A case is a way to start the
engine and to hold experts; one that is known to serve a wrong model has to differ, or the check proves nothing.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import cases

CHECKPOINTS = cases.ROOT / "tests" / "checkpoints"
ROUNDING = {"bfloat16": 0.06, "float32": 0.01}  # 0.03 and 0.003 were seen where the model is right
LENGTHS, TOP = (5, 9, 14, 20), 20


@dataclasses.dataclass(frozen=True)
class Start:
    """How an engine is started, and whether it then serves the right model."""

    tp: int
    expert_parallel: int = 1
    attention_dp: int = 1
    experts: str = "per_shard"
    right: bool = True
    model: str = "qwen3-30b-a3b"
    dtype: str = "bfloat16"

    @property
    def checkpoint(self):
        """The folder of the model."""
        return CHECKPOINTS / f"{self.model}.scan"


CASES = {
    "tp2": Start(2),
    "tp2.adp2": Start(2, attention_dp=2),
    "tp1.ep2": Start(1, 2),
    "tp2.ep2.whole": Start(2, 2, experts="whole"),
    "tp2.ep2.whole.float32": Start(2, 2, experts="whole", dtype="float32"),
    "tp2.ep2.as_loaded": Start(2, 2, experts="as_loaded", right=False),
    # In bfloat16 its eight layers choose other experts where two are almost equal, and differ by 0.3.
    "qwen3.5.tp2.float32": Start(2, model="qwen3.5-35b-a3b", dtype="float32"),
}


def overrides(recorded, dtype):
    """What the engine's MaxText is told of the model: its sizes."""
    kept = [name for name in recorded if name.startswith(("base_", "gdn_"))]
    kept += ["head_dim", "vocab_size", "num_experts", "num_experts_per_tok", "model_name"]
    told = {"override_model_config": True, "prefuse_moe_weights": True, "log_config": False}
    told |= {"dtype": dtype, "weight_dtype": dtype}
    if recorded["decoder_block"] == "qwen3_5":  # sections of the rotated quarter of a head
        half = recorded["head_dim"] // 8
        told["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return {name: recorded[name] for name in kept if name in recorded} | told | {"enable_checkpointing": False}


def engine(start, folder):
    """A live engine with random weights."""
    os.environ["MODEL_IMPL_TYPE"] = "auto"
    import live_engine  # before JAX is used: it sets up the simulated devices
    import maxtext.integration.vllm.maxtext_vllm_adapter as adapter
    from vllm import LLM

    adapter.register()
    live_engine.cpu_kernels.install()
    os.environ["NEW_MODEL_DESIGN"] = "1"
    strategy = {"device_indexes": list(range(start.tp * start.expert_parallel))}
    if start.expert_parallel > 1:
        strategy["expert_parallelism"] = start.expert_parallel
    if start.attention_dp > 1:
        strategy |= {"enable_dp_attention": True, "attn_dp_size": start.attention_dp}
    recorded = json.loads((start.checkpoint / "maxtext_config.json").read_text())
    return LLM(
        model=str(folder),
        tensor_parallel_size=start.tp,
        enable_expert_parallel=start.expert_parallel > 1,
        max_model_len=128,
        max_num_batched_tokens=128,
        max_num_seqs=4,
        dtype=start.dtype,
        skip_tokenizer_init=True,
        seed=0,
        enforce_eager=True,
        gpu_memory_utilization=0.05,
        num_gpu_blocks_override=16,
        enable_prefix_caching=False,
        load_format="dummy",
        hf_overrides={"architectures": ["MaxTextForCausalLM"]},
        additional_config={
            "maxtext_config": overrides(recorded, start.dtype),
            "sharding": {"sharding_strategy": strategy},
        },
    )


def differences(llm, checkpoint):
    """The largest difference of a log-probability after each prompt, over the tokens that the engine names."""
    import numpy as np
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    recorded = np.load(checkpoint / "logits.npz")
    tokens, logits = recorded["tokens"].reshape(-1), recorded["logits"]
    logits = logits.reshape(-1, logits.shape[-1]).astype(np.float64)
    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=TOP, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=tokens[:length].tolist()) for length in LENGTHS]
    found = []
    for length, output in zip(LENGTHS, llm.generate(prompts, sampling, use_tqdm=False), strict=True):
        row = logits[length - 1]
        expected = row - (row.max() + math.log(np.exp(row - row.max()).sum()))
        named = output.outputs[0].logprobs[0]
        found.append(max(abs(value.logprob - expected[token]) for token, value in named.items()))
    return found


def check(name):
    """Whether the engine's log-probabilities are the trainer's; of a wrong model, whether they are not."""
    start = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(start.checkpoint / "hf_config.json", pathlib.Path(folder) / "config.json")
        llm = engine(start, folder)
        import portax
        from portax.integrations import tpu_inference

        before = max(differences(llm, start.checkpoint))
        params = portax.open_checkpoint(start.checkpoint / "orbax")
        config = json.loads((start.checkpoint / "maxtext_config.json").read_text())
        sync = tpu_inference.weight_sync(llm, config, experts=start.experts, params=params, verify=True)
        with tpu_inference.updating(llm):
            sync(params)
        after = differences(llm, start.checkpoint)
    rounding = ROUNDING[start.dtype]
    right = max(after) < rounding
    told = f"{before:.3f} as booted, then {', '.join(f'{value:.3f}' for value in after)}"
    sys.stdout.write(f"{name:21} largest difference of a log-probability: {told}; {'right' if right else 'wrong'}\n")
    return before > 2 * rounding and right == start.right


if __name__ == "__main__":
    os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
    if sys.argv[1:2] == ["--check"]:
        cases.leave(0 if check(sys.argv[2]) else 1)
    runs = {
        name: subprocess.run([sys.executable, "-W", "ignore", __file__, "--check", name], check=False).returncode
        for name in sys.argv[1:] or CASES
    }
    sys.exit(max(runs.values()))
