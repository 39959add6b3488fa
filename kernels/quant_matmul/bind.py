"""From a loaded library to a callable on torch tensors. Needs no TVM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...compiler.target import Target
from ..shared.scratch import COUNTER_BYTES, scratch
from .packing import PackedWeight
from .sizes import TILE, element_bytes, is_integer, line, padded_k, panel_bytes, uses_matrix
from .spec import QuantMatmulSpec


def bind(
    spec: QuantMatmulSpec, configuration: Mapping[str, Any], target: Target, library: Any
) -> Callable[..., torch.Tensor]:
    """Return call(x [M, K] contiguous, weight, bias, residual [M, N] contiguous) -> y [M, N_out].

    `call.row(x, weight, bias, y)` is the same for one row (see `Row`; bias 0: none), or None where that has
    no kernel.
    """
    gemm = library.function("gemm")
    gemv, rows = (None, None) if uses_matrix(spec) else (library.function("gemv"), library.function("rows"))
    small, large, switch = (int(configuration[n]) for n in ("small_rows", "large_rows", "gemm_from"))
    if uses_matrix(spec):
        small = large = 2 * TILE
    wide_rows = 0 if uses_matrix(spec) else int(configuration["wide_rows"])
    wide = library.function("wide") if wide_rows else None
    isa = str(configuration.get("isa") or target.isa)
    groups = spec.weight.groups(spec.k) if is_integer(spec) else 0
    k_padded, panel, code_size = padded_k(spec), panel_bytes(spec, isa), element_bytes(spec, isa)
    n_out = spec.n_out

    def call(
        x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        m = x.shape[0]
        y = torch.empty((m, n_out), dtype=x.dtype)
        if m == 0:
            return y
        threads = torch.get_num_threads()
        if gemv is not None and m == 1:
            function, padded = gemv, 1
        elif wide is not None and small < m < switch:
            function, padded = wide, -(-m // wide_rows) * wide_rows
        elif rows is not None and m < switch:
            function, padded = rows, -(-m // small) * small
        else:
            function, padded = gemm, -(-m // large) * large
        codes = line(padded * k_padded * code_size)
        scales = line(padded * groups * 4)
        panels = threads * panel if function is gemm else 0
        base = scratch(codes + 2 * scales + panels + COUNTER_BYTES)
        function(
            m,
            threads,
            1,
            x.data_ptr(),
            weight.buffer.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            y.data_ptr(),
            base,
            base + codes,
            base + codes + scales,
            base + codes + 2 * scales,
            base + codes + 2 * scales + panels,
        )
        return y

    row = None if gemv is None else Row(gemv, line(k_padded * code_size), line(groups * 4))
    call.row = row  # pyright: ignore[reportFunctionMemberAccess]
    return call


class Row:
    """One row at bare addresses, unchecked: for callers that have checked, and count microseconds."""

    def __init__(self, gemv: Callable[..., Any], codes: int, scales: int) -> None:
        self.gemv, self.nbytes = gemv, codes + 2 * scales + COUNTER_BYTES
        self._areas = (codes, codes + scales, codes + 2 * scales)

    def areas(self, base: int) -> tuple[int, ...]:
        """Return the last arguments of `gemv`: where its areas lie in `nbytes` bytes of scratch at `base`."""
        codes, sums, end = self._areas
        return base, base + codes, base + sums, base + end, base + end

    def __call__(self, x: int, weight: int, bias: int, y: int, residual: int = 0) -> None:
        base = scratch(self.nbytes)
        codes, sums, end = self._areas
        at = base + end
        threads = torch.get_num_threads()
        self.gemv(1, threads, 1, x, weight, bias, residual, y, base, base + codes, base + sums, at, at)
