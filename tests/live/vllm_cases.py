"""Small models for stock vLLM on a CPU: a trainer's trees with two sets of weights, the same exported, and what engines say.

vLLM reads the environment when it is imported, so this module is imported first.
"""

import dataclasses
import json
import os
import pathlib

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "JAX_NUM_CPU_DEVICES": "8",
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
        prefix: The module around the language model in the engine's class; None for the family's own.
    """

    golden: str
    trainer: dict
    hub: dict
    prefix: str | None = None

    def converter(self):
        """The converter, for an engine in bfloat16."""
        import portax

        layout = portax.layouts.HuggingFace(dtype="bfloat16")
        return portax.converter_for(trainer_config(self), layout=layout, module_prefix=self.prefix)

    def hub_config(self):
        """The hub's config.json; of a multimodal model, that of its text part."""
        found = json.loads((GOLDEN / self.golden / "config.json").read_text())
        return found.get("text_config", found) | self.hub

    def params(self, seed, dtype="float32"):
        """Random weights of a size that tells in the tokens."""
        import jax.numpy as jnp
        import numpy as np

        random, tree = np.random.default_rng(seed), {}
        for path, leaf in self.converter().expected_tree().items():
            noise = random.standard_normal(leaf.shape)
            scale = 1 + 0.2 * noise if "norm" in path else noise if "embedding" in path else 0.2 * noise
            tree[path] = jnp.asarray(jnp.asarray(scale, "bfloat16"), dtype)  # the same for both dtypes
        return tree


_TIED = {
    "qwen3-tied": Case("qwen3-0.6b.scan", HEADS, HUB_HEADS),
    "qwen2.5": Case("qwen2.5-1.5b.scan", HEADS, HUB_HEADS),
}
_WIDE = {"base_moe_mlp_dim": 48, "moe_mlp_dim": 48}  # experts that are no multiple of 32 wide, which are padded
_MOE = {
    "qwen3-moe": Case("qwen3-30b-a3b.scan", HEADS, HUB_HEADS),
    "qwen3-moe-padded": Case("qwen3-30b-a3b.scan", HEADS | _WIDE, HUB_HEADS | {"moe_intermediate_size": 48}),
}
_TEXT = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "query_pre_attn_scalar": 32}
GEMMA3 = Case("gemma3-4b.scan", HEADS, HUB_HEADS | _TEXT, prefix="")
CASES = {
    "qwen3": Case("qwen3-8b.scan", HEADS, HUB_HEADS),
    "llama3.1": Case("llama3.1-8b.scan", HEADS, HUB_HEADS),
    **_TIED,
    **_MOE,
    "gemma3": GEMMA3,
}
UNREPAIRED = (*_TIED, *_MOE, "gemma3")  # wrong on a CPU without the repairs


def trainer_config(case):
    """The trainer's configuration of a case."""
    return json.loads((GOLDEN / case.golden / "source.json").read_text())["config"] | case.trainer


def spread(params, devices):
    """The same on this many devices, each leaf cut on its first dimension that can be."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    if devices == 1:
        return params
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",))

    def put(leaf):
        cut = next((axis for axis, size in enumerate(leaf.shape) if size % devices == 0), None)
        spec = PartitionSpec() if cut is None else PartitionSpec(*[None] * cut, "fsdp")
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return {path: put(leaf) for path, leaf in params.items()}


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
