"""Triton kernels on the CPU, by Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest tests/triton`.

Triton reads the variable when it is imported, so these tests have a process of their own.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Fresh numbers, the same in every run."""
    torch.manual_seed(0)


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Relative L2 error; NaN (an output that was not written) never passes."""
    assert got.shape == want.shape
    a, b = got.detach().double(), want.detach().double()
    finite = b.isfinite()
    assert torch.equal(a[~finite], b[~finite])
    error = (a[finite] - b[finite]).norm() / b[finite].norm().clamp_min(1e-30)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def nan_like(shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> Tensor:
    """An output that nothing was written to."""
    return torch.full(shape, torch.nan, dtype=dtype)
