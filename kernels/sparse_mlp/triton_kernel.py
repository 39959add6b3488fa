"""The sparse MLP in Triton for a few rows: blocks of 32 neurons that do not fire are skipped.

Whether a block fires is a flag in memory that programs read: no list, so nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant_matmul.triton_matmul import dequantise
from ..quant_matmul.triton_packing import RUN, ZERO_MODES, GpuWeight, pack_gpu
from ..quant_matmul.weight_format import CanonicalWeight

NEURONS = 32
ACTIVATIONS = {"silu": 0, "relu": 1, "gelu_tanh": 2}


@dataclass(frozen=True)
class GpuSparseWeights:
    """Gate, up [F, K] as `pack_gpu` lays them out, and down turned: a row a neuron, scales [F / group, K]."""

    gate: GpuWeight
    up: GpuWeight
    down: GpuWeight


def pack_sparse(gate: CanonicalWeight, up: CanonicalWeight, down: CanonicalWeight) -> GpuSparseWeights:
    """Lay an MLP out; `down` [K, F] keeps its groups along F, one scale for `group_size` neighbouring
    rows.
    """
    fmt = down.format
    assert down.scale is not None
    turned = CanonicalWeight(fmt, down.codes.T.contiguous(), down.scale)
    packed = pack_gpu(turned)
    flat = lambda t: None if t is None else t.T.contiguous()  # noqa: E731
    zero = None if down.zero is None else flat(down.zero.half() if fmt.zero == "integer" else down.zero)
    scale = flat(down.scale)
    assert scale is not None
    return GpuSparseWeights(
        pack_gpu(gate), pack_gpu(up), GpuWeight(fmt, down.k, down.n, packed.words, scale, zero)
    )


@triton.jit
def _rows(
    x_ptr, w_ptr, scale_ptr, zero_ptr, neurons, m, f, k, x_st, w_st,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_MODE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """x [M, K] times the rows `neurons` of W: fp32 [BLOCK_M, BLOCK_F]."""
    PLANES: tl.constexpr = 16 // BITS
    offs_w, offs_m = tl.arange(0, WORDS), tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_F, WORDS], tl.float32)
    for run in tl.range(0, tl.cdiv(k, WORDS * PLANES)):
        words = tl.load(w_ptr + neurons[:, None].to(tl.int64) * w_st + (run * WORDS + offs_w)[None, :])
        for plane in tl.static_range(PLANES):
            first = run * (WORDS * PLANES) + plane * WORDS
            at = first + offs_w
            x = tl.load(
                x_ptr + offs_m[:, None] * x_st + at[None, :],
                mask=(offs_m[:, None] < m) & (at[None, :] < k),
                other=0.0,
            )
            group = tl.cast(tl.minimum(first, k - 1) // GROUP, tl.int64)
            w = dequantise(words, tl.full([1, 1], plane, tl.int32), BITS, ZERO, DTYPE).to(tl.float32)
            if ZERO_MODE == 1:
                w = w - tl.load(zero_ptr + group * f + neurons)[:, None].to(tl.float32)
            w = w * tl.load(scale_ptr + group * f + neurons)[:, None].to(tl.float32)
            if ZERO_MODE == 2:
                w = w + tl.load(zero_ptr + group * f + neurons)[:, None].to(tl.float32)
            acc += w[None, :, :] * x[:, None, :].to(tl.float32)
    return tl.sum(acc, 2)


@triton.jit
def _activate(x, KIND: tl.constexpr):
    if KIND == 0:
        y = x * tl.sigmoid(x)
    elif KIND == 1:
        y = tl.where(x < 0.0, 0.0, x)
    else:
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return y


@triton.jit
def sparse_gates(
    x_ptr, w_ptr, scale_ptr, zero_ptr, gates_ptr, fires_ptr, threshold, m, f, k, x_st, w_st,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_MODE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr,
        KIND: tl.constexpr,
):  # fmt: skip
    """Grid (blocks): act(gate) fp32 [M, F], and for each row whether the block fires (int32 [M, blocks])."""
    block = tl.program_id(0)
    neurons = block * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_m = tl.arange(0, BLOCK_M)
    gate = _rows(x_ptr, w_ptr, scale_ptr, zero_ptr, neurons, m, f, k, x_st, w_st,
                 BITS, GROUP, ZERO, ZERO_MODE, BLOCK_M, BLOCK_F, WORDS, DTYPE)  # fmt: skip
    gate = _activate(gate, KIND)
    inside = offs_m < m
    tl.store(gates_ptr + offs_m[:, None] * f + neurons[None, :], gate, mask=inside[:, None])
    fires = tl.max(tl.where(tl.abs(gate) < threshold, 0, 1), 1)
    tl.store(fires_ptr + offs_m * (f // BLOCK_F) + block, fires, mask=inside)


@triton.jit
def sparse_hidden(
    x_ptr, w_ptr, scale_ptr, zero_ptr, gates_ptr, fires_ptr, m, f, k, x_st, w_st, blocks_per_flag,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_MODE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks): gates becomes act(gate) * up where a row's block fires, else 0; up is read where one
    does.
    """
    block = tl.program_id(0)
    neurons = block * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_m = tl.arange(0, BLOCK_M)
    inside = offs_m < m
    fires = tl.load(fires_ptr + offs_m * (f // BLOCK_F // blocks_per_flag) + block // blocks_per_flag,
                    mask=inside, other=0)  # fmt: skip
    if tl.max(fires, 0) > 0:
        up = _rows(x_ptr, w_ptr, scale_ptr, zero_ptr, neurons, m, f, k, x_st, w_st,
                   BITS, GROUP, ZERO, ZERO_MODE, BLOCK_M, BLOCK_F, WORDS, DTYPE)  # fmt: skip
        at = gates_ptr + offs_m[:, None] * f + neurons[None, :]
        gate = tl.load(at, mask=inside[:, None], other=0.0)
        tl.store(at, tl.where(fires[:, None] > 0, gate * up, 0.0), mask=inside[:, None])


@triton.jit
def sparse_down(
    h_ptr, w_ptr, scale_ptr, zero_ptr, fires_ptr, part_ptr, m, f, n, w_st, flags, flag_neurons,
        blocks_per_split,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_MODE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (runs of outputs * planes, splits of the blocks): part[split, m, n] fp32."""
    PLANES: tl.constexpr = 16 // BITS
    run, plane, split = tl.program_id(0) // PLANES, tl.program_id(0) % PLANES, tl.program_id(1)
    offs_w, offs_m, offs_f = tl.arange(0, WORDS), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_F)
    outputs = run * (WORDS * PLANES) + plane * WORDS + offs_w
    columns = tl.minimum(outputs, n - 1)
    inside = offs_m < m
    acc = tl.zeros([BLOCK_M, WORDS], tl.float32)
    stop = tl.minimum((split + 1) * blocks_per_split, f // BLOCK_F)
    for block in tl.range(split * blocks_per_split, stop):
        first = block * BLOCK_F
        fires = tl.load(fires_ptr + offs_m * flags + first // flag_neurons, mask=inside, other=0)
        if tl.max(fires, 0) > 0:
            rows = (first + offs_f).to(tl.int64)
            words = tl.load(w_ptr + rows[:, None] * w_st + (run * WORDS + offs_w)[None, :])
            w = dequantise(words, plane, BITS, ZERO, DTYPE).to(tl.float32)
            group = tl.cast(first // GROUP, tl.int64)
            if ZERO_MODE == 1:
                w = w - tl.load(zero_ptr + group * n + columns)[None, :].to(tl.float32)
            w = w * tl.load(scale_ptr + group * n + columns)[None, :].to(tl.float32)
            if ZERO_MODE == 2:
                w = w + tl.load(zero_ptr + group * n + columns)[None, :].to(tl.float32)
            used = inside & (fires > 0)
            h = tl.load(
                h_ptr + offs_m[:, None] * f + (first + offs_f)[None, :], mask=used[:, None], other=0.0
            )
            acc += tl.sum(h[:, :, None] * w[None, :, :], 1)
    at = part_ptr + (split * m + offs_m).to(tl.int64)[:, None] * n + outputs[None, :]
    tl.store(at, acc, mask=inside[:, None] & (outputs[None, :] < n))


def launch(
    x: Tensor, weights: GpuSparseWeights, y: Tensor, *, threshold: float, fires: Tensor | None, block: int,
    activation: str, splits: int, configuration: Mapping[str, Any],
) -> None:  # fmt: skip
    """Launch the three kernels on x [M <= 16, K] into y [M, K]; `fires` int32 [M, F / block] or None."""
    m, k = x.shape
    f = weights.gate.n
    kind = tl.float16 if x.dtype == torch.float16 else tl.bfloat16
    rows = {"BLOCK_M": triton.next_power_of_2(m), "BLOCK_F": NEURONS, "DTYPE": kind, **configuration}
    gates = torch.empty(m, f, dtype=torch.float32, device=x.device)
    given, own = fires, torch.empty(m, f // NEURONS, dtype=torch.int32, device=x.device)
    limit = threshold if given is None else 0.0
    sparse_gates[(f // NEURONS,)](
        x, *_buffers(weights.gate), gates, own, limit, m, f, k, x.stride(0), weights.gate.words.stride(0),
        KIND=ACTIVATIONS[activation], **_constants(weights.gate), **rows,
    )  # fmt: skip
    if given is None:  # a block of neurons fires where one of its parts does
        given = own.view(m, f // block, block // NEURONS).amax(2).contiguous()
    sparse_hidden[(f // NEURONS,)](
        x, *_buffers(weights.up), gates, given, m, f, k, x.stride(0), weights.up.words.stride(0),
            block // NEURONS,
        **_constants(weights.up), **rows,
    )  # fmt: skip
    parts = torch.empty(splits * m * k, dtype=torch.float32, device=x.device)
    planes = 16 // weights.down.format.bits
    sparse_down[(triton.cdiv(k, RUN * planes) * planes, splits)](
        gates, *_buffers(weights.down), given, parts, m, f, k, weights.down.words.stride(0), f // block,
            block,
        triton.cdiv(f // NEURONS, splits), **_constants(weights.down), **rows,
    )  # fmt: skip
    from ..quant_matmul.triton_matmul import sum_splits

    sum_splits[(triton.cdiv(m * k, 1024),)](
        parts, y, y, y, m * k, k, splits, BLOCK=1024, BIAS=False, RESIDUAL=False
    )


def _buffers(weight: GpuWeight) -> tuple[Tensor, Tensor, Tensor]:
    return weight.words, weight.scale, weight.scale if weight.zero is None else weight.zero


def _constants(weight: GpuWeight) -> dict[str, Any]:
    fmt = weight.format
    return {
        "BITS": fmt.bits, "GROUP": fmt.group_size, "ZERO": fmt.zero_point, "ZERO_MODE": ZERO_MODES[fmt.zero],
        "WORDS": RUN,
    }  # fmt: skip
