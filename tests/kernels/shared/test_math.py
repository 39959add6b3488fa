"""Shared vector arithmetic: exp, gates and tanh at all lane counts, at fp32's edges, deeply nested."""

from __future__ import annotations

import time

import pytest
import torch

from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.target import Target, detect

HOST = detect()


def compiled(emit, lanes: int, target: Target, tmp_path):
    from edgeformer.kernels.shared import tir

    k = tir.Kernel("apply", [("x", "*float32"), ("y", "*float32"), ("count", "int64")])
    with tir.loop(k["count"]) as i:
        tir.store(k["y"], i * lanes, emit(tir.load(k["x"], i * lanes, lanes)))
    functions = [k.finish()]
    tvm_llvm.build(functions, target, tmp_path)
    function = tvm_llvm.load(tmp_path / tvm_llvm.LIBRARY_NAME).function("apply")

    def call(x: torch.Tensor) -> torch.Tensor:
        y = torch.full_like(x, torch.nan)
        function(x.data_ptr(), y.data_ptr(), x.numel() // lanes)
        return y

    return call


@pytest.mark.parametrize("isa", sorted({HOST.isa, "portable"}))
@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_exp(isa: str, lanes: int, tmp_path) -> None:
    from edgeformer.kernels.shared import math

    call = compiled(math.exp, lanes, HOST.with_isa(isa), tmp_path)
    x = torch.linspace(-86.9, 88.7, 1 << 18)
    want = x.double().exp()
    assert ((call(x).double() - want) / want).abs().max() <= 1e-6
    edges = torch.tensor(
        [-torch.inf, -1e38, -200.0, -88.0, 0.0, -0.0, 88.73, 89.5, 1e30, torch.inf, torch.nan, 1.0]
    )
    got = call(edges.repeat(4))[:12]
    assert got[:4].tolist() == [0.0] * 4 and got[4:6].tolist() == [1.0, 1.0]
    assert got[6:10].isinf().all() and got[10].isnan() and not got[11].isnan()


@pytest.mark.parametrize("lanes", [1, 8])
def test_silu_and_sigmoid(lanes: int, tmp_path) -> None:
    from edgeformer.kernels.shared import math

    x = torch.linspace(-80, 80, 1 << 16)
    for name, emit, want in (("a", math.silu, torch.nn.functional.silu), ("b", math.sigmoid, torch.sigmoid)):
        (tmp_path / name).mkdir()
        got = compiled(emit, lanes, HOST, tmp_path / name)(x)
        assert (
            (got.double() - want(x.double())) / want(x.double()).abs().clamp_min(1e-30)
        ).abs().max() <= 1e-6


@pytest.mark.parametrize("lanes", [1, 8])
def test_gelu_and_tanh(lanes: int, tmp_path) -> None:
    from edgeformer.kernels.shared import math

    x = torch.linspace(-30, 30, 1 << 16)
    edges = torch.tensor([0.0, -0.0, 1e-30, 1e20, -1e20, torch.inf, torch.nan, 1e-3])
    (tmp_path / "gelu").mkdir()
    gelu = compiled(math.gelu, lanes, HOST, tmp_path / "gelu")
    inner = 2 * (2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)
    want = x.double() * inner.sigmoid()  # torch's 1 + tanh cancels where x is far below zero
    error = (gelu(x).double() - want).abs() / want.abs().clamp_min(1e-30)
    assert error[x > -3].max() <= 4e-6 and error.max() <= 3e-5
    torch.testing.assert_close(gelu(x), torch.nn.functional.gelu(x, approximate="tanh"), rtol=2e-6, atol=1e-6)
    got = gelu(edges.repeat(4))[:8]
    assert got[[0, 1, 4]].abs().max() == 0 and got[3] == 1e20 and got[5].isinf() and got[6].isnan()
    (tmp_path / "tanh").mkdir()
    tanh = compiled(math.tanh, lanes, HOST, tmp_path / "tanh")
    assert ((tanh(x).double() - x.double().tanh()).abs() <= 1e-6 * x.double().tanh().abs()).all()
    got = tanh(edges.repeat(4))[:8]
    torch.testing.assert_close(got[3:6], torch.tensor([1.0, -1.0, 1.0]), rtol=1e-6, atol=0)
    assert got[:2].eq(0).all() and got[6].isnan()


def test_nesting_compiles_in_seconds() -> None:
    from edgeformer.kernels.shared import math, tir

    k = tir.Kernel("nested", [("x", "*float32"), ("y", "*float32")])
    value = tir.load(k["x"], 0, 8)
    for _ in range(4):
        value = math.silu(math.exp(value))
    tir.store(k["y"], 0, math.fold(value, lambda a, b: a + b))
    function, start = k.finish(), time.process_time()
    tvm_llvm.inspect([function], HOST)
    assert time.process_time() - start < 5


def test_pieces() -> None:
    from edgeformer.kernels.shared.math import pieces

    assert pieces(13, 8) == [(0, 8), (8, 4), (12, 1)] and pieces(0, 8) == []
    assert pieces(35, 16) == [(0, 16), (16, 16), (32, 2), (34, 1)]
