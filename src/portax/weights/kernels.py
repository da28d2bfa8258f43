"""Kernels: pure, jitted functions that move the bytes of one layer's arrays.

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
    """Rounds a size up to a multiple of `multiple`.

    Example:
        >>> kernels.round_up(250, 64)
        256
    """
    return -(-size // multiple) * multiple


@functools.partial(jax.jit, static_argnames=("axes",), inline=True)
def unscan(
    stack: Shaped[Array, "..."], position: Int[Array, " depth"], *, axes: tuple[int, ...]
) -> Shaped[Array, "..."]:
    """Takes one layer out of a scanned stack; reads and writes nothing but that layer.

    Args:
        stack: A leaf with one axis per level of scanning.
        position: Index on each scan axis.
        axes: The scan axes, in the order of `position`.

    Example:
        >>> stack = jnp.arange(6).reshape(2, 3)  # [embed, layers]
        >>> print(kernels.unscan(stack, jnp.array([2]), axes=(1,)))
        [2 5]
    """
    for level in sorted(range(len(axes)), key=lambda level: -axes[level]):
        stack = lax.dynamic_index_in_dim(
            stack, position[level], axes[level], keepdims=False, allow_negative_indices=False
        )
    return stack


@functools.partial(jax.jit, static_argnames=("axis", "multiple"), inline=True)
def pad_axis(x: Shaped[Array, "..."], *, axis: int, multiple: int) -> Shaped[Array, "..."]:
    """Appends zeros on `axis` up to a multiple of `multiple`.

    Example:
        >>> print(kernels.pad_axis(jnp.ones((1, 3), int), axis=1, multiple=4))
        [[1 1 1 0]]
    """
    missing = round_up(x.shape[axis], multiple) - x.shape[axis]
    if not missing:
        return x
    return jnp.concatenate([x, jnp.zeros((*x.shape[:axis], missing, *x.shape[axis + 1 :]), x.dtype)], axis)


@functools.partial(jax.jit, inline=True)
def transpose(x: Shaped[Array, "rows columns"]) -> Shaped[Array, "columns rows"]:
    """Transposes a matrix.

    XLA's CPU backend spends most of a transpose on computing indices, element by element: raw bfloat16 goes there in
    pairs of rows, as one 32-bit number each (1.6x as fast; docs/performance.md).

    Example:
        >>> kernels.transpose(jnp.ones((2, 3))).shape
        (3, 2)
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
        multiple: The width of each slice is padded to a multiple of this.

    Source: tpu-inference 0.32, layers/common/process_weights/linear_weights.py.

    Example:
        >>> print(kernels.interleave([jnp.array([[1, 2]]), jnp.array([[3, 4]])], shards=2))
        [[1 3 2 4]]
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
    """Separates products that lie side by side within each group.

    ```
    2 groups, widths of a and b:   [a0 b0 | a1 b1]  ->  [a0 a1], [b0 b1]
    ```

    Args:
        kernel: All groups.
        groups: Number of groups.
        widths: Width of each product within one group.

    Example:
        >>> a, b = kernels.ungroup(jnp.array([[1, 3, 2, 4]]), groups=2, widths=(1, 1))
        >>> print(a, b)
        [[1 2]] [[3 4]]
    """
    rows = kernel.shape[0]
    grouped = kernel.reshape(rows, groups, sum(widths))
    ends = list(itertools.accumulate(widths))
    return tuple(
        grouped[:, :, end - width : end].reshape(rows, groups * width) for width, end in zip(widths, ends, strict=True)
    )


def reverse_axes(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Reverses the axes of `x`: between torch's and JAX's form of a convolution's kernel.

    Example:
        >>> kernels.reverse_axes(jnp.ones((4, 1, 64))).shape
        (64, 1, 4)
    """
    return x.T


def deinterleave(x: Shaped[Array, "*batch dim"]) -> Shaped[Array, "*batch dim"]:
    """Reorders rotary pairs from `[a0 b0 a1 b1 ...]` to halves, `[a0 a1 ... b0 b1 ...]`.

    Example:
        >>> print(kernels.deinterleave(jnp.array([0, 10, 1, 11])))
        [ 0  1 10 11]
    """
    return jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)


def alternate(a: Shaped[Array, "*batch _"], b: Shaped[Array, "*batch _"]) -> Shaped[Array, "*batch _"]:
    """Puts every column of `b` behind its column of `a`: `[a0 b0 a1 b1 ...]`.

    Example:
        >>> print(kernels.alternate(jnp.array([0, 1]), jnp.array([10, 11])))
        [ 0 10  1 11]
    """
    return jnp.stack([a, b], axis=-1).reshape(*a.shape[:-1], -1)


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
        replicate_kv: With more shards than KV heads: True repeats each KV head for the shards that share it (`shards`
            is a multiple of the KV heads), False cuts it between them.

    Source: tpu-inference 0.32, layers/vllm/custom_ops/linear.py (replication from 0.22 on).

    Example:
        >>> query, kv = jnp.array([[[1], [2]]]), jnp.array([[[3]]])  # [in, heads, head_dim]
        >>> print(kernels.pack_qkv(query, kv, kv, shards=2, replicate_kv=True))
        [[1 3 3 2 3 3]]
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
    """Fuses the gate and up kernels of all experts, and pads each shard's slice of either with zeros.

    ```
    2 shards:   [gate0 0 up0 0 | gate1 0 up1 0]      every slice `width / shards`, padded to a multiple of 128
    ```

    Args:
        gate: Kernel of the activated branch.
        up: Kernel of the linear branch.
        shards: Tensor-parallel size; divides `width`.
        multiple: The width of each slice is padded to a multiple of this.

    Source: tpu-inference 0.32, layers/common/process_weights/moe_weights.py.

    Example:
        >>> print(kernels.fuse_w13(jnp.array([[[1, 2]]]), jnp.array([[[3, 4]]]), shards=2, multiple=1))
        [[[1 3 2 4]]]
    """
    return interleave([gate, up], shards=shards, multiple=multiple)
