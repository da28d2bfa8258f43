"""Load the exported checkpoints through the real tpu-inference worker on simulated CPU devices; write digests of the state it holds.

usage: python run_engine.py --golden GOLDEN --work WORK [-j 2] [--only NAME[.scan|.unscan] ...] [--tp 2 8 [--mode ep|fused] [--adp K]] [--npz DIR] [--plan]
Run it with the Python of one engine environment (install_engine.sh): imports once, forks one process per job.
Writes GOLDEN/<model>.<layout>/tpu-inference-<version>.tp<k>[.adp<k>][.ep|.fused].json; jobs whose file exists are skipped. Logs: WORK/logs.
"""
import argparse
import importlib.metadata
import json
import os
import re
import sys
import time
import traceback
from collections import namedtuple

import numpy as np

import digest as D
from probe import probe

# adp: attention data parallel size; 0: a mesh of two axes. flax: the engine's own choice of implementation, which must be flax_nnx
Job = namedtuple("Job", "tag tp mode adp flax", defaults=(0, False))
PACKAGES = ("vllm-tpu", "tpu-inference", "jax", "torchax", "torch", "transformers")
# what an engine before 0.23 is asked for: these architectures, scanned trees, untied Qwen3 only, tp 2 and 8
OLD_ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma4ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")

# what 0.32 is asked for under attention data parallelism, of scanned trees where there are any: (tp, adp, mode)
_ADP = ((4, 2, ""), (8, 2, ""), (8, 4, ""))
ADP = {"qwen3-8b": _ADP, "gemma4-26b": _ADP, "qwen3-30b-a3b": (*_ADP, (4, 1, ""), (4, 4, ""), (4, 2, "ep"), (4, 2, "fused"))}
ADP |= dict.fromkeys(("qwen3-0.6b", "qwen2.5-7b", "qwen3.5-35b-a3b", "qwen3-next-80b-a3b", "gemma4-e2b"), _ADP[:1])

# what 0.32 is asked for when it may pick the implementation, and picks flax_nnx: (tp, mode)
FLAX = {"qwen3-8b-nnx.scan": ((1, ""), (2, ""), (4, ""), (8, "")), "qwen3-0.6b-nnx.scan": ((8, ""),), "qwen2.5-1.5b-nnx.scan": ((4, ""),),
        "llama3.1-8b.scan": ((1, ""), (2, ""), (4, ""), (8, "")), "gemma4-26b-nnx.scan": ((2, ""), (8, ""), (4, "ep")),
        "gemma4-31b-nnx.scan": ((8, ""),)}


def plan(golden, version):
    """Every job for this engine version, read off the checkpoints that are there."""
    for tag in sorted(os.listdir(golden)):
        if not os.path.exists(f"{golden}/{tag}/config.json"):
            continue
        if version.startswith("0.32."):
            yield from (Job(tag, tp, mode, flax=True) for tp, mode in FLAX.get(tag, ()))
        if tag.rsplit(".", 1)[0].endswith("-nnx"):
            continue
        c = json.load(open(f"{golden}/{tag}/config.json"))
        arch, text = c["architectures"][0], c.get("text_config", c)
        scan = tag.endswith(".scan")
        only_unscan = not os.path.exists(f"{golden}/{tag.rsplit('.', 1)[0]}.scan")
        if tuple(int(x) for x in version.split(".")[:2]) < (0, 23):
            tied_qwen3 = arch == "Qwen3ForCausalLM" and text.get("tie_word_embeddings")
            if scan and arch in OLD_ARCHITECTURES and not tied_qwen3:
                yield from (Job(tag, tp, "") for tp in (2, 8))
            continue
        yield from (Job(tag, tp, "") for tp in ((1, 2, 4, 8) if scan or only_unscan else (2, 8)))
        if (text.get("num_experts") or 0) > 1 and scan:
            yield Job(tag, 4, "ep")
            if arch == "Qwen3MoeForCausalLM":
                yield Job(tag, 4, "fused")
        if version.startswith("0.32.") and (scan or only_unscan):
            yield from (Job(tag, tp, mode, adp) for tp, adp, mode in ADP.get(tag.rsplit(".", 1)[0], ()))


def output(golden, job):
    suffix = (f".adp{job.adp}" if job.adp else "") + (f".{job.mode}" if job.mode else "")
    return f"{golden}/{job.tag}/tpu-inference-{'flax-' * job.flax}{VERSION}.tp{job.tp}{suffix}.json"


def setup_environment(job):
    os.environ.update(MODEL_IMPL_TYPE="auto" if job.flax else "vllm", USE_MOE_EP_KERNEL="1" if job.mode == "fused" else "0",
                      NEW_MODEL_DESIGN="1" if job.adp else "0")


def import_engine():
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=8", VLLM_ENABLE_V1_MULTIPROCESSING="0",
                      HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", VLLM_NO_USAGE_STATS="1", SKIP_JAX_PRECOMPILE="1", OMP_NUM_THREADS="1")
    # else tpu_info asks the cloud's metadata server
    for k, v in dict(TPU_ACCELERATOR_TYPE="v6e-8", TPU_WORKER_ID="0", TPU_NAME="golden", VLLM_LOGGING_LEVEL="WARNING").items():
        os.environ.setdefault(k, v)
    import jax  # noqa: F401
    import tpu_inference  # noqa: F401
    import vllm  # noqa: F401
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    import tpu_inference.utils
    from tpu_inference.worker.tpu_worker import TPUWorker  # noqa: F401
    # CPU devices have no memory_stats(): answer (used, limit) per device. The only engine function replaced.
    tpu_inference.utils.hbm_usage_bytes = lambda devices, *a, **k: [(0, 16 << 30) for _ in devices]


def watch_moe_backend(seen):
    """Note the MoE backend the engine itself picks."""
    from tpu_inference.layers.vllm.quantization import unquantized as U
    pick = U.select_moe_backend_from_fused_moe_config

    def noting(moe):
        b = pick(moe)
        seen.add(b.name)
        return b
    U.select_moe_backend_from_fused_moe_config = noting


def old_transformers_view(path, cfg):
    """transformers 5.5 (engines 0.20 and 0.22) does not know the vision tower's rope type of today's hub config: a copy that says default."""
    import transformers
    rope = cfg["vision_config"].get("rope_parameters", {})
    if rope.get("rope_type") != "axial" or tuple(int(x) for x in transformers.__version__.split(".")[:2]) >= (5, 10):
        return path
    rope["rope_type"] = "default"
    view = f"{path}.old_transformers"
    os.makedirs(view, exist_ok=True)
    with open(f"{view}/config.json.tmp{os.getpid()}", "w") as f:
        json.dump(cfg, f)
    os.replace(f.name, f"{view}/config.json")
    for n in ("model.safetensors", "vision.safetensors"):
        if not os.path.islink(f"{view}/{n}"):
            os.symlink(f"{path}/{n}", f"{view}/{n}")
    return view


def checkpoint_dir(work, tag):
    """The checkpoint as the engine gets it: MaxText's export, plus vision tensors where the hub architecture has a vision tower."""
    path = f"{work}/{tag}"
    cfg = json.load(open(f"{path}/config.json"))
    if "vision_config" not in cfg:
        return path, cfg
    import torch
    import transformers
    view = old_transformers_view(path, cfg)
    if not os.path.exists(f"{path}/vision.safetensors"):
        with torch.device("meta"):
            model = getattr(transformers, cfg["architectures"][0])(transformers.AutoConfig.from_pretrained(view))
        shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()
                  if "language_model." not in k and k != "lm_head.weight" and v.dtype.is_floating_point}
        if cfg["architectures"][0].startswith("Gemma3"):    # the hub, MaxText and vLLM say vision_model., transformers 5 no longer does
            shapes = {re.sub(r"^model\.vision_tower\.(?!vision_model\.)", "model.vision_tower.vision_model.", k): s for k, s in shapes.items()}
        D.save_safetensors(f"{path}/vision.safetensors", {k: D.to_bf16_bits(probe(k, s)) for k, s in shapes.items()})
    return view, cfg


def load_state(path, cfg, job):
    from vllm.engine.arg_utils import EngineArgs
    from tpu_inference.worker.tpu_worker import TPUWorker
    # device_indexes: the supported way to fix the device order; it also skips the mesh builder that needs TPU coordinates
    strategy = {"device_indexes": list(range(job.tp))}
    if job.adp > 1:     # 1: the mesh of seven axes, and nothing split; the engine divides by zero if asked for that
        strategy.update(enable_dp_attention=True, attn_dp_size=job.adp)
    kw = dict(model=path, tensor_parallel_size=job.tp, max_model_len=128, max_num_batched_tokens=128, max_num_seqs=4, dtype="bfloat16",
              skip_tokenizer_init=True, enable_expert_parallel=bool(job.mode), seed=0, disable_log_stats=True, enforce_eager=True,
              additional_config={"sharding": {"sharding_strategy": strategy}})
    if "vision_config" in cfg:
        kw.update(limit_mm_per_prompt={"image": 1, "video": 0}, disable_chunked_mm_input=True)
    worker = TPUWorker(vllm_config=EngineArgs(**kw).create_engine_config(), local_rank=0, rank=0, distributed_init_method="",
                       is_driver_worker=True)
    worker.init_device()
    worker.load_model()
    return worker.model_runner


def named_leaves(state, job):
    """(name, array) of every leaf; names of an nnx.State are its paths, joined by dots."""
    if not job.flax:
        return state.items()
    from flax import nnx
    if not isinstance(state, nnx.State):
        raise SystemExit("MODEL_IMPL_TYPE=auto runs this model on torchax, not on flax_nnx")
    return [(".".join(map(str, path)), leaf.get_value()) for path, leaf in state.flat_state()]


def spec_of(sharding, job):
    """Under flax_nnx the engine passes its state through a jit, which rewrites specs to others of the same meaning on this mesh, so axes
    of size 1 and what is replicated at the end are left out."""
    spec = getattr(sharding, "spec", ())
    if job.flax:
        sizes = dict(sharding.mesh.shape) if spec else {}
        spec = [[a for a in ((p,) if isinstance(p, str) else p or ()) if sizes[a] > 1] for p in spec]
        spec = [p[0] if len(p) == 1 else p or None for p in spec]
        while spec and spec[-1] is None:
            spec.pop()
    return D.spec_json(spec)


def run(job, golden, work, npz):
    import jax
    t = time.time()
    setup_environment(job)
    backends = set()
    watch_moe_backend(backends)
    path, cfg = checkpoint_dir(work, job.tag)
    runner = load_state(path, cfg, job)
    if job.flax:
        from flax import nnx
        found = [getattr(m, "moe_backend", None) for _, m in nnx.iter_modules(runner.model)]
        backends |= {b.name for b in found if b is not None}
    leaves, arrays = {}, {}
    for k, v in named_leaves(runner.state, job):
        if jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key):
            continue
        a = np.asarray(v)
        leaves[k] = {"shape": list(a.shape), "dtype": str(v.dtype), "spec": spec_of(v.sharding, job), "sha256": D.sha16(a),
                     "owner": D.owner(k)}
        arrays[k] = a.view(np.uint16) if a.dtype.name == "bfloat16" else a
    out = output(golden, job)
    if npz:
        os.makedirs(npz, exist_ok=True)
        np.savez_compressed(f"{npz}/{job.tag}.{os.path.basename(out)[:-5]}.npz", **arrays)
    D.write_json(out, {"versions": {p: importlib.metadata.version(p) for p in PACKAGES},
                       "mesh": {k: int(v) for k, v in runner.mesh.shape.items()},
                       "moe_backend": "+".join(sorted(backends)) or None, "leaves": leaves,
                       **({"implementation": "flax_nnx"} if job.flax else {})})
    print("DONE", len(leaves), "leaves", round(time.time() - t, 1), "s", flush=True)


def child(job, A):
    rc = 1
    try:
        log = f"{A.work}/logs/{job.tag}.{os.path.basename(output(A.golden, job))[:-5]}.log"
        f = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(f, 1), os.dup2(f, 2)
        run(job, A.golden, A.work, A.npz)
        rc = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(rc)


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--golden", required=True)
    ap.add_argument("--work", required=True)
    ap.add_argument("--npz", help="also write the arrays there, for debugging")
    ap.add_argument("-j", type=int, default=2)
    ap.add_argument("--only", nargs="*", default=[])
    ap.add_argument("--tp", nargs="*", type=int, help="these sizes instead of the plan's, for the tags in --only")
    ap.add_argument("--mode", default="", choices=["", "ep", "fused"], help="with --tp")
    ap.add_argument("--adp", type=int, default=0, help="attention data parallel size, with --tp; what tp is divided by for attention")
    ap.add_argument("--flax", action="store_true", help="with --tp: the implementation that the engine picks itself (MODEL_IMPL_TYPE=auto)")
    ap.add_argument("--plan", action="store_true", help="print the jobs and stop")
    A = ap.parse_args()
    VERSION = importlib.metadata.version("vllm-tpu")
    A.work = os.path.abspath(A.work)
    chosen = lambda tag: not A.only or {tag, tag.rsplit(".", 1)[0]} & set(A.only)
    if A.tp:
        jobs = [Job(tag, tp, A.mode, A.adp, A.flax) for tag in sorted(os.listdir(A.golden)) if chosen(tag) for tp in A.tp]
    else:
        jobs = [j for j in plan(A.golden, VERSION) if chosen(j.tag)]
    todo = [j for j in jobs if not os.path.exists(output(A.golden, j))]
    print(f"engine {VERSION}: {len(jobs)} jobs, {len(todo)} to do", flush=True)
    if A.plan or not todo:
        print("\n".join(map(str, todo)))
        sys.exit()
    os.makedirs(f"{A.work}/logs", exist_ok=True)
    import_engine()
    running, failed = {}, 0
    while todo or running:
        while todo and len(running) < A.j:
            job = todo.pop(0)
            pid = os.fork()
            if pid == 0:
                child(job, A)
            running[pid] = (job, time.time())
        pid, status = os.wait()
        job, t = running.pop(pid)
        failed += status != 0
        print("ok  " if status == 0 else "FAIL", os.path.basename(output(A.golden, job)), job.tag, round(time.time() - t, 1), "s", flush=True)
    sys.exit(failed > 0)
