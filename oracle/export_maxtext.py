"""MaxText parameter trees filled with probe() -> MaxText's own Hugging Face export.      (run in the MaxText environment)

usage: python export_maxtext.py --dims dims_dev.json --out GOLDEN --work WORK [--only NAME[.scan|.unscan] ...] [--force]
Writes GOLDEN/<model>.<scan|unscan>/{source,hf,config}.json and WORK/<model>.<scan|unscan>/{config.json,model.safetensors (bf16)}.
"""
import argparse
import copy
import importlib.metadata
import inspect
import json
import os
import sys
import textwrap
import time
import traceback

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import maxtext
from flax import nnx, traverse_util
from maxtext.checkpoint_conversion import to_huggingface as TH
from maxtext.checkpoint_conversion.utils import hf_model_configs as HC, hf_shape as HS, utils as CU
from maxtext.configs import pyconfig
from maxtext.utils import max_logging, model_creation_utils as MC

import digest as D
from probe import probe

MAXTEXT = os.path.dirname(maxtext.__file__) if maxtext.__file__ else list(maxtext.__path__)[0]
for _mod in (max_logging, TH.max_logging, CU.max_logging):
    _mod.log = lambda *a, **k: None
TH.MemoryMonitorTqdm = lambda x, **k: x
TH.gc = type("NoGC", (), {"collect": staticmethod(lambda *a: 0)})      # a collection per tensor is most of the run time

# Every MaxText config attribute that says something about names, shapes, order or values of parameters.
CONFIG_KEYS = """model_name decoder_block scan_layers param_scan_axis inhomogeneous_layer_cycle_interval weight_dtype
base_num_decoder_layers base_emb_dim base_num_query_heads base_num_kv_heads base_mlp_dim base_moe_mlp_dim num_decoder_layers emb_dim
num_query_heads num_kv_heads mlp_dim moe_mlp_dim head_dim vocab_size mlp_activations logits_via_embedding normalize_embedding_logits
global_head_dim global_num_kv_heads share_kv_projections sliding_window_size v_norm_with_scale use_post_attn_norm use_post_ffw_norm
num_kv_shared_layers hidden_size_per_layer_input vocab_size_per_layer_input use_double_wide_mlp num_experts num_experts_per_tok
shared_experts norm_topk_prob first_num_dense_layers interleave_moe_layer_step gdn_conv_kernel_dim gdn_key_head_dim gdn_value_head_dim
gdn_num_key_heads gdn_num_value_heads use_qk_norm use_qk_norm_in_gdn attention_bias mlp_bias fused_qkv fused_mlp attention_type
partial_rotary_factor rope_max_timescale local_rope_max_timescale global_rope_max_timescale normalization_layer_epsilon
final_logits_soft_cap rope_type lora_rank prefuse_moe_weights padded_base_moe_mlp_dim""".split()


def mrope_section(head_dim, proportion):
    """A split of the rotary frequencies in three, for head dims too small for the hub's."""
    half = int(head_dim * proportion) // 2
    return [half - 2 * (half // 3), half // 3, half // 3]


def make_config(name, scan, dims):
    if name.startswith("qwen3.5"):
        dims = dict(dims, mrope_section=mrope_section(dims["head_dim"], 0.25))
    over = dict(dims, model_name=name, scan_layers=scan, override_model_config=True, run_name="golden", base_output_directory="unused",
                dtype="float32", weight_dtype="float32", attention="dot_product", skip_jax_distributed_system=True, hardware="cpu",
                per_device_batch_size=1, max_target_length=32, max_prefill_predict_length=16, enable_checkpointing=False,
                megablox=False, sparse_matmul=False, log_config=False, use_multimodal=False)
    return pyconfig.initialize_pydantic(["", f"{MAXTEXT}/configs/base.yml"] + [f"{k}={v}" for k, v in over.items()])


def parameter_shapes(cfg):
    """{path: (shape, dtype)} of the tree that from_pretrained(..., wrap_with_tunix_adapter=True) builds (the adapter adds 'base')."""
    cfg = MC.verify_and_sync_scan_layers(cfg)
    _, model = MC.create_nnx_abstract_model(cfg, devices=jax.devices()[:1])
    out = {}
    for p, v in nnx.state(model, nnx.Param).flat_state():
        v = v.get_value() if hasattr(v, "get_value") else v.value
        out["/".join(["base", *map(str, p)])] = (tuple(v.shape), str(v.dtype))
    return out


def hub_config(name, c):
    """The model's hub config.json as MaxText ships it, with sizes from the tiny MaxText config c (as its exporter would override them)."""
    d = getattr(HC, name.replace("-", "_").replace(".", "_") + "_dict", None)
    d = copy.deepcopy(d) if d else HC.HF_MODEL_CONFIGS[name].to_dict()
    t = d.get("text_config", d)
    L, V = c.num_decoder_layers, c.vocab_size
    if "layer_types" in t:
        cycle = t["layer_types"][:t["layer_types"].index("full_attention") + 1]
        t["layer_types"] = (cycle * L)[:L]
    t.update(vocab_size=V, hidden_size=c.emb_dim, num_hidden_layers=L, num_attention_heads=c.num_query_heads,
             num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim, intermediate_size=c.mlp_dim, max_position_embeddings=256)
    for k in ("dtype", "torch_dtype"):
        if k in t:
            t[k] = "bfloat16"
    block = str(getattr(c.decoder_block, "value", c.decoder_block))
    if c.num_experts > 1:
        t.update({k: v for k, v in dict(num_experts=c.num_experts, num_local_experts=c.num_experts, top_k_experts=c.num_experts_per_tok,
                  num_experts_per_tok=c.num_experts_per_tok, moe_intermediate_size=c.moe_mlp_dim).items() if k in t})
        t["num_experts"] = c.num_experts
    if block in ("qwen3", "qwen3_moe"):
        d["architectures"] = ["Qwen3ForCausalLM" if block == "qwen3" else "Qwen3MoeForCausalLM"]
        t["max_window_layers"] = L
    if block == "qwen2":
        d["architectures"] = ["Qwen2ForCausalLM"]
        t["max_window_layers"] = L
    if block == "llama2":                   # MaxText's block of Llama 3.1
        d["architectures"] = ["LlamaForCausalLM"]
        for k in ("rope_scaling", "rope_parameters"):       # has to be below max_position_embeddings
            if t.get(k):
                t[k]["original_max_position_embeddings"] = 32
    if block in ("qwen3_5", "qwen3_next"):
        t.update(shared_expert_intermediate_size=c.moe_mlp_dim, linear_key_head_dim=c.gdn_key_head_dim, linear_value_head_dim=c.gdn_value_head_dim,
                 linear_num_key_heads=c.gdn_num_key_heads, linear_num_value_heads=c.gdn_num_value_heads)
    ids = [k for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "audio_token_id", "boi_token_id",
                       "eoi_token_id", "boa_token_id", "eoa_token_id", "eoa_token_index") if k in d]
    d.update({k: V - 1 - i for i, k in enumerate(ids)})
    if block == "qwen3_5":
        t["rope_parameters"]["mrope_section"] = mrope_section(c.head_dim, t["rope_parameters"]["partial_rotary_factor"])
        t.pop("intermediate_size")
        d["vision_config"].update(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=c.emb_dim,
                                  num_position_embeddings=16)
    if block == "gemma3":
        t.update(sliding_window=c.sliding_window_size, query_pre_attn_scalar=c.head_dim)
        d.update({k: V - 1 - i for i, k in enumerate(("image_token_index", "boi_token_index", "eoi_token_index"))}, mm_tokens_per_image=4)
        d["vision_config"].update(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=56)
    if block.startswith("gemma4"):
        t.update(global_head_dim=c.global_head_dim, sliding_window=c.sliding_window_size, vocab_size_per_layer_input=V)
        if t.get("num_global_key_value_heads"):
            t["num_global_key_value_heads"] = c.global_num_kv_heads
        if t.get("hidden_size_per_layer_input"):
            t.update(hidden_size_per_layer_input=c.hidden_size_per_layer_input, num_kv_shared_layers=c.num_kv_shared_layers)
        d["vision_config"].update(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                                  head_dim=16, global_head_dim=16, position_embedding_size=64, default_output_length=4,
                                  standardize=False, use_clipped_linears=False)
    for e in (d, t):
        e.update({k: 1 for k in ("eos_token_id", "bos_token_id") if e.get(k) is not None})
    return d


def exporter_config(d):
    """What MaxText's exporter gets: the to_dict() of the transformers config object of the hub config."""
    import transformers
    t = transformers.CONFIG_MAPPING[d["model_type"]].from_dict(copy.deepcopy(d)).to_dict()
    if d["model_type"] == "qwen3_next":
        t.setdefault("full_attention_interval", d["full_attention_interval"])       # newer transformers drop it, MaxText reads it
    return t


def qwen3_next_shapes(hd):
    """MaxText 0.2.5's QWEN3_NEXT_HF_WEIGHTS_TO_SHAPE lacks its return and takes the value head dim from head_dim: same body, both mended."""
    src = textwrap.dedent(inspect.getsource(HS.QWEN3_NEXT_HF_WEIGHTS_TO_SHAPE))
    src = src.replace("linear_num_value_heads * head_dim", "linear_num_value_heads * config['linear_value_head_dim']")
    src = src.replace('linear_attn.norm.weight": [head_dim]', 'linear_attn.norm.weight": [config["linear_value_head_dim"]]')
    space = dict(vars(HS))
    exec(src.rstrip() + "\n  return mapping\n", space)
    return space["QWEN3_NEXT_HF_WEIGHTS_TO_SHAPE"](hd)


def huggingface_tensors(name, cfg, hd, params):
    """to_huggingface.main without the orbax read and the tokenizer download: {hf name: float32 array}."""
    maps = TH._get_model_mappings(name, cfg.scan_layers, hd, cfg)
    if maps["shape_mapping"] is None:
        maps["shape_mapping"] = qwen3_next_shapes(hd)
    tree = traverse_util.unflatten_dict({tuple(p.split("/")) + ("value",): jax.numpy.asarray(a) for p, a in params.items()})
    state = CU.detect_and_extract_checkpoint(tree)
    keys = [k for k in CU.validate_and_filter_param_map_keys(maps["param_mapping"], set(state)) if "vision_encoder" not in str(k)]
    out = TH._transform_weights_to_full_model(cfg, keys, state, maps["param_mapping"], maps["hook_fn_mapping"], maps["shape_mapping"])
    assert not state, f"MaxText parameters its exporter left over: {sorted(state)}"
    return {k: np.asarray(v) for k, v in out.items()}


def plain(v):
    v = getattr(v, "value", v)
    return v if isinstance(v, (int, float, str, bool, list, type(None))) else str(v)


def one(tree, layout, dims, out, work):
    """A tree named `tree`, of MaxText's model of that name, or of the one that dims names."""
    name, vision = dims.pop("model", tree), dims.pop("vision", {})
    cfg = make_config(name, layout == "scan", dims)
    shapes = parameter_shapes(cfg)
    params = {p: probe(p, s) for p, (s, _) in shapes.items()}
    hub = hub_config(name, cfg)
    hub.get("vision_config", {}).update(vision)
    tensors = huggingface_tensors(name, cfg, exporter_config(hub), params)
    assert all(t.dtype == np.float32 for t in tensors.values())
    tag = f"{tree}.{layout}"
    D.write_json(f"{out}/{tag}/source.json", {
        "model_name": name, "scan_layers": layout == "scan", "maxtext_version": importlib.metadata.version("maxtext"),
        "config": {k: plain(getattr(cfg, k)) for k in CONFIG_KEYS if hasattr(cfg, k)},
        "params": {p: {"shape": list(s), "dtype": d} for p, (s, d) in shapes.items()}})
    bits = {k: D.to_bf16_bits(v) for k, v in tensors.items()}
    D.write_json(f"{out}/{tag}/hf.json", {"architectures": hub["architectures"], "tensors": {
        k: {"shape": list(v.shape), "dtype": "float32", "sha256": D.sha16(v), "sha256_bf16": D.sha16(bits[k])} for k, v in tensors.items()}})
    for d in (f"{out}/{tag}", f"{work}/{tag}"):
        os.makedirs(d, exist_ok=True)
        with open(f"{d}/config.json", "w") as f:
            json.dump(hub, f, indent=1, sort_keys=True)
            f.write("\n")
    D.save_safetensors(f"{work}/{tag}/model.safetensors", bits)
    return f"{len(shapes)} MaxText parameters, {len(tensors)} HF tensors, {hub['architectures'][0]}"


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--dims", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--work", required=True)
    ap.add_argument("--only", nargs="*", default=[])
    ap.add_argument("--force", action="store_true", help="redo trees whose source.json exists")
    A = ap.parse_args()
    bad = 0
    for name, dims in json.load(open(A.dims))["models"].items():
        for layout in dims.pop("layouts", ["scan", "unscan"]):
            tag = f"{name}.{layout}"
            done = os.path.exists(f"{A.out}/{tag}/source.json") and os.path.exists(f"{A.work}/{tag}/model.safetensors")
            if (A.only and not {name, tag} & set(A.only)) or (done and not A.force):
                continue
            t = time.time()
            try:
                print("ok  ", tag, one(name, layout, dict(dims), A.out, A.work), round(time.time() - t, 1), "s", flush=True)
            except Exception as e:
                bad += 1
                print("FAIL", tag, type(e).__name__, str(e)[:300], flush=True)
                traceback.print_exc(limit=-6)
    sys.exit(bad > 0)
