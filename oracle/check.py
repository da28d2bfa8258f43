"""Check the goldens: predict every trainer-owned leaf from the exported checkpoint with plain numpy and compare shape and digest.

usage: python check.py --golden GOLDEN --work WORK [--version 0.32.0] [-v]          (needs numpy only)
It shares no code with the engine or MaxText; what it knows about the layout is spelled out in predict().
"""
import argparse
import glob
import json
import os
import re
import sys

import numpy as np

import digest as D


def interleave(parts, n, axis=0):
    """[A|B|C] -> [A0 B0 C0 | A1 B1 C1 | ...] along axis."""
    split = [np.split(p, n, axis) for p in parts]
    return np.concatenate([s[i] for i in range(n) for s in split], axis)


def repeat_kv(w, heads, tp):
    """Each kv head tp/heads times, on the rows of an [out, in] weight or on an [out] bias."""
    return w if tp <= heads else np.repeat(w.reshape(heads, -1, *w.shape[1:]), tp // heads, 0).reshape(-1, *w.shape[1:])


def up(x, m):
    return -(-x // m) * m


def pad(w, n, axis=0):
    p = [(0, 0)] * w.ndim
    p[axis] = (0, n - w.shape[axis])
    return np.pad(w, p)


def w13(gate, up_, tp, backend):
    """gate, up [E,I,H] -> [E,H,..] (GMM) or [E,2,H,I] (FUSED_MOE), padded as the kernel wants."""
    E, I, H = gate.shape
    g, u = gate.swapaxes(1, 2), up_.swapaxes(1, 2)
    if backend == "FUSED_MOE":
        return np.stack([pad(pad(x, up(I, 256), 2), up(H, 256), 1) for x in (g, u)], 1)
    n = tp if backend == "GMM_TP" else 1
    c = I // n
    P = up(c, 128)
    shard = lambda x: np.pad(x.reshape(E, H, n, c), ((0, 0), (0, 0), (0, 0), (0, P - c)))
    return np.stack([shard(g), shard(u)], 3).reshape(E, H, 2 * P * n)


def w2(down, backend):
    """down [E,H,I] -> [E,I,H]"""
    d = down.swapaxes(1, 2)
    return pad(pad(d, up(d.shape[1], 256), 1), up(d.shape[2], 256), 2) if backend == "FUSED_MOE" else d


PLAIN = """input_layernorm.weight post_attention_layernorm.weight pre_feedforward_layernorm.weight post_feedforward_layernorm.weight
pre_feedforward_layernorm_2.weight post_feedforward_layernorm_1.weight post_feedforward_layernorm_2.weight post_per_layer_input_norm.weight
layer_scalar router.scale router.per_expert_scale router.proj.weight self_attn.q_norm.weight self_attn.k_norm.weight linear_attn.norm.weight
linear_attn.dt_bias linear_attn.A_log linear_attn.conv1d.weight mlp.shared_expert_gate.weight""".split()


def predict(cfg, hf, tp, moe_tp, backend, version):
    """{leaf: bfloat16 bits}; tp of linears and of experts, which attention data parallelism tells apart. Seen on 0.20, 0.22 and 0.32; where between them a layout changed is not known here."""
    new = version >= (0, 22)                # dense weights stored [in, out], lm_head of a tied model a leaf of its own
    renamed = version >= (0, 23)            # experts.routed_experts.*; Gemma 4's experts and per_expert_scale left "moe."
    routed = "experts.routed_experts." if renamed else "experts."
    T = (lambda w: w.T) if new else (lambda w: w)
    t, arch = cfg.get("text_config", cfg), cfg["architectures"][0]
    multimodal = "text_config" in cfg
    src = "model.language_model." if multimodal else "model."
    top = "vllm_model.language_model." if multimodal else "vllm_model."
    dst = top + "model."
    gemma, gdn = arch.startswith("Gemma4"), "linear_num_key_heads" in t
    rows = up(t["vocab_size"], 64)
    out = {dst + "embed_tokens.weight": pad(hf[src + "embed_tokens.weight"], rows), dst + "norm.weight": hf[src + "norm.weight"]}
    if new or "lm_head.weight" in hf or gemma:
        out[top + "lm_head.weight"] = pad(hf.get("lm_head.weight", hf[src + "embed_tokens.weight"]), rows)
    for n, f in (("embed_tokens_per_layer.weight", lambda w: pad(w, rows)), ("per_layer_model_projection.weight", T),
                 ("per_layer_projection_norm.weight", lambda w: w)):
        if src + n in hf:
            out[dst + n] = f(hf[src + n])
    for i in range(t["num_hidden_layers"]):
        s, d = f"{src}layers.{i}.", f"{dst}layers.{i}."
        has, get = (lambda n: s + n in hf), (lambda n: hf[s + n])
        for n in PLAIN:
            if has(n):
                out[d + n] = get(n)
        if not renamed and has("router.per_expert_scale"):
            out[d + "moe.per_expert_scale"] = out.pop(d + "router.per_expert_scale")
        kv = t["num_key_value_heads"]
        if gemma and t["layer_types"][i] == "full_attention" and t["attention_k_eq_v"]:
            kv = t["num_global_key_value_heads"]
        if has("self_attn.k_proj.weight"):
            q, k = get("self_attn.q_proj.weight"), get("self_attn.k_proj.weight")
            v = get("self_attn.v_proj.weight") if has("self_attn.v_proj.weight") else k
            if new:
                k, v = repeat_kv(k, kv, tp), repeat_kv(v, kv, tp)
            out[d + "self_attn.qkv_proj.weight"] = T(interleave([q, k, v], tp))
            if has("self_attn.q_proj.bias"):                # Qwen2.5: in the same order; seen on 0.32 only
                q, k, v = (get(f"self_attn.{n}_proj.bias") for n in "qkv")
                out[d + "self_attn.qkv_proj.bias"] = interleave([q, repeat_kv(k, kv, tp), repeat_kv(v, kv, tp)], tp)
        elif has("self_attn.q_proj.weight"):                # a layer that shares another layer's kv
            out[d + "self_attn.q_proj.weight"] = T(get("self_attn.q_proj.weight"))
        for n in ("self_attn.o_proj", "linear_attn.out_proj", "per_layer_input_gate", "per_layer_projection"):
            if has(n + ".weight"):
                out[d + n + ".weight"] = T(get(n + ".weight"))
        if has("linear_attn.in_proj_qkv.weight"):           # Qwen3.5: separate tensors
            kd = t["linear_num_key_heads"] * t["linear_key_head_dim"]
            q, k, v = np.split(get("linear_attn.in_proj_qkv.weight"), [kd, 2 * kd])
            out[d + "linear_attn.in_proj_qkvz.weight"] = T(interleave([q, k, v, get("linear_attn.in_proj_z.weight")], tp))
            out[d + "linear_attn.in_proj_ba.weight"] = T(interleave([get("linear_attn.in_proj_b.weight"), get("linear_attn.in_proj_a.weight")], tp))
        elif has("linear_attn.in_proj_qkvz.weight"):        # Qwen3-Next: one tensor, grouped by key head
            for n in ("linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"):
                out[d + n] = T(get(n))
        for m in ("mlp.", "mlp.shared_expert."):
            if has(m + "gate_proj.weight"):
                out[d + m + "gate_up_proj.weight"] = T(interleave([get(m + "gate_proj.weight"), get(m + "up_proj.weight")], tp))
                out[d + m + "down_proj.weight"] = T(get(m + "down_proj.weight"))
        if has("mlp.gate.weight"):
            out[d + "mlp.gate.weight"] = get("mlp.gate.weight") if gdn else T(get("mlp.gate.weight"))
        gate_up = None
        if has("mlp.experts.0.gate_proj.weight"):
            stack = lambda n: np.stack([hf[f"{s}mlp.experts.{e}.{n}.weight"] for e in range(t["num_experts"])])
            at, gate_up, down = "mlp.", (stack("gate_proj"), stack("up_proj")), stack("down_proj")
        for at_, base in (("mlp.", "mlp.experts."), ("" if renamed else "moe.", "experts.")):
            if has(base + "gate_up_proj"):
                at, gate_up, down = at_, np.split(get(base + "gate_up_proj"), 2, 1), get(base + "down_proj")
        if gate_up is not None:
            out[f"{d}{at}{routed}w13_weight"] = w13(*gate_up, moe_tp, backend)
            out[f"{d}{at}{routed}w2_weight"] = w2(down, backend)
    return out


def predict_flax(cfg, hf, tp, backend):
    """As predict, of the engine's native JAX models (flax_nnx). Seen on 0.32."""
    t, arch = cfg.get("text_config", cfg), cfg["architectures"][0]
    llama, gemma = arch.startswith("Llama"), arch.startswith("Gemma4")
    lanes = lambda w, axis: pad(w, w.shape[axis] if w.shape[axis] == 64 else up(w.shape[axis], 128), axis)
    out = {}
    for name, w in hf.items():
        module, _, last = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        layer = int(m[1]) if (m := re.search(r"layers\.(\d+)\.", name)) else None
        wide = gemma and layer is not None and t["layer_types"][layer] == "full_attention"
        dim = t["global_head_dim"] if wide else t["head_dim"]
        if leaf in ("embed_tokens", "lm_head", "embed_tokens_per_layer"):
            w = pad(w, up(len(w), tp if arch.startswith("Qwen3") else 1))
            w = w.T if leaf == "lm_head" else w
            name = {"model.embed_tokens.weight": "model.embed.embedding", "lm_head.weight": "model.lm_head"}[name] if llama else name
        elif leaf in ("q_proj", "k_proj", "v_proj"):
            w = w.reshape(-1, dim, *w.shape[1:])
            if llama:
                w = lanes(np.repeat(w, max(1, tp // len(w)), 0), 1)
            w = np.moveaxis(w, -1, 0) if last == "weight" else w
        elif leaf == "o_proj":
            w = w.reshape(len(w), -1, dim).transpose(1, 2, 0)
            w = lanes(w, 1) if llama else w
        elif leaf in ("gate_proj", "up_proj") and gemma:
            if leaf == "up_proj":
                continue
            name, w = name.replace("gate_proj", "gate_up_proj"), interleave([w, hf[name.replace("gate_proj", "up_proj")]], tp).T
        elif last == "gate_up_proj":
            name, w = f"{module}.kernel_gating_upproj_EDF", w13(*np.split(w, 2, 1), tp, backend)
        elif last == "down_proj":
            name, w = f"{module}.kernel_down_proj_EFD", w2(w, backend)
        elif w.ndim == 2:
            w = w.T
        if llama and name.endswith(".weight"):
            name = f"{module}.{'scale' if w.ndim == 1 else 'kernel'}"
        out[name] = w
    return out


def compare(leaves, pred):
    bad, good = [], 0
    for k, e in leaves.items():
        if e["owner"] != "trainer":
            if k in pred:
                bad.append(f"predicted but marked engine: {k}")
            continue
        if k not in pred:
            bad.append(f"not predicted: {k} {e['shape']}")
            continue
        p = pred.pop(k)
        p = D.from_bf16_bits(p) if e["dtype"] == "float32" else p
        if list(p.shape) != e["shape"]:
            bad.append(f"shape: {k} predicted {list(p.shape)} engine {e['shape']}")
        elif D.sha16(p) != e["sha256"]:
            bad.append(f"values: {k} {e['shape']}")
        else:
            good += 1
    bad += [f"predicted, not in the state: {k}" for k in pred if k not in leaves]
    return good, bad


SAME_PATH = re.compile(r"(embed_tokens|lm_head|model\.norm|embed_tokens_per_layer|per_layer_model_projection|per_layer_projection_norm)\.weight$")


def check_owners(golden, version):
    """Scanned and unscanned trees have other values in every layer: engine-owned leaves must agree between them, the others must not."""
    bad = []
    for f in sorted(glob.glob(f"{golden}/*.scan/tpu-inference-{version}.tp*.json")):
        g = f.replace(".scan/", ".unscan/")
        if os.path.exists(g):
            a, b = (json.load(open(x))["leaves"] for x in (f, g))
            assert a.keys() == b.keys()
            for k in a:
                engine = a[k]["owner"] == "engine"
                small = np.prod(a[k]["shape"]) < 4          # few values: may agree by chance
                if not (small and not engine) and (a[k]["sha256"] == b[k]["sha256"]) != (engine or bool(SAME_PATH.search(k))):
                    bad.append(f"owner of {k} in {f}")
    return bad


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--golden", required=True)
    ap.add_argument("--work", required=True)
    ap.add_argument("--version", default="0.32.0")
    ap.add_argument("-v", action="store_true", help="list every mismatch, not one per kind")
    A = ap.parse_args()
    version = tuple(int(x) for x in A.version.split(".")[:2])
    total = wrong = 0
    absent = set()
    for f in sorted(glob.glob(f"{A.golden}/*/tpu-inference-{A.version}.tp*.json") + glob.glob(f"{A.golden}/*/tpu-inference-flax-{A.version}.tp*.json")):
        tag = os.path.basename(os.path.dirname(f))
        if not os.path.exists(f"{A.work}/{tag}/model.safetensors"):
            absent.add(tag)
            continue
        cfg = json.load(open(f"{A.golden}/{tag}/config.json"))
        g = json.load(open(f))
        tp, moe_tp = g["mesh"]["model"], g["mesh"]["model"] * g["mesh"].get("attn_dp", 1)
        hf = D.load_safetensors(f"{A.work}/{tag}/model.safetensors")
        if g.get("implementation") == "flax_nnx":
            pred = predict_flax(cfg, hf, tp, g["moe_backend"])
        else:
            pred = predict(cfg, hf, tp, moe_tp, g["moe_backend"], version)
        good, bad = compare(g["leaves"], pred)
        engine = sum(e["owner"] == "engine" for e in g["leaves"].values())
        total, wrong = total + 1, wrong + bool(bad)
        print(f"{'ok  ' if not bad else 'BAD '} {tag}/{os.path.basename(f)}: {good} trainer leaves bit-exact, {len(bad)} not, {engine} engine")
        seen = set()
        for b in bad:
            kind = re.sub(r"\d+", "N", b)
            if A.v or kind not in seen:
                print("      ", b)
            seen.add(kind)
    owners = check_owners(A.golden, A.version)
    print("\n".join(owners[:20] + [f"{total} goldens, {wrong} with mismatches; {len(owners)} leaves with a doubtful owner"]))
    if absent:
        print(f"not checked, no checkpoint in {A.work}: {', '.join(sorted(absent))}")
    sys.exit(bool(wrong or owners))
