"""Small models for stock vLLM on a CPU: a trainer's trees with two sets of weights, the same exported, and what engines say.

vLLM reads the environment when it is imported, so this module is imported first.
"""

import dataclasses
import json
import os
import pathlib

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "JAX_PLATFORMS": "cpu",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "golden"
PROMPTS = [[1, 5, 9, 33, 120, 7], [199, 3, 77, 18, 150, 4, 4, 9, 61], [8, 90], [17] * 12]

HEADS = {"base_num_query_heads": 4, "num_query_heads": 4, "head_dim": 32}  # its CPU attention has none of 16
HUB_HEADS = {"num_attention_heads": 4, "head_dim": 32}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model at sizes that vLLM's CPU kernels take.

    Attributes:
        golden: Where its configurations come from.
        trainer: What is other in the trainer's.
        hub: What is other in the hub's.
    """

    golden: str
    trainer: dict
    hub: dict

    def converter(self):
        """The converter, for an engine in bfloat16."""
        import portax

        config = json.loads((GOLDEN / self.golden / "source.json").read_text())["config"] | self.trainer
        return portax.converter_for(config, layout=portax.layouts.HuggingFace(dtype="bfloat16"))

    def hub_config(self):
        """The hub's config.json."""
        found = json.loads((GOLDEN / self.golden / "config.json").read_text()) | self.hub
        return {key: value for key, value in found.items() if value is not None}

    def params(self, seed, dtype="float32"):
        """Random weights of a size that tells in the tokens."""
        import jax.numpy as jnp
        import numpy as np

        random, tree = np.random.default_rng(seed), {}
        for path, leaf in self.converter().expected_tree().items():
            noise = random.standard_normal(leaf.shape)
            scale = 1 + 0.2 * noise if "norm" in path else noise if "embedding" in path else 0.2 * noise
            tree[path] = jnp.asarray(scale, dtype)
        return tree


CASES = {
    "qwen3": Case("qwen3-8b.scan", HEADS, HUB_HEADS),
}


def engine(folder, load_format, **options):
    """A small engine in this process."""
    from vllm import LLM

    return LLM(
        str(folder),
        load_format=load_format,
        **{
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "max_model_len": 64,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 2**26,
            "disable_log_stats": True,
            **options,
        },
    )


def synced_engine(folder, **options):
    """The same with random weights, that takes weights from portax."""
    from vllm.config import WeightTransferConfig

    from portax.integrations import vllm

    vllm.register()
    return engine(folder, "dummy", weight_transfer_config=WeightTransferConfig(backend="portax"), **options)


def said(llm):
    """Tokens and their log-probabilities, greedily."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=16, detokenize=False, ignore_eos=True, logprobs=1)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = [each.outputs[0] for each in llm.generate(prompts, greedy, use_tqdm=False)]
    chosen = [
        [float(step[token].logprob) for token, step in zip(each.token_ids, each.logprobs, strict=True)]
        for each in outputs
    ]
    return {"tokens": [list(each.token_ids) for each in outputs], "logprobs": chosen}


def apart(one, other):
    """How far log-probabilities are apart at most; infinite if tokens differ."""
    if one["tokens"] != other["tokens"]:
        return float("inf")
    pairs = zip(one["logprobs"], other["logprobs"], strict=True)
    return max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))
