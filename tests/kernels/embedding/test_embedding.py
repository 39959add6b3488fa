"""embedding: every weight format and layout against the reference, odd sizes, bad ids."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from edgeformer.compiler.errors import EdgeFormerError, UnsupportedError
from edgeformer.compiler.target import Target, detect
from edgeformer.kernels.embedding import OPERATOR, tvm_cpu
from edgeformer.kernels.embedding.reference import embedding
from edgeformer.kernels.embedding.spec import TOLERANCE, EmbeddingSpec, examples
from edgeformer.kernels.quant_matmul.packing import PackedWeight, pack
from edgeformer.kernels.quant_matmul.weight_format import CanonicalWeight, WeightFormat
from edgeformer.runtime import launch

ISAS = sorted({"portable", detect().isa})
FORMATS = [
    WeightFormat.int4(32, "constant"),
    WeightFormat.int4(64, "minimum"),
    WeightFormat.int4(128, "integer"),
    WeightFormat.int8(32),
    WeightFormat.int8(64, "constant"),
    WeightFormat.int8(32, "minimum", "float32"),
    WeightFormat("int", 2, 32, "float16", "constant"),
    WeightFormat("int", 5, 32, "float16", "constant"),
    WeightFormat("int", 5, 32, "float16", "minimum"),
    WeightFormat.blocked(4, 32),
    WeightFormat.blocked(6, 16, "constant"),
    WeightFormat.float("float32"),
    WeightFormat.float("bfloat16"),
    WeightFormat.float("float16"),
]


def bound(spec: EmbeddingSpec, isa: str):
    return launch.bind(OPERATOR, tvm_cpu.FORM, spec, {}, detect().with_isa(isa))


def table(fmt: WeightFormat, n: int, k: int, isa: str) -> PackedWeight:
    return pack(CanonicalWeight.from_float(torch.randn(n, k), fmt), detect().with_isa(isa))


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: str = "float32") -> None:
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS, ids=WeightFormat.key)
def test_formats(isa: str, fmt: WeightFormat) -> None:
    for n, k in ((77, 128), (33, 141), (1, 3)):
        weight = table(fmt, n, k, isa)
        spec = EmbeddingSpec.of(weight)
        call = bound(spec, isa)
        for ids in (torch.tensor([n - 1]), torch.arange(n - 1, -1, -1), torch.randint(n, (2, 17))):
            got, want = call(ids, weight), embedding(spec, ids, weight)
            assert got.shape == (*ids.shape, k) and got.dtype == torch.float32
            assert_close(got, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", [FORMATS[0], FORMATS[-1]], ids=WeightFormat.key)
def test_rows_times_a_factor(isa: str, fmt: WeightFormat) -> None:
    weight = table(fmt, 33, 141, isa)
    spec, ids = EmbeddingSpec.of(weight, factor=11.875**0.5), torch.arange(33)
    got = bound(spec, isa)(ids, weight)
    assert_close(got, embedding(spec, ids, weight))
    assert_close(got, embedding(EmbeddingSpec.of(weight), ids, weight) * 11.875**0.5)
    with pytest.raises(UnsupportedError, match="positive"):
        EmbeddingSpec.of(weight, factor=0.0)


@pytest.mark.parametrize("fmt", FORMATS[:5], ids=WeightFormat.key)
def test_both_layouts_of_codes_on_one_machine(fmt: WeightFormat) -> None:
    canonical = CanonicalWeight.from_float(torch.randn(40, 96), fmt)
    ids = torch.arange(40)
    for isa in ("avx2", "portable"):  # signed and unsigned bytes
        weight = pack(canonical, detect().with_isa(isa))
        call = bound(EmbeddingSpec.of(weight), "portable")
        assert_close(call(ids, weight), canonical.dequantize())


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16"])
def test_output_types_in_parallel_on_nan(out_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = table(WeightFormat.int4(32, "minimum"), 200, 99, detect().isa)
    spec = EmbeddingSpec.of(weight, out_dtype)
    call = bound(spec, detect().isa)
    ids = torch.randint(200, (513,))
    want, empty = embedding(spec, ids, weight), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, dtype: empty(*s, dtype=dtype).fill_(torch.nan))
    assert_close(call(ids, weight), want, out_dtype)


def test_nan_and_inf_in_the_table() -> None:
    values = torch.randn(40, 50)
    values[3, 7], values[4, 8] = torch.nan, -torch.inf
    for dtype in ("float32", "bfloat16", "float16"):
        weight = pack(CanonicalWeight.from_float(values, WeightFormat.float(dtype)), detect())
        got = bound(EmbeddingSpec.of(weight, "bfloat16"), detect().isa)(torch.arange(40), weight)
        assert got.isnan().nonzero().tolist() == [[3, 7]] and got[4, 8] == -torch.inf


def test_bad_ids_and_layouts() -> None:
    weight = table(WeightFormat.int8(), 40, 64, detect().isa)
    call = bound(EmbeddingSpec.of(weight), detect().isa)
    for ids in (torch.tensor([0, 40]), torch.tensor([-1])):
        with pytest.raises(EdgeFormerError, match="outside this table of 40 rows"):
            call(ids, weight)
        with pytest.raises(EdgeFormerError):
            embedding(EmbeddingSpec.of(weight), ids, weight)
    with pytest.raises(EdgeFormerError, match="int64"):
        call(torch.tensor([1], dtype=torch.int32), weight)
    assert call(torch.empty(2, 0, dtype=torch.int64), weight).shape == (2, 0, 64)
    spec = EmbeddingSpec.of(weight)
    with pytest.raises(UnsupportedError):
        dataclasses.replace(spec, layout="n32.signed.pair")
    assert tvm_cpu.decide(dataclasses.replace(spec, layout="rows"), detect()) is not None


def test_compiles_for_avx512() -> None:
    from edgeformer.compiler.backends import tvm_llvm

    target = Target.parse("znver5")
    for spec in examples():
        assert tvm_llvm.inspect(tvm_cpu.lower(spec, {}, target), target).spills == 0
