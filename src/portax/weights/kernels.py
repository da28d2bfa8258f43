"""How bytes move: pure, jitted functions of one layer's arrays.

Inside a converter they are traced into one program per kind of layer; called alone they compile once per shape. They
move elements and never compute with them. Converters give them bfloat16 as its bits; see `bits.to_bits`.
"""

import functools
import itertools
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
        stack = lax.dynamic_index_in_dim(
            stack, position[level], axes[level], keepdims=False, allow_negative_indices=False
        )
    return stack


@functools.partial(jax.jit, static_argnames=("axis", "multiple"), inline=True)
def pad_axis(x: Shaped[Array, "..."], *, axis: int, multiple: int) -> Shaped[Array, "..."]:
    """`x` with zeros appended on `axis` up to a multiple of `multiple`."""
    missing = round_up(x.shape[axis], multiple) - x.shape[axis]
    if not missing:
        return x
    return jnp.concatenate([x, jnp.zeros((*x.shape[:axis], missing, *x.shape[axis + 1 :]), x.dtype)], axis)


@functools.partial(jax.jit, inline=True)
def transpose(x: Shaped[Array, "rows columns"]) -> Shaped[Array, "columns rows"]:
    """A matrix, transposed.

    XLA's CPU backend spends most of a transpose on computing indices, element by element: raw bfloat16 goes there in
    pairs of rows, as one 32-bit number each (1.6x as fast; docs/performance.md).
    """
    if x.dtype != jnp.uint16 or x.shape[0] % 2:
        return x.T
    return lax.platform_dependent(x, cpu=_transpose_pairs, default=jnp.transpose)


def _transpose_pairs(x: Shaped[Array, "rows columns"]) -> Shaped[Array, "columns rows"]:
    rows, columns = x.shape
    pairs = x.reshape(rows // 2, 2, columns).astype(jnp.uint32)
    both = (pairs[:, 0] | (pairs[:, 1] << 16)).T  # the first of a pair is the low half: little-endian
    return lax.bitcast_convert_type(both, jnp.uint16).reshape(columns, rows)


@functools.partial(jax.jit, static_argnames=("shards", "multiple"), inline=True)
def interleave(
    parts: Sequence[Shaped[Array, "*batch _"]], *, shards: int, multiple: int = 1
) -> Shaped[Array, "*batch out"]:
    """Merges column-parallel kernels so that every shard holds its slice of each, side by side.

    ```
    parts a, b and 2 shards:   a = [a0 a1], b = [b0 b1]  ->  [a0 b0 | a1 b1]
    with a multiple:           each slice followed by zeros up to it, [a0 0 b0 0 | a1 0 b1 0]
    ```

    Args:
        parts: `[..., in, out_i]` kernels; every `out_i` a multiple of `shards`.
        shards: Tensor-parallel size.
        multiple: What the width of each slice is padded to.

    Source: tpu-inference 0.32, layers/common/process_weights/linear_weights.py.
    """
    batch = parts[0].shape[:-1]
    chunks = [part.shape[-1] // shards for part in parts]
    paddings = [round_up(chunk, multiple) - chunk for chunk in chunks]
    # Joined on an axis that is not the last one, in runs that divide every slice: XLA makes one loop of that, without
    # temporaries, that copies whole vectors. Joined on the last axis, it would first write every part out.
    run = math.gcd(*chunks, *paddings)
    pieces = []
    for part, padding in zip(parts, paddings, strict=True):
        pieces.append(part.reshape(*batch, shards, -1, run))
        if padding:
            pieces.append(jnp.zeros((*batch, shards, padding // run, run), part.dtype))
    return jnp.concatenate(pieces, axis=-2).reshape(*batch, -1)


@functools.partial(jax.jit, static_argnames=("groups", "widths"), inline=True)
def ungroup(
    kernel: Shaped[Array, "in all"], *, groups: int, widths: tuple[int, ...]
) -> tuple[Shaped[Array, "in _"], ...]:
    """Takes products apart that lie side by side within each group.

    ```
    2 groups, widths of a and b:   [a0 b0 | a1 b1]  ->  [a0 a1], [b0 b1]
    ```

    Args:
        kernel: All groups.
        groups: How many there are.
        widths: Width of each product within one group.
    """
    rows = kernel.shape[0]
    grouped = kernel.reshape(rows, groups, sum(widths))
    ends = list(itertools.accumulate(widths))
    return tuple(
        grouped[:, :, end - width : end].reshape(rows, groups * width) for width, end in zip(widths, ends, strict=True)
    )


def reverse_axes(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """`x` with its axes in reverse order: what torch and JAX call a convolution's kernel."""
    return x.T


def deinterleave(x: Shaped[Array, "*batch dim"]) -> Shaped[Array, "*batch dim"]:
    """Rotary pairs from `[a0 b0 a1 b1 ...]` to halves, `[a0 a1 ... b0 b1 ...]`."""
    return jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)


@functools.partial(jax.jit, static_argnames=("shards", "replicate_kv"), inline=True)
def pack_qkv(
    query: Shaped[Array, "*in heads query_dim"],
    key: Shaped[Array, "*in kv_heads dim"],
    value: Shaped[Array, "*in kv_heads dim"],
    *,
    shards: int,
    replicate_kv: bool,
) -> Shaped[Array, "*in out"]:
    """Packs the attention projections into one `[in, out]` matrix; of their biases, one vector.

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
    if replicate_kv and shards > key.shape[-2]:
        key, value = (jnp.repeat(x, shards // x.shape[-2], axis=-2) for x in (key, value))
    return interleave([x.reshape(*x.shape[:-2], -1) for x in (query, key, value)], shards=shards)


def fuse_w13(
    gate: Shaped[Array, "experts in width"],
    up: Shaped[Array, "experts in width"],
    *,
    shards: int,
    multiple: int = _LANES,
) -> Shaped[Array, "experts in fused"]:
    """Fuses the gate and up kernels of all experts; each shard's slice of either is padded with zeros.

    ```
    2 shards:   [gate0 0 up0 0 | gate1 0 up1 0]      every slice `width / shards`, padded to a multiple of 128
    ```

    Args:
        gate: Kernel of the activated branch.
        up: Kernel of the linear branch.
        shards: Tensor-parallel size; divides `width`.
        multiple: What each slice is padded to.

    Source: tpu-inference 0.32, layers/common/process_weights/moe_weights.py.
    """
    return interleave([gate, up], shards=shards, multiple=multiple)
