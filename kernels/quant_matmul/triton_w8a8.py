"""Quantised matmul with int8 activations in Triton: rows of x by groups to int8, then int8 matrix
instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_packing import GpuWeight


@triton.jit
def quantise_rows(
    x_ptr, codes_ptr, scale_ptr, k, groups, x_st, c_st, GROUP: tl.constexpr, BLOCK_G: tl.constexpr
):  # fmt: skip
    """Grid (rows, blocks of groups): symmetric, absmax / 127, round half to even; NaN or Inf: a NaN scale."""
    row, group = tl.program_id(0), tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64) * x_st + at, mask=at < k, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 1)
    finite = tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1) == 0  # NaN is not below Inf
    usable = finite & (largest >= 7.52316384526264e-37)  # 2**-120
    value = x * tl.where(usable, 127.0 / tl.where(usable, largest, 1.0), 0.0)[:, None]
    value = tl.where(finite[:, None], value, 0.0)
    rounded = (value + 12582912.0) - 12582912.0  # 1.5 * 2**23: to the nearest even integer
    there = group < groups
    tl.store(codes_ptr + row.to(tl.int64) * c_st + at, rounded.to(tl.int8), mask=there[:, None])
    scale = tl.where(usable, largest / 127.0, tl.where(finite, 0.0, float("nan")))
    tl.store(scale_ptr + row.to(tl.int64) * groups + group, scale, mask=there)


@triton.jit
def matmul_w8a8(
    a_ptr, w_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, y_ptr, m, n, groups, a_st, w_st,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr,
        RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks * column blocks): a group's products are summed exactly in int32, then scaled."""
    blocks = tl.cdiv(m, BLOCK_M)
    row_block, column_block = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    offs_m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, GROUP)
    rows, columns = tl.minimum(offs_m, m - 1), tl.minimum(offs_n, n - 1)
    a_at = a_ptr + rows[:, None].to(tl.int64) * a_st + offs_k[None, :]
    w_at = w_ptr + columns[None, :].to(tl.int64) * w_st + offs_k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in tl.range(0, groups):
        a = tl.load(a_at + group * GROUP)
        w = tl.load(w_at + group * GROUP)
        dots = tl.dot(a, w, out_dtype=tl.int32).to(tl.float32)
        a_scale = tl.load(a_scale_ptr + rows.to(tl.int64) * groups + group)
        w_scale = tl.load(w_scale_ptr + tl.cast(group, tl.int64) * n + columns).to(tl.float32)
        acc += dots * (a_scale[:, None] * w_scale[None, :])
    inside = (offs_m[:, None] < m) & (offs_n[None, :] < n)
    at = offs_m.to(tl.int64)[:, None] * n + offs_n[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + columns)[None, :].to(tl.float32)
    if RESIDUAL:
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)


def quantise(x: Tensor, codes: Tensor, scales: Tensor, group: int) -> None:
    """Launch `quantise_rows` on x [M, K] into int8 codes [M, >= groups * group] and fp32 scales [M,
    groups].
    """
    (m, k), groups = x.shape, scales.shape[1]
    block = 2048 // group
    quantise_rows[(m, triton.cdiv(groups, block))](
        x, codes, scales, k, groups, x.stride(0), codes.stride(0), GROUP=group, BLOCK_G=block, num_warps=4
    )


def launch(
    x: Tensor, weight: GpuWeight, bias: Tensor | None, residual: Tensor | None, y: Tensor,
    configuration: Mapping[str, Any],
) -> None:  # fmt: skip
    """Quantise x [M, K] and multiply it with an int8 weight into y [M, N]."""
    (m, k), group = x.shape, weight.format.group_size
    groups = weight.format.groups(k)
    codes = torch.empty(m, max(weight.words.shape[1], groups * group), dtype=torch.int8, device=x.device)
    scales = torch.empty(m, groups, dtype=torch.float32, device=x.device)
    quantise(x, codes, scales, group)
    grid = (triton.cdiv(m, configuration["BLOCK_M"]) * triton.cdiv(weight.n, configuration["BLOCK_N"]),)
    matmul_w8a8[grid](
        codes, weight.words, scales, weight.scale, y if bias is None else bias,
            y if residual is None else residual,
        y, m, weight.n, groups, codes.stride(0), weight.words.stride(0), GROUP=group,
        BIAS=bias is not None, RESIDUAL=residual is not None, **configuration,
    )  # fmt: skip
