"""Weight-only quantised matmul in Triton: a vector product for M <= 4, matrix instructions above, split K."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_packing import RUN, ZERO_MODES, GpuWeight


@triton.jit
def dequantise(words, plane, BITS: tl.constexpr, ZERO: tl.constexpr, DTYPE: tl.constexpr):
    """Codes of one plane as DTYPE, less the common zero point; 8 bits: the words are the codes.

    fp16 holds 1024 + code in 0x6400 | code, bf16 128 + code in 0x4300 | code: no integer is converted.
    """
    if BITS == 8:
        values = words.to(DTYPE)
    else:
        codes = (words >> (plane * BITS).to(tl.int16)) & ((1 << BITS) - 1)
        if tl.float16 == DTYPE:
            values = (codes | 0x6400).to(tl.float16, bitcast=True) - (1024 + ZERO)
        else:
            values = (codes | 0x4300).to(tl.bfloat16, bitcast=True) - (128 + ZERO)
    return values


@triton.jit
def matvec(
    x_ptr, w_ptr, scale_ptr, zero_ptr, part_ptr, m, n, k, x_st, w_st, runs_per_split,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_MODE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, splits of K): part[split, m, n] fp32. One run of every row a step, on vector
    units.
    """
    PLANES: tl.constexpr = 1 if BITS == 8 else 16 // BITS
    SAME: tl.constexpr = min(PLANES, max(1, GROUP // WORDS))  # planes of one group
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_w, offs_m = tl.arange(0, WORDS), tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_n, n - 1)
    split = tl.program_id(1)
    start = split * runs_per_split
    stop = tl.minimum(start + runs_per_split, tl.cdiv(k, WORDS * PLANES))
    acc = tl.zeros([BLOCK_M, BLOCK_N, WORDS], tl.float32)
    for run in tl.range(start, stop):
        words = tl.load(w_ptr + rows[:, None].to(tl.int64) * w_st + (run * WORDS + offs_w)[None, :])
        for plane in tl.static_range(PLANES):
            at = run * (WORDS * PLANES) + plane * WORDS + offs_w
            x = tl.load(
                x_ptr + offs_m[:, None] * x_st + at[None, :],
                mask=(offs_m[:, None] < m) & (at[None, :] < k),
                other=0.0,
            )
            # 8 bits: a run of 64 may span two groups of 32, so the scale is per element there.
            if plane % SAME == 0:
                if WORDS <= GROUP:
                    group = tl.cast(
                        tl.minimum(run * (WORDS * PLANES) + plane * WORDS, k - 1) // GROUP, tl.int64
                    )
                    s = tl.load(scale_ptr + group * n + rows)[:, None].to(tl.float32)
                    if ZERO_MODE != 0:
                        zero = tl.load(zero_ptr + group * n + rows)[:, None].to(tl.float32)
                else:
                    groups = tl.minimum(at, k - 1) // GROUP
                    s = tl.load(scale_ptr + groups[None, :].to(tl.int64) * n + rows[:, None]).to(tl.float32)
            w = dequantise(words, tl.full([1, 1], plane, tl.int32), BITS, ZERO, DTYPE).to(tl.float32)
            if ZERO_MODE == 1:
                w = w - zero
            w = w * s
            if ZERO_MODE == 2:
                w = w + zero
            acc += w[None, :, :] * x[:, None, :].to(tl.float32)
    out = tl.sum(acc, 2)
    at = part_ptr + (split * m + offs_m).to(tl.int64)[:, None] * n + offs_n[None, :]
    tl.store(at, out, mask=(offs_m[:, None] < m) & (offs_n[None, :] < n))


@triton.jit
def matmul(
    x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, y_ptr, part_ptr, m, n, k, x_st, w_st,
        runs_per_split,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_MODE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr,
    SCALE_AFTER: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks * column blocks, splits). SCALE_AFTER (few rows): a group's sum is scaled, not
    weights.
    """
    PLANES: tl.constexpr = 1 if BITS == 8 else 16 // BITS
    SAME: tl.constexpr = min(PLANES, max(1, GROUP // WORDS))  # planes of one group
    blocks = tl.cdiv(m, BLOCK_M)
    row_block, column_block = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    offs_m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_w = tl.arange(0, WORDS)
    rows = tl.minimum(offs_n, n - 1)
    x_rows = tl.minimum(offs_m, m - 1)
    split = tl.program_id(1)
    start = split * runs_per_split
    stop = tl.minimum(start + runs_per_split, tl.cdiv(k, WORDS * PLANES))
    w_at = w_ptr + rows[None, :].to(tl.int64) * w_st + offs_w[:, None]
    x_at = x_ptr + x_rows[:, None].to(tl.int64) * x_st + offs_w[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for run in tl.range(start, stop):
        words = tl.load(w_at + run * WORDS)
        for plane in tl.static_range(PLANES):
            first = run * (WORDS * PLANES) + plane * WORDS
            x = tl.load(x_at + first, mask=(first + offs_w < k)[None, :], other=0.0)
            w = dequantise(words, tl.full([1, 1], plane, tl.int32), BITS, ZERO, DTYPE)
            if plane % SAME == 0:
                partial = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                if WORDS <= GROUP:
                    group = tl.cast(tl.minimum(first, k - 1) // GROUP, tl.int64)
                    s = tl.load(scale_ptr + group * n + rows)[None, :]
                    if ZERO_MODE != 0:
                        zero = tl.load(zero_ptr + group * n + rows)[None, :].to(DTYPE)
                else:
                    groups = tl.minimum(first + offs_w, k - 1) // GROUP
                    s = tl.load(scale_ptr + groups[:, None].to(tl.int64) * n + rows[None, :])
            if ZERO_MODE == 1:
                w = w - zero
            if SCALE_AFTER:
                partial = tl.dot(x, w, partial)
                if plane % SAME == SAME - 1:
                    acc += partial * s.to(tl.float32)
            else:
                w = w * s.to(DTYPE)
                if ZERO_MODE == 2:
                    w = w + zero
                acc = tl.dot(x, w, acc)
    inside = (offs_m[:, None] < m) & (offs_n[None, :] < n)
    at = offs_m.to(tl.int64)[:, None] * n + offs_n[None, :]
    if SPLIT:
        tl.store(part_ptr + split.to(tl.int64) * m * n + at, acc, mask=inside)
    else:
        if BIAS:
            acc += tl.load(bias_ptr + rows)[None, :].to(tl.float32)
        if RESIDUAL:
            acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_splits(
    part_ptr, bias_ptr, residual_ptr, y_ptr, total, n, splits,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of M * N): the splits added in order, with the epilogue."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < total
    acc = tl.zeros([BLOCK], tl.float32)
    for split in tl.range(0, splits):
        acc += tl.load(part_ptr + tl.cast(split, tl.int64) * total + offs, mask=inside, other=0.0)
    if BIAS:
        acc += tl.load(bias_ptr + offs % n, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        acc += tl.load(residual_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def matmul_grad_x(
    dy_ptr, w_ptr, scale_ptr, zero_ptr, dx_ptr, m, n, k, dy_st, w_st,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_MODE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, runs * planes): dx = dy @ W for the 32 (8 bits: 64) columns of one plane of one
    run.
    """
    PLANES: tl.constexpr = 1 if BITS == 8 else 16 // BITS
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    run, plane = tl.program_id(1) // PLANES, tl.program_id(1) % PLANES
    offs_w = tl.arange(0, WORDS)
    first = run * (WORDS * PLANES) + plane * WORDS
    dy_rows = tl.minimum(offs_m, m - 1).to(tl.int64)[:, None]
    acc = tl.zeros([BLOCK_M, WORDS], tl.float32)
    for c in tl.range(0, n, BLOCK_N):
        columns = c + tl.arange(0, BLOCK_N)
        there = columns < n
        dy = tl.load(dy_ptr + dy_rows * dy_st + columns[None, :], mask=there[None, :], other=0.0)
        words = tl.load(
            w_ptr + columns[:, None].to(tl.int64) * w_st + (run * WORDS + offs_w)[None, :],
            mask=there[:, None],
            other=0,
        )
        w = dequantise(words, plane, BITS, ZERO, DTYPE)
        if WORDS <= GROUP:
            group = tl.cast(tl.minimum(first, k - 1) // GROUP, tl.int64)
            s = tl.load(scale_ptr + group * n + columns, mask=there, other=0.0)[:, None]
        else:
            groups = tl.minimum(first + offs_w, k - 1) // GROUP
            s = tl.load(
                scale_ptr + groups[None, :].to(tl.int64) * n + columns[:, None],
                mask=there[:, None],
                other=0.0,
            )
        if ZERO_MODE == 1:
            w = w - tl.load(zero_ptr + group * n + columns, mask=there, other=0.0)[:, None].to(DTYPE)
        w = w * s.to(DTYPE)
        if ZERO_MODE == 2:
            w = w + tl.load(zero_ptr + group * n + columns, mask=there, other=0.0)[:, None].to(DTYPE)
        acc = tl.dot(dy, w, acc)
    at = first + offs_w
    out = dx_ptr + offs_m.to(tl.int64)[:, None] * k + at[None, :]
    tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=(offs_m[:, None] < m) & (at[None, :] < k))


def constants(weight: GpuWeight, dtype: Any) -> dict[str, Any]:
    """Return the compile-time constants that a weight's format fixes."""
    fmt = weight.format
    return {
        "BITS": fmt.bits, "GROUP": fmt.group_size, "ZERO": fmt.zero_point, "ZERO_MODE": ZERO_MODES[fmt.zero],
        "WORDS": 2 * RUN if fmt.bits == 8 else RUN,
        "DTYPE": tl.float16 if dtype == torch.float16 else tl.bfloat16,
    }  # fmt: skip


def launch(
    x: Tensor, weight: GpuWeight, bias: Tensor | None, residual: Tensor | None, y: Tensor,
    configuration: Mapping[str, Any], splits: int,
) -> None:  # fmt: skip
    """Launch the product of x [M, K] (fp16 or bf16, rows contiguous) into y [M, N]; see the kernels."""
    (m, k), n = x.shape, weight.n
    settings, fixed = dict(configuration), constants(weight, x.dtype)
    vector = settings.pop("vector")
    runs = triton.cdiv(k, weight.k_run)
    splits = min(splits, runs)
    parts = torch.empty(splits * m * n if splits > 1 or vector else 0, dtype=torch.float32, device=x.device)
    zero = weight.scale if weight.zero is None else weight.zero
    shared = (m, n, k, x.stride(0), weight.words.stride(0), triton.cdiv(runs, splits))
    flags = {"BIAS": bias is not None, "RESIDUAL": residual is not None}
    extras = (y if bias is None else bias, y if residual is None else residual)
    columns = triton.cdiv(n, settings["BLOCK_N"])
    if vector:
        settings["BLOCK_M"] = triton.next_power_of_2(m)
        matvec[(columns, splits)](x, weight.words, weight.scale, zero, parts, *shared, **fixed, **settings)
    else:
        after = m <= 16 and weight.format.zero != "minimum" and fixed["WORDS"] <= fixed["GROUP"]
        matmul[(triton.cdiv(m, settings["BLOCK_M"]) * columns, splits)](
            x, weight.words, weight.scale, zero, *extras, y, parts, *shared, **fixed,
            SCALE_AFTER=after, SPLIT=splits > 1, **flags, **settings,
        )  # fmt: skip
    if vector or splits > 1:
        sum_splits[(triton.cdiv(m * n, 1024),)](parts, *extras, y, m * n, n, splits, BLOCK=1024, **flags)


def grad_x(dy: Tensor, weight: GpuWeight, configuration: Mapping[str, Any]) -> Tensor:
    """Return dy [M, N] @ W as [M, K] in dy's dtype."""
    m, k = dy.shape[0], weight.k
    dx = torch.empty(m, k, dtype=dy.dtype, device=dy.device)
    planes = 16 // weight.format.bits if weight.format.bits < 8 else 1
    grid = (triton.cdiv(m, configuration["BLOCK_M"]), triton.cdiv(k, weight.k_run) * planes)
    matmul_grad_x[grid](
        dy, weight.words, weight.scale, weight.scale if weight.zero is None else weight.zero, dx, m,
            weight.n, k,
        dy.stride(0), weight.words.stride(0), **constants(weight, dy.dtype), **configuration,
    )  # fmt: skip
    return dx
