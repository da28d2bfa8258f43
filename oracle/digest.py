"""Digests and file formats shared by export_maxtext.py, run_engine.py and check.py."""
import hashlib
import json
import os
import re
import struct

import numpy as np

# State leaves that no checkpoint tensor of the language model feeds: constants the engine computes itself, and the vision side.
ENGINE_OWNED = re.compile(r"\.attn\._(k|v|q|prob)_scale$|cos_sin_cache$|\.normalizer$|\.root_size$|\.embed_scale_per_layer$"
                          r"|\.per_layer_input_scale$|\.per_layer_projection_scale$"
                          r"|^rng\."
                          r"|(^|\.)(vision_tower|visual|embed_vision|multi_modal_projector|audio_tower|embed_audio)\.")


def owner(key):
    return "engine" if ENGINE_OWNED.search(key) else "trainer"


def sha16(a):
    """First 16 hex digits of sha256 over the C-order bytes (bfloat16: its 2-byte little-endian bits)."""
    return hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:16]


def to_bf16_bits(a):
    """float32 array -> uint16 bfloat16 bits, round to nearest even."""
    u = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16_bits(b):
    return (np.asarray(b).astype(np.uint32) << 16).view(np.float32)


def spec_json(spec):
    """jax PartitionSpec -> JSON list (null, axis name, or list of axis names per dimension)."""
    return [list(p) if isinstance(p, (tuple, list)) else p for p in spec]


def write_json(path, obj):
    """Sorted keys, one line per tensor or leaf."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    lines = []
    for k in sorted(obj):
        v = obj[k]
        if isinstance(v, dict) and v and all(isinstance(x, dict) for x in v.values()):
            rows = ",\n".join(f"{json.dumps(n)}:{json.dumps(v[n], sort_keys=True, separators=(',', ':'))}" for n in sorted(v))
            lines.append(f"{json.dumps(k)}:{{\n{rows}\n}}")
        else:
            lines.append(f"{json.dumps(k)}:{json.dumps(v, sort_keys=True, separators=(',', ':'))}")
    tmp = f"{path}.tmp{os.getpid()}"
    with open(tmp, "w") as f:
        f.write("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(tmp, path)


_ST = {"F32": np.float32, "BF16": np.uint16}


def save_safetensors(path, tensors):
    """{name: uint16 array of bfloat16 bits} -> a BF16 safetensors file."""
    head, at = {}, 0
    for n in sorted(tensors):
        size = tensors[n].nbytes
        head[n] = {"dtype": "BF16", "shape": list(tensors[n].shape), "data_offsets": [at, at + size]}
        at += size
    h = json.dumps(head).encode()
    h += b" " * (-len(h) % 8)
    tmp = f"{path}.tmp{os.getpid()}"
    with open(tmp, "wb") as f:
        f.write(struct.pack("<Q", len(h)) + h)
        for n in sorted(tensors):
            f.write(np.ascontiguousarray(tensors[n]).tobytes())
    os.replace(tmp, path)


def load_safetensors(path):
    """-> {name: array}; bfloat16 as its uint16 bits."""
    b = open(path, "rb").read()
    n = struct.unpack("<Q", b[:8])[0]
    out = {}
    for k, v in json.loads(b[8:8 + n]).items():
        if k != "__metadata__":
            s, e = v["data_offsets"]
            out[k] = np.frombuffer(b[8 + n + s:8 + n + e], _ST[v["dtype"]]).reshape(v["shape"])
    return out
