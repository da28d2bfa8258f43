"""Syncs a tiny model many times, without the import hook that checks every call: `test_sync.py` starts it.

Prints one line of JSON: how many arrays are alive and how many bytes they have, after the first sync and then every 20.
"""

import gc
import json
import pathlib
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from conftest import mesh, sharded, tree

import portax


def main(devices, times):
    config = dict(tree("qwen3-8b.scan").config, num_decoder_layers=1, base_num_decoder_layers=1)
    layout = portax.layouts.TpuInference(version="0.32", tp=1)
    converter = portax.converter_for(config, layout=layout, mesh=mesh(data=devices, model=1))
    tiny = {path: np.ones(leaf.shape, np.float32) for path, leaf in converter.expected_tree().items()}
    params = sharded(tiny, mesh(fsdp=devices))
    sync = portax.WeightSync(converter, converter.convert(params))
    sync(params)
    gc.collect()
    alive = [(len(jax.live_arrays()), sum(leaf.nbytes for leaf in jax.live_arrays()))]
    for _ in range(times // 20):
        for _ in range(20):
            sync(params)
        alive.append((len(jax.live_arrays()), sum(leaf.nbytes for leaf in jax.live_arrays())))
    return {"version": sync.version, "alive": alive}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*map(int, sys.argv[1:]))) + "\n")
