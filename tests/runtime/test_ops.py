"""The functions that models call: shapes, wrong arguments, gradients, and calls from several threads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from edgeformer.compiler.errors import DeclinedError, UnsupportedError
from edgeformer.compiler.target import detect
from edgeformer.kernels.attention.space import fastest_math
from edgeformer.kernels.quant_matmul import CanonicalWeight, PackedWeight, WeightFormat, pack
from edgeformer.kernels.quant_matmul.space import fastest_activation
from edgeformer.runtime import dispatch, ops
from edgeformer.runtime.kv_cache import KVCache

N, K = 40, 70
FORMS = ["tvm_cpu", "reference"]


@pytest.fixture(autouse=True)
def _this_host() -> Iterator[None]:
    yield
    dispatch.use_target(None)


def weight_of(fmt: WeightFormat, pair: bool = False) -> tuple[CanonicalWeight, PackedWeight]:
    canonical = CanonicalWeight.from_float(torch.randn(N, K), fmt)
    return canonical, pack(canonical, pair=pair)


@pytest.fixture
def int4() -> PackedWeight:
    return weight_of(WeightFormat.int4())[1]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3), (2, 0), (2, 1, 3), (0,)])
def test_any_leading_dimensions(int4: PackedWeight, form: str, lead: tuple[int, ...]) -> None:
    x = torch.randn(*lead, K)
    got = ops.quant_matmul(x, int4, form=form)
    assert got.shape == (*lead, N) and got.dtype == x.dtype
    if x.numel():
        flat = ops.quant_matmul(x.reshape(-1, K), int4, form="reference")
        assert relative(got.reshape(-1, N), flat) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_views_that_are_not_contiguous(int4: PackedWeight, form: str) -> None:
    base = torch.randn(3, 2 * K + 5, 4)
    views = [
        base[:, :K, 0],
        base[:, 5 : 5 + 2 * K : 2, 1],
        base.permute(0, 2, 1)[..., 3 : 3 + K],
        base[0, :K].T,
    ]
    residual = torch.randn(N, 3).T
    for x in views:
        assert (
            relative(
                ops.quant_matmul(x, int4, form=form), ops.quant_matmul(x.clone(), int4, form="reference")
            )
            < 1e-5
        )
    got = ops.quant_matmul(views[0], int4, residual=residual, form=form)
    assert relative(got, ops.quant_matmul(views[0], int4, form="reference") + residual) < 1e-5
    wide = torch.randn(1, K).expand(5, K)
    assert (
        relative(
            ops.quant_matmul(wide, int4, form=form), ops.quant_matmul(wide.clone(), int4, form="reference")
        )
        < 1e-5
    )


def test_arguments_are_never_written(int4: PackedWeight) -> None:
    x, residual, bias = torch.randn(5, K), torch.randn(5, N), torch.randn(N)
    copies = [t.clone() for t in (x, residual, bias, int4.buffer)]
    ops.quant_matmul(x, int4, bias=bias, residual=residual)
    assert all(torch.equal(a, b) for a, b in zip((x, residual, bias, int4.buffer), copies, strict=True))


WRONG = {
    "columns": (lambda: {"x": torch.randn(2, K + 1)}, r"x is \(2, 71\).*wants \[..., 70\]"),
    "scalar": (lambda: {"x": torch.tensor(1.0)}, r"x is \(\)"),
    "x dtype": (lambda: {"x": torch.randn(2, K, dtype=torch.float64)}, "x is torch.float64; use float32"),
    "x integers": (lambda: {"x": torch.ones(2, K, dtype=torch.int8)}, "x is torch.int8"),
    "x device": (lambda: {"x": torch.empty(2, K, device="meta")}, "no form for device meta"),
    "bias shape": (lambda: {"bias": torch.randn(N + 1)}, r"bias is \(41,\).*\[40\]"),
    "bias dtype": (lambda: {"bias": torch.randn(N).bfloat16()}, "bias is .*bfloat16, not contiguous float32"),
    "bias strides": (lambda: {"bias": torch.randn(2 * N)[::2]}, "not contiguous float32"),
    "residual shape": (lambda: {"residual": torch.randn(2, N - 1)}, r"residual is \(2, 39\).*not \(2, 40\)"),
    "residual rows": (lambda: {"residual": torch.randn(1, N)}, "residual is"),
    "residual dtype": (lambda: {"residual": torch.randn(2, N).half()}, "residual is .*float16"),
    "residual device": (lambda: {"residual": torch.empty(2, N, device="meta")}, "residual is"),
    "epilogue": (lambda: {"epilogue": "gelu"}, "unknown .*gelu"),
    "activation": (lambda: {"activation": "int3"}, "unknown activation 'int3'"),
    "no pair": (lambda: {"epilogue": "silu_pair"}, "'silu_pair' does not fit a weight in layout"),
}


@pytest.mark.parametrize("form", [None, "reference"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_typed_errors_also_after_a_good_call(
    int4: PackedWeight, case: str, form: str | None
) -> None:
    make, text = WRONG[case]
    good = {"x": torch.randn(2, K), "bias": torch.randn(N), "residual": torch.randn(2, N), "form": form}
    for _ in range(2):
        arguments = good | make()
        with pytest.raises(UnsupportedError, match=text):
            ops.quant_matmul(arguments.pop("x"), int4, **arguments)
        again = dict(good)
        ops.quant_matmul(again.pop("x"), int4, **again)


def test_a_pair_needs_its_epilogue() -> None:
    packed = weight_of(WeightFormat.int4(), pair=True)[1]
    with pytest.raises(UnsupportedError, match="'none' does not fit a weight in layout n32.unsigned.pair"):
        ops.quant_matmul(torch.randn(2, K), packed)


def test_a_weight_packed_for_another_instruction_set_is_refused() -> None:
    """An int8 layout of the wrong kind would give wrong numbers without a word."""
    isa = "portable" if detect().isa == "avx2" else "avx2"
    canonical = weight_of(WeightFormat.int8())[0]
    x, foreign = torch.randn(2, K), pack(canonical, detect().with_isa(isa))
    with pytest.raises(UnsupportedError, match=r"layout n32\..*pack\(weight.unpack\(\), target\)"):
        ops.quant_matmul(x, foreign)
    good = pack(foreign.unpack())
    want = ops.quant_matmul(x, good, form="reference")
    assert relative(ops.quant_matmul(x, good), want) < 1e-5
    dispatch.use_target(detect().with_isa("portable"))
    moved = pack(canonical, dispatch.current_target())
    assert relative(ops.quant_matmul(x, moved), want) < 1e-5


def test_a_form_that_declines_raises_and_an_automatic_choice_reports() -> None:
    packed = weight_of(WeightFormat.int8(32, "minimum"))[1]
    x = torch.randn(2, K)
    with pytest.raises(DeclinedError, match="tvm_cpu: 8-bit weights with a stored zero"):
        ops.quant_matmul(x, packed, form="tvm_cpu")
    with pytest.raises(DeclinedError, match="no such form; forms: tvm_cpu, .*reference"):
        ops.quant_matmul(x, packed, form="nonsense")
    assert torch.equal(ops.quant_matmul(x, packed), ops.quant_matmul(x, packed, form="reference"))
    mine = [
        d for d in ops.describe_bound() if d["operator"] == "quant_matmul" and "int8g32minimum" in d["spec"]
    ]
    assert {d["form"] for d in mine} == {"reference"}
    assert any("8-bit" in reason for d in mine for _, reason in d["declined"])


def test_float_weights_ignore_the_activation_type() -> None:
    canonical, packed = weight_of(WeightFormat.float("float32"))
    x = torch.randn(3, K)
    for activation in ("int8", "float"):
        assert relative(ops.quant_matmul(x, packed, activation=activation), x @ canonical.codes.T) < 1e-5


AUTO_FORMATS = [WeightFormat.int4(), WeightFormat.float("bfloat16"), WeightFormat.float("float16")]


@pytest.mark.parametrize("fmt", AUTO_FORMATS, ids=WeightFormat.key)
@pytest.mark.parametrize("lead", [(0,), (8,), (2, 4), (9,), (3, 3)])
def test_auto_is_the_fastest_for_all_leading_dimensions(fmt: WeightFormat, lead: tuple[int, ...]) -> None:
    canonical, packed = weight_of(fmt)
    x, residual = torch.randn(*lead, K), torch.randn(*lead, N)
    chosen = fastest_activation(math.prod(lead), fmt, dispatch.current_target())
    got = ops.quant_matmul(x, packed, residual=residual, activation="auto")
    assert torch.equal(got, ops.quant_matmul(x, packed, residual=residual, activation=chosen))
    if chosen == "bfloat16" and math.prod(lead):
        exact = x.bfloat16().double() @ canonical.dequantize().bfloat16().double().T + residual
        assert relative(got, exact) < 1e-5
        assert any(" bfloat16 " in d["spec"] for d in ops.describe_bound() if d["form"] == "tvm_cpu")


def test_auto_asks_for_the_target_in_use(monkeypatch: pytest.MonkeyPatch, int4: PackedWeight) -> None:
    asked: list[tuple[Any, ...]] = []

    def fastest(*arguments: Any) -> str:
        asked.append(arguments)
        return "float"

    monkeypatch.setattr(ops, "fastest_activation", fastest)
    x = torch.randn(2, 3, K)
    want = ops.quant_matmul(x, int4, activation="float")
    assert not asked
    assert torch.equal(ops.quant_matmul(x, int4, activation="auto"), want)
    got = ops.quant_matmul(x.clone().requires_grad_(), int4, activation="auto")
    assert torch.equal(got.detach(), want)
    assert asked == [(6, int4.format, dispatch.current_target())] * 2


def test_bf16_activations_without_a_matrix_unit_take_the_reference(int4: PackedWeight) -> None:
    x = torch.randn(20, K)
    dispatch.use_target(detect().with_isa("portable"))
    packed = pack(int4.unpack(), dispatch.current_target())
    want = ops.quant_matmul(x, packed, activation="bfloat16", form="reference")
    assert torch.equal(ops.quant_matmul(x, packed, activation="bfloat16"), want)
    assert relative(want, x.bfloat16().float() @ int4.unpack().dequantize().bfloat16().float().T) < 1e-5
    with pytest.raises(DeclinedError, match="portable has no bf16 matrix unit"):
        ops.quant_matmul(x, packed, activation="bfloat16", form="tvm_cpu")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("tokens", [8, 9])
def test_the_math_of_auto_is_the_fastest_for_the_queries_and_the_cache(dtype: str, tokens: int) -> None:
    cache = KVCache(1, 1, 2, 16, 40, dtype)
    layer, q = cache.layer(0), torch.randn(1, 4, tokens, 16)
    layer.append(torch.randn(1, 2, 20 + tokens, 16), torch.randn(1, 2, 20 + tokens, 16), 0)
    chosen = fastest_math(tokens, layer.dtype, dispatch.current_target())
    got = ops.attention_cached(q, layer, 20, math="auto")
    assert torch.equal(got, ops.attention_cached(q, layer, 20, math=chosen))
    exact = ops.attention_cached(q, layer, 20, form="reference")
    assert relative(got, exact) < (1e-5 if chosen == "float32" else 1e-2)
    assert torch.equal(got, ops.attention_cached(q, layer, 20)) == (chosen == "float32")


@pytest.mark.parametrize(
    "fmt", [WeightFormat.int4(zero="minimum"), WeightFormat.float("bfloat16")], ids=WeightFormat.key
)
def test_gradients_are_those_of_the_dequantised_weight(fmt: WeightFormat) -> None:
    canonical, packed = weight_of(fmt)
    dense = canonical.dequantize()
    x, bias = torch.randn(2, 3, K, requires_grad=True), torch.randn(N, requires_grad=True)
    residual, upstream = torch.randn(2, 3, N, requires_grad=True), torch.randn(2, 3, N)
    want = torch.autograd.grad(x @ dense.T + bias + residual, (x, bias, residual), upstream)
    for activation in ("int8", "float"):
        y = ops.quant_matmul(x, packed, bias=bias, residual=residual, activation=activation)
        exact = ops.quant_matmul(
            x.detach(), packed, bias=bias.detach(), residual=residual.detach(), activation=activation
        )
        assert relative(y.detach(), exact) < 1e-5
        for got, expected in zip(torch.autograd.grad(y, (x, bias, residual), upstream), want, strict=True):
            assert got.shape == expected.shape and relative(got, expected) < 1e-5
    frozen = ops.quant_matmul(x.detach(), packed, bias=bias)
    (got,) = torch.autograd.grad(frozen, bias, upstream)
    assert relative(got, want[1]) < 1e-5


def test_the_gradient_goes_over_many_rows_of_weight_in_blocks() -> None:
    canonical = CanonicalWeight.from_float(torch.randn(2100, 33), WeightFormat.int8())
    x, upstream = torch.randn(2, 33, requires_grad=True), torch.randn(2, 2100)
    y = ops.quant_matmul(x, pack(canonical), activation="float", form="reference")
    (got,) = torch.autograd.grad(y, x, upstream)
    assert relative(got, upstream @ canonical.dequantize()) < 1e-5


def test_half_types_keep_their_dtype_in_the_gradient() -> None:
    canonical, packed = weight_of(WeightFormat.int4())
    x = torch.randn(3, K).bfloat16().requires_grad_()
    y = ops.quant_matmul(x, packed, form="reference")
    y.backward(torch.ones_like(y))
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.bfloat16
    assert relative(x.grad, canonical.dequantize().sum(0).expand(3, K)) < 2**-8


def test_no_gradient_is_recorded_when_none_is_wanted(int4: PackedWeight) -> None:
    x = torch.randn(3, K, requires_grad=True)
    with torch.no_grad():
        assert not ops.quant_matmul(x, int4).requires_grad
    assert not ops.quant_matmul(x.detach(), int4).requires_grad


def test_what_has_no_gradient_says_so(int4: PackedWeight) -> None:
    x = torch.randn(2, K, requires_grad=True)
    pair = weight_of(WeightFormat.int4(), pair=True)[1]
    with pytest.raises(UnsupportedError, match="gated epilogue has no gradient"):
        ops.quant_matmul(x, pair, epilogue="silu_pair")
    with pytest.raises(UnsupportedError, match="packed weight has no gradient"):
        int4.requires_grad_()
    for residual in (torch.randn(1, N), torch.randn(2, N).half()):
        with pytest.raises(UnsupportedError, match="residual is"):
            ops.quant_matmul(x, int4, residual=residual)


def test_python_threads_at_once() -> None:
    """Each thread has its own scratch: results are those of one thread, bit for bit."""
    packed = [weight_of(fmt)[1] for fmt in (WeightFormat.int4(), WeightFormat.int4(zero="minimum"))]
    inputs = [torch.randn(m, K) for m in (1, 3, 40)]
    cases = [(x, w) for x in inputs for w in packed]
    want = [ops.quant_matmul(x, w) for x, w in cases]

    def work(worker: int) -> bool:
        good = True
        for i in range(60):
            at = (i * (worker + 1) + worker) % len(cases)
            good &= torch.equal(ops.quant_matmul(*cases[at]), want[at])
        return good

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_embedding_and_head_share_one_buffer() -> None:
    canonical, packed = weight_of(WeightFormat.int4())
    ids = torch.tensor([[0, 3], [N - 1, 3]])
    rows = ops.embedding(ids, packed)
    torch.testing.assert_close(rows, canonical.dequantize()[ids])
    assert ops.quant_matmul(rows, packed).shape == (2, 2, N)
