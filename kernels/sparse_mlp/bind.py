"""From a loaded library to a callable on torch tensors. Needs no TVM."""

from __future__ import annotations

import array
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...compiler.errors import UnsupportedError
from ...compiler.target import Target
from ..quant_matmul.packing import PackedWeight
from ..shared.scratch import scratch
from .sizes import area
from .spec import SparseMlpSpec


def bind(
    spec: SparseMlpSpec, configuration: Mapping[str, Any], target: Target, library: Any
) -> Callable[..., Tensor]:
    """Return call(x [M, K], gate_up, down, threshold=, indices=, out=) -> y [M, K]; see reference.py."""
    one_row, some_rows = library.function("sparse_1"), library.function("sparse_n")
    small, dense_from = int(configuration["small_rows"]), int(configuration["dense_from"])
    isa = str(configuration.get("isa") or target.isa)
    dense_blocks = -(-spec.blocks * dense_from // 100)

    def call(
        x: Tensor,
        gate_up: PackedWeight,
        down: PackedWeight,
        *,
        threshold: float = 0.0,
        indices: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        indices = check(spec, x, gate_up, down, indices)
        m = x.shape[0]
        y = torch.empty(m, spec.hidden, dtype=x.dtype) if out is None else out
        if m == 0:
            return y
        padded = m if m == 1 else -(-m // small) * small
        places = area(spec, isa, padded)
        base = scratch(places.nbytes)
        (one_row if m == 1 else some_rows)(
            m, torch.get_num_threads(), 1, x.data_ptr(), gate_up.buffer.data_ptr(), down.buffer.data_ptr(),
            y.data_ptr(), threshold,
            base + places.listed if indices is None else indices.data_ptr(),
            0 if indices is None else indices.numel(), dense_blocks, fired(gate_up),
            base + places.x_codes, base + places.x_scales, base + places.x_sums, base + places.gates,
            base + places.h_codes, base + places.h_scales, base + places.h_sums, base + places.flags,
        )  # fmt: skip
        return y

    return call


def fired(gate_up: PackedWeight) -> int:
    """Return where the number of blocks that fired for the last single row of a weight is kept (int32)."""
    held = gate_up.__dict__.get("fired_blocks")
    if held is None:
        held = gate_up.__dict__["fired_blocks"] = array.array("i", [0])
    return held.buffer_info()[0]


def check(
    spec: SparseMlpSpec, x: Tensor, gate_up: PackedWeight, down: PackedWeight, indices: Tensor | None
) -> Tensor | None:
    """Return the indices as the kernels read them. Raises UnsupportedError for what does not fit."""
    if x.dim() != 2 or x.shape[1] != spec.hidden or not x.is_contiguous():
        raise UnsupportedError(f"x is {tuple(x.shape)}, not contiguous [M, {spec.hidden}]")
    if x.dtype != getattr(torch, spec.x_dtype):
        raise UnsupportedError(f"x is {x.dtype}, not {spec.x_dtype}")
    if (gate_up.n, gate_up.k) != (2 * spec.neurons, spec.hidden) or not gate_up.pair:
        raise UnsupportedError(f"{gate_up!r} is not the pair of gate and up of {spec.key()}")
    if (down.n, down.k) != (spec.hidden, spec.neurons) or down.pair:
        raise UnsupportedError(f"{down!r} is not the down weight of {spec.key()}")
    if (indices is not None) != (spec.select == "indices"):
        raise UnsupportedError(f"selection {spec.select!r} and indices do not fit together")
    if indices is None:
        return None
    listed = indices.to(torch.int32).contiguous()
    if listed.dim() != 1 or listed.numel() > spec.blocks:
        raise UnsupportedError(f"indices are {tuple(indices.shape)}, not [n <= {spec.blocks}]")
    if listed.numel() and (int(listed[0]) < 0 or int(listed[-1]) >= spec.blocks):
        raise UnsupportedError(f"indices must lie in [0, {spec.blocks})")
    if not bool((listed[1:] > listed[:-1]).all()):
        raise UnsupportedError("indices must be ascending, without repetition")
    return listed
