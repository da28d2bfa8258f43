"""Syncs of a tree of over 2 GB into MaxText's own model, by portax, MaxText's direct converter and Tunix's transfer.

    PYTHONPATH=FOLDER python benchmarks/maxtext_vllm.py [--tp 4]     (minutes)

It needs the engine's environment with portax, Tunix, and MaxText in a folder, as `.ci/live` makes them. Every row runs
in a process of its own, and what each left in the engine's buffers is compared by fingerprint. Trainer and engine are
on the same devices. Extra memory is the highest resident size sampled during a warm sync, less what the process held
before it. The copy is `np.copyto` of what the engine holds.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import record
from jax.sharding import Mesh, NamedSharding
from measure import timed
from trees import MODELS, random_tree

import portax
from portax.layouts import MaxTextVllm
from portax.sync.fingerprint import fingerprints

MODEL = MODELS["qwen3-moe"]
AXES = ("data", "attn_dp", "attn_dp_expert", "expert", "model", "dcp", "pcp")
COMPILED = "/jax/core/compile/backend_compile_duration"


def converter_at(tp):
    """The converter for the engine."""
    return portax.converter_for(MODEL.config, layout=MaxTextVllm(version="0.2.5", tp=tp))


def engine_state(tp):
    """Ones, in variables, as MaxText's model holds its weights."""
    from flax import nnx

    shape = [tp if axis == "model" else 1 for axis in AXES]
    on = Mesh(np.array(jax.devices()[:tp]).reshape(shape), AXES)
    converter = converter_at(tp)
    state = {}
    for entry in converter.plan(converter.expected_tree(dtype=jnp.bfloat16)).entries:
        make = jax.jit(
            lambda shape=entry.shape, dtype=entry.dtype: jnp.ones(shape, dtype),
            out_shardings=NamedSharding(on, entry.spec),
        )
        state[tuple(entry.name.split("."))] = nnx.Param(make())
    return nnx.State.from_flat_path(state)


def by_portax(params, state, tp):
    """A `WeightSync` in place."""
    sync = portax.WeightSync(converter_at(tp), state)
    return lambda: sync(params)


def by_maxtext(params, state, tp):
    """MaxText's direct converter, its leaves placed as the engine has them: it reads its number of slices off them."""
    from maxtext.integration.vllm.weight_converter import MaxTextToMaxTextConverter

    config = types.SimpleNamespace(
        **MODEL.config,
        base_num_kv_heads=MODEL.config["num_kv_heads"],
        weight_dtype=jnp.bfloat16,
        prefuse_moe_weights=True,
        param_scan_axis=1,
        inhomogeneous_layer_cycle_interval=1,
        padded_base_moe_mlp_dim=MaxTextVllm(version="0.2.5", tp=tp).padded_width(MODEL.config["moe_mlp_dim"]),
        rollout_tensor_parallelism=tp,
    )
    converter = MaxTextToMaxTextConverter(config, tp=tp, prefuse_moe_weights=True, kv_tp_size=tp, moe_mlp_tp_size=tp)

    def sync():
        from flax import traverse_util

        made = traverse_util.flatten_dict(converter.convert(params, state), sep="/")
        for path, variable in state.flat_state():
            leaf = made["/".join(path)]
            leaf = leaf.get_value() if hasattr(leaf, "get_value") else leaf
            variable.set_value(jax.device_put(leaf, variable.get_value().sharding))
        return [variable.get_value() for _, variable in state.flat_state()]

    return sync


def by_tunix(params, state, tp):
    """Tunix's transfer, as MaxText's rollout patches and calls it."""
    del tp
    import maxtext.integration.vllm.maxtext_vllm_rollout  # noqa: F401  it patches Tunix
    from tunix.generate import utils
    from tunix.rl import reshard

    def sync():
        utils.transfer_state_directly(params, state, reshard.reshard_pytree, delete_dst_buffers=True)
        return [variable.get_value() for _, variable in state.flat_state()]

    return sync


ROWS = {"portax": by_portax, "maxtext": by_maxtext, "tunix": by_tunix}


def measured(row, tp, repeat):
    """Figures of one row."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    state, params = engine_state(tp), random_tree(MODEL, jax.devices()[:tp])
    sync = ROWS[row](params, state, tp)
    _, once, _ = timed(1, sync)
    compiled.clear()
    _, warm, peaks = timed(repeat, sync)
    programs = compiled.count(COMPILED)
    leaves = {".".join(path): variable.get_value() for path, variable in state.flat_state()}
    sizes = [shard.data.size for leaf in leaves.values() for shard in leaf.addressable_shards]
    buffers = [(np.ones(n, np.uint16), np.ones(n, np.uint16)) for n in sizes]
    _, copies, _ = timed(repeat, lambda: [np.copyto(to, source) for to, source in buffers])
    return {
        "first_s": once[0],
        "warm_s": warm,
        "copy_s": copies,
        "written_bytes": sum(to.nbytes for to, _ in buffers),
        "extra_bytes": max(peaks),
        "compiled_when_warm": programs,
        "held": dict(zip(leaves, fingerprints(leaves.values()), strict=True)),
    }


def child(row, args):
    """The figures of one row, or why there are none."""
    options = ["--row", row, "--tp", str(args.tp), "--repeat", str(args.repeat)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{row}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Measures as told on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=[*ROWS])
    record.add_json(parser)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.tp)
    if args.row:
        print(json.dumps(measured(args.row, args.tp, args.repeat)))
        return
    found = {row: child(row, args) for row in args.rows}
    held = {row: figures.pop("held") for row, figures in found.items()}
    first = held[args.rows[0]]
    print(f"{MODEL.title}, bfloat16, tp {args.tp}, into MaxText's own model")
    for row, figures in found.items():
        warm, copy = (statistics.median(figures[f"{what}_s"]) for what in ("warm", "copy"))
        unlike = sum(held[row].get(name) != mark for name, mark in first.items())
        print(
            f"{row:8} first {figures['first_s']:.2f} s, warm {warm:.2f} s = {warm / copy:.1f} x copy, written "
            f"{figures['written_bytes'] / 1e9:.2f} GB, extra {figures['extra_bytes'] / 1e9:.2f} GB, compiled when warm "
            f"{figures['compiled_when_warm']}; {unlike} of {len(first)} leaves unlike {args.rows[0]}'s"
        )
    print(f"{record.machine()}, JAX {jax.__version__}, Python {platform.python_version()}")
    record.write(args.json, {"tp": args.tp, "rows": found})


if __name__ == "__main__":
    main()
