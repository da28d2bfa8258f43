"""Exports in children that are killed on the way: `python tests/export_worker.py PROGRAMS`, a job in JSON on each line.

The modules are imported once, and each job gets a fork of that, so that a kill costs no start of an interpreter. What one
job compiles is kept for the next in the folder PROGRAMS.
"""

import json
import os
import signal
import sys

import jax
import orbax.checkpoint  # noqa: F401 - imported before the fork

import portax


def export(config, checkpoint, out, die_at):
    """Exports; dies when it asks the disk for the nth time to keep something, which it does between any two steps."""
    keep, asked = os.fsync, 0

    def dying(descriptor):
        nonlocal asked
        asked += 1
        if asked == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        keep(descriptor)

    os.fsync = dying
    with open(config) as file:  # noqa: PTH123
        converter = portax.converter_for(json.load(file), layout=portax.layouts.HuggingFace())
    portax.export(converter, portax.open_checkpoint(checkpoint), out, shard_bytes=200_000, bucket_bytes=100_000)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", sys.argv[1])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            export(**json.loads(line))
            os._exit(0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()
