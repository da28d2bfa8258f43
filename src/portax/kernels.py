"""How bytes move: pure, jitted functions of one layer's arrays.

Inside a converter they are traced into one program per kind of layer; called alone they compile once per shape. They
move elements and never compute with them, so they are exact for every dtype and every bit pattern.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

_LANES = 128  # a TPU vector register's minor dimension: what fused MoE kernels pad an expert's width to


def round_up(size: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `size`."""
    return -(-size // multiple) * multiple


@functools.partial(jax.jit, static_argnames=("axes",), inline=True)
def unscan(
    stack: Shaped[Array, "..."], position: Int[Array, " depth"], *, axes: tuple[int, ...]
) -> Shaped[Array, "..."]:
    """One layer of a scanned stack; nothing but that layer is read or written.

    Args:
        stack: A leaf with one axis per level of scanning.
        position: Index on each scan axis.
        axes: The scan axes, in the order of `position`.
    """
    for level in sorted(range(len(axes)), key=lambda level: -axes[level]):
        stack = lax.dynamic_index_in_dim(stack, position[level], axes[level], keepdims=False)
    return stack


@functools.partial(jax.jit, static_argnames=("axis", "multiple"), inline=True)
def pad_axis(x: Shaped[Array, "..."], *, axis: int, multiple: int) -> Shaped[Array, "..."]:
    """`x` with zeros appended on `axis` up to a multiple of `multiple`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, round_up(x.shape[axis], multiple) - x.shape[axis])
    return jnp.pad(x, widths)


@functools.partial(jax.jit, static_argnames=("shards",), inline=True)
def interleave(parts: Sequence[Shaped[Array, "in _"]], *, shards: int) -> Shaped[Array, "in out"]:
    """Merges column-parallel kernels so that every shard holds its slice of each, side by side.

    ```
    parts a, b and 2 shards:   a = [a0 a1], b = [b0 b1]  ->  [a0 b0 | a1 b1]
    ```

    Args:
        parts: `[in, out_i]` kernels; every `out_i` a multiple of `shards`.
        shards: Tensor-parallel size.

    Source: tpu-inference 0.32, layers/common/process_weights/linear_weights.py.
    """
    rows = parts[0].shape[0]
    return jnp.concatenate([part.reshape(rows, shards, -1) for part in parts], axis=2).reshape(rows, -1)


@functools.partial(jax.jit, static_argnames=("shards", "replicate_kv"), inline=True)
def pack_qkv(
    query: Shaped[Array, "in heads query_dim"],
    key: Shaped[Array, "in kv_heads dim"],
    value: Shaped[Array, "in kv_heads dim"],
    *,
    shards: int,
    replicate_kv: bool,
) -> Shaped[Array, "in out"]:
    """Packs the attention projections into one `[in, out]` matrix.

    ```
    2 shards, 4 query heads, 2 KV heads:               [q0 q1 k0 v0 | q2 q3 k1 v1]
    4 shards, 4 query heads, 2 KV heads, replicated:   [q0 k0 v0 | q1 k0 v0 | q2 k1 v1 | q3 k1 v1]
    ```

    Args:
        query: Query heads.
        key: Key heads.
        value: Value heads.
        shards: Tensor-parallel size.
        replicate_kv: With more shards than KV heads, whether each KV head is repeated for the shards that share it
            (`shards` a multiple of the KV heads) or cut between them.

    Source: tpu-inference 0.32, layers/vllm/custom_ops/linear.py (replication from 0.22 on).
    """
    if replicate_kv and shards > key.shape[1]:
        key, value = (jnp.repeat(x, shards // x.shape[1], axis=1) for x in (key, value))
    rows = query.shape[0]
    return interleave([x.reshape(rows, -1) for x in (query, key, value)], shards=shards)


@functools.partial(jax.jit, static_argnames=("shards", "multiple"), inline=True)
def fuse_w13(
    gate: Shaped[Array, "experts in width"],
    up: Shaped[Array, "experts in width"],
    *,
    shards: int,
    multiple: int = _LANES,
) -> Shaped[Array, "experts in fused"]:
    """Fuses the gate and up kernels of all experts; each shard's chunk of either is padded with zeros.

    ```
    2 shards:   [gate0 0 up0 0 | gate1 0 up1 0]      every chunk `width / shards`, padded to a multiple of 128
    ```

    Args:
        gate: Kernel of the activated branch.
        up: Kernel of the linear branch.
        shards: Tensor-parallel size; divides `width`.
        multiple: What each chunk is padded to.

    Source: tpu-inference 0.32, layers/common/process_weights/moe_weights.py.
    """
    experts, rows, width = gate.shape
    chunk = width // shards
    # Copied run by run, in runs that divide both the chunk and its padding: one loop, nothing temporary, whole vectors.
    run = math.gcd(chunk, round_up(chunk, multiple))
    gate, up = (x.reshape(experts, rows, shards, chunk // run, run) for x in (gate, up))
    padding = jnp.zeros((experts, rows, shards, (round_up(chunk, multiple) - chunk) // run, run), gate.dtype)
    return jnp.concatenate([gate, padding, up, padding], axis=3).reshape(experts, rows, -1)


def to_bits(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The elements of `x` as unsigned integers of the same width, so that moving them can never compute with them."""
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def from_bits(x: Shaped[Array, "..."], dtype: jnp.dtype) -> Shaped[Array, "..."]:
    """The inverse of `to_bits`."""
    return lax.bitcast_convert_type(x, dtype)
