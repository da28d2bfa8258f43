"""Times one converter on a made-up tree in bfloat16 and prints one line of JSON; `convert.py` runs it.

It imports only what the converter it times needs, so that it runs in MaxText's environment as well as in portax's.
Seconds are of whole calls, until every result is there; the peak is the highest resident size sampled during a warm
call, less that before it, so it counts the results.

Between calls freed memory goes back to the system, and results land in fresh pages; under a malloc that keeps memory
(`convert.py` sets one up) they land in used ones, as they do on an accelerator.
"""

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import platform
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from trees import MODELS, random_tree

TP = 4
BUCKET_BYTES = 2**28


def portax_converter(model, params, mesh):
    """portax; with a mesh, results are partitioned over it as the engine wants them."""
    import portax

    layout = portax.layouts.TpuInference(version="0.32", tp=TP)
    converter = portax.converter_for(model.config, layout=layout, mesh=mesh)
    return lambda: converter.convert(params)


def portax_stream(model, params, mesh):
    """The same in buckets, each dropped when it is there."""
    import portax

    layout = portax.layouts.TpuInference(version="0.32", tp=TP)
    converter = portax.converter_for(model.config, layout=layout, mesh=mesh)

    def stream():
        made = []
        for bucket in converter.stream(params, bucket_bytes=BUCKET_BYTES):
            parts = [shard.data for leaf in jax.block_until_ready(bucket).values() for shard in leaf.addressable_shards]
            made += [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in parts]
        return made

    return stream


def portax_fp8(model, params, mesh):
    """To an engine that loaded a checkpoint of fp8 blocks and quantised it again: linears, experts and their scales."""
    import portax

    quantization = portax.layouts.Quantization(checkpoint="fp8-block", scale_form="narrow")
    layout = portax.layouts.TpuInference(version="0.32", tp=TP, quantization=quantization)
    converter = portax.converter_for(model.config, layout=layout, mesh=mesh)
    return lambda: converter.convert(params)


def maxtext_converter(model, params, mesh):
    """MaxText's torchax converter class; made anew for each call, because it keeps its last results alive."""
    from flax import nnx

    if model.config["decoder_block"] == "gemma4":
        from maxtext.integration.vllm.torchax_converter.gemma4_moe import Gemma4MaxTextToVLLMConverter as Converter
    else:
        from maxtext.integration.vllm.torchax_converter.qwen3_moe import Qwen3MaxTextToVLLMConverter as Converter
    state = nnx.State(jax.tree.map(nnx.Param, params))
    based = {f"base_{name}": value for name, value in model.config.items()}
    config = argparse.Namespace(
        **based, **model.config, model_name="gemma4-26b", rollout_tensor_parallelism=TP
    )  # by that name its Gemma4 converter knows a mixture of experts

    def convert():
        with contextlib.redirect_stdout(sys.stderr):  # it prints its progress
            return Converter(config, mesh).convert(state)

    return convert


def maxtext_table_converter(model, params, mesh):
    """MaxText's rule-table converter."""
    from flax import nnx
    from maxtext.integration.vllm.weight_converter import MODEL_TO_CONVERSION_RULES, WeightConverter

    state = nnx.State(jax.tree.map(nnx.Param, params))
    rules = MODEL_TO_CONVERSION_RULES[model.config["decoder_block"]]
    return lambda: WeightConverter(rules=rules, tp=TP).convert(state)


def tunix_transfer(model, params, mesh):
    """Tunix's transfer from MaxText's tree to MaxText's model inside vLLM: w13 fused and padded, q, k and v apart."""
    from flax import nnx
    from tunix.generate.utils import transfer_state_directly
    from tunix.rl.reshard import reshard_pytree

    if jax.device_count() > 1:
        raise SystemExit("Tunix's transfer is measured on one device")
    one = NamedSharding(Mesh(np.array(jax.devices()), ("model",)), PartitionSpec())
    width = model.config["moe_mlp_dim"]
    fused = 2 * TP * -(-width // TP // 128) * 128
    engine: dict = {}
    for path, shape in model.shapes.items():
        layers = [""]
        if "/layers/" in path:
            layers, shape = [f"layers_{i}" for i in range(shape[1])], (shape[0], *shape[2:])
        if path.endswith("/wi_1"):
            continue
        if path.endswith("/wi_0"):
            path, shape = path[:-2], (*shape[:-1], fused)
        ones = jax.jit(lambda shape=shape: jnp.ones(shape, jnp.bfloat16), out_shardings=one)
        for layer in layers:
            node = engine
            *parents, last = path.replace("/layers/", f"/{layer}/").split("/")
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = nnx.Param(ones())
    state = nnx.State({"model": engine})
    source = nnx.State(jax.tree.map(nnx.Param, params))

    def convert():
        transfer_state_directly(source, state, reshard_pytree)
        return nnx.to_pure_dict(state)

    return convert


def numpy_by_hand(model, params, mesh):
    """The best that was found with numpy alone, on one thread; before it is timed, it has to make portax's bits."""
    import by_hand

    leaves = by_hand.raw_leaves(params)
    name = next(name for name, one in MODELS.items() if one is model)

    def convert():
        return by_hand.convert(leaves, model=name, tp=TP)

    if wrong := by_hand.differences(convert(), portax_converter(model, params, mesh)()):
        raise SystemExit(f"numpy by hand gives other bits: {wrong}")
    return convert


CONVERTERS = {
    "numpy": numpy_by_hand,
    "portax": portax_converter,
    "portax-fp8": portax_fp8,
    "portax-stream": portax_stream,
    "maxtext": maxtext_converter,
    "maxtext-table": maxtext_table_converter,
    "tunix": tunix_transfer,
}


def timed(calls, function):
    """Last result, seconds of each call, and bytes that each call added to the resident size at its peak."""
    seconds, peaks = [], []
    for _ in range(calls):
        result = None
        time.sleep(0.5)  # freed memory goes back to the system a little later
        if "GLIBC_TUNABLES" not in os.environ:
            ctypes.CDLL(None).malloc_trim(0)
        sizes, done = [_resident()], threading.Event()
        watcher = threading.Thread(target=_watch, args=(sizes, done))
        watcher.start()
        start = time.perf_counter()
        try:
            result = jax.block_until_ready(function())
        finally:
            done.set()
            watcher.join()
        seconds.append(time.perf_counter() - start)
        peaks.append(max(sizes) - sizes[0])
    return result, seconds, peaks


def _watch(sizes, done):
    while not done.wait(0.005):
        sizes.append(_resident())


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def main():
    """Measures as told on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("converter", choices=CONVERTERS)
    parser.add_argument("--model", choices=MODELS, default="qwen3-moe")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--engine-mesh", action="store_true", help="partition results as the engine does")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(seconds) if event.endswith("backend_compile_duration") else None
    )
    model = MODELS[args.model]
    params = random_tree(model)
    mesh = Mesh(np.array(jax.devices()).reshape(-1, TP), ("data", "model")) if args.engine_mesh else None
    compiled.clear()
    convert = CONVERTERS[args.converter](model, params, mesh)
    _, first, _ = timed(1, convert)
    programs, compile_seconds = len(compiled), sum(compiled)
    weights, warm, peaks = timed(args.repeat, convert)
    # What is held, copies on several devices included: that is what a conversion writes.
    shapes = [
        (part.size, part.dtype)
        for leaf in jax.tree.leaves(weights)
        for part in ([shard.data for shard in leaf.addressable_shards] if isinstance(leaf, jax.Array) else [leaf])
    ]
    again = len(compiled) - programs
    del weights, params, convert
    buffers = [(np.ones(n, dtype), np.ones(n, dtype)) for n, dtype in shapes]
    _, copies, _ = timed(args.repeat, lambda: [np.copyto(to, source) for to, source in buffers])
    figures = {
        "first_s": first[0],
        "compile_s": compile_seconds,
        "programs": programs,
        "programs_later": again,
        "warm_s": warm,
        "copy_s": copies,
        "peak_extra_bytes": max(peaks),
        "output_bytes": sum(to.nbytes for to, _ in buffers),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
