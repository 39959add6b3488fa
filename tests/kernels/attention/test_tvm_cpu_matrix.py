"""Prefill on a bf16 matrix unit against the reference in bf16 arithmetic, on NaN-filled outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.operator import Declined
from edgeformer.compiler.target import ISA_FEATURES, Target, detect, known_targets
from edgeformer.kernels.attention import TVM_CPU, AttentionSpec
from edgeformer.kernels.attention import bind as bind_module
from edgeformer.kernels.attention.space import fastest_math
from edgeformer.kernels.attention.spec import KV_TYPES, MASKS
from edgeformer.kernels.shared.isa.table import MATRIX, by_name

from ..conftest import GuardedMemory
from .conftest import Problem, bound, check, make_problem

HERE = [*(name for name, needed in ISA_FEATURES if needed <= detect().features), "portable16"]
UNITS = [isa for isa in HERE if isa in MATRIX]
REAL = [isa for isa in UNITS if not isa.startswith("portable")]
# (batch, Tq, Tk): one and several tiles of queries and of keys, more queries than keys.
SHAPES = [(1, 1, 1), (2, 17, 17), (5, 1, 300), (2, 33, 70), (3, 70, 33), (1, 12, 4), (1, 300, 300)]
SHAPES += [(2, 130, 513)]

BLOCKED: dict[str, Any] = {"layout": "blocked", "math": "bfloat16"}
STRIDED: dict[str, Any] = {"layout": "strided", "math": "bfloat16"}
HALF: dict[str, Any] = {"q_dtype": "float16", "kv_dtype": "float16"}
BRAIN: dict[str, Any] = {"q_dtype": "bfloat16", "kv_dtype": "bfloat16"}
SPECS = [
    AttentionSpec(9, 3, 64, 64, mask="causal_lengths", kv_dtype="bfloat16", lse=True, **BLOCKED),
    AttentionSpec(9, 3, 64, 64, mask="causal", kv_dtype="int8", window=True, **BLOCKED),
    AttentionSpec(8, 8, 80, 80, mask="prefix", kv_dtype="float16", window=True, lse=True, **BLOCKED),
    AttentionSpec(8, 1, 128, 128, mask="causal", softcap=True, sinks=True, **BLOCKED, **BRAIN),
    AttentionSpec(14, 2, 48, 96, mask="none", window=True, sinks=True, lse=True, **BLOCKED),
    AttentionSpec(9, 3, 64, 64, mask="causal", lse=True, **STRIDED),
    AttentionSpec(
        8, 1, 80, 80, mask="causal_lengths", window=True, softcap=True, lse=True, **STRIDED, **HALF
    ),
    AttentionSpec(4, 2, 48, 112, mask="none", kv_dtype="int8", **STRIDED),
    AttentionSpec(4, 4, 112, 48, mask="prefix", sinks=True, lse=True, **STRIDED, **BRAIN),
    AttentionSpec(6, 2, 96, 64, mask="causal", kv_dtype="bfloat16", window=True, softcap=True, **STRIDED),
]
POISONED = [SPECS[0], SPECS[2], SPECS[5], SPECS[8], SPECS[9]]
everywhere = pytest.mark.parametrize("isa", UNITS)
# All on a real unit, a few where plain vectors stand for one: the rest is slow, since it compiles.
elsewhere_slow = pytest.mark.parametrize(
    "isa", [UNITS[0], *(pytest.param(isa, marks=pytest.mark.slow) for isa in UNITS[1:])]
)


def each(*specs: AttentionSpec) -> pytest.MarkDecorator:
    """Parametrise by unit and spec."""
    found = []
    for isa in UNITS:
        for spec in specs:
            few = (SPECS[0], SPECS[5]) if isa != UNITS[0] else (SPECS[0], SPECS[2], SPECS[5], SPECS[8])
            many = isa not in REAL and spec not in few
            name = f"{isa}-{spec.key().replace(' ', '-')}"
            found.append(pytest.param(isa, spec, marks=[pytest.mark.slow] * many, id=name))
    return pytest.mark.parametrize(("isa", "spec"), found)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_specs_cover_what_the_form_delivers() -> None:
    for layout in ("strided", "blocked"):
        assert {spec.kv_dtype for spec in SPECS if spec.layout == layout} == set(KV_TYPES)
    assert {spec.mask for spec in SPECS} == set(MASKS) - {"additive", "block"}


@each(*SPECS)
def test_equals_the_reference(spec: AttentionSpec, isa: str) -> None:
    call = bound(spec, isa)
    for batch, tq, tk in SHAPES:
        check(make_problem(spec, batch, tq, tk), call)


@elsewhere_slow
@pytest.mark.parametrize("changes", [{"block_q": 96, "block_k": 128}, {"block_q": 384, "block_k": 512}])
def test_every_tile_of_the_space_is_right(isa: str, changes: dict[str, int]) -> None:
    spec, target = SPECS[0], dataclasses.replace(detect().with_isa(isa), l2=2 << 20)  # CPUs with such a unit
    assert any(changes.items() <= configuration.items() for configuration in TVM_CPU.space(spec, target))
    for batch, tq, tk in ((1, 1, 700), (1, 150, 700), (2, 40, 40)):
        check(make_problem(spec, batch, tq, tk), bound(spec, isa, changes))


@everywhere
def test_result_does_not_depend_on_threads(isa: str) -> None:
    spec = SPECS[0]
    problem, call, results = make_problem(spec, 2, 150, 300), bound(spec, isa), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(problem.run(call))
    for out, lse in results:
        assert torch.equal(out, results[0][0])
        assert lse is not None
        assert torch.equal(lse, results[0][1])


@everywhere
def test_explicit_offset_and_scale(isa: str) -> None:
    """An offset below 0 leaves rows that see nothing, one past the keys ends the causal mask."""
    call = bound(SPECS[5], isa)
    for tq, offset in ((1, 3), (2, -1), (40, 20), (40, -13), (20, 100), (70, -70)):
        problem = make_problem(SPECS[5], 1, tq, 50)
        problem.options |= {"q_offset": offset, "scale": 0.7}
        check(problem, call)


@elsewhere_slow
def test_large_scores(isa: str) -> None:
    """One key takes nearly all of the weight; the rest underflows."""
    for spec in (SPECS[0], SPECS[3], SPECS[5]):
        for tq in (3, 60):
            problem = make_problem(spec, 1, tq, 90)
            problem.q = problem.q * 100
            check(problem, bound(spec, isa))


@everywhere
def test_rows_that_see_nothing(isa: str) -> None:
    for spec in (SPECS[0], SPECS[6]):
        problem = make_problem(spec, 3, 40, 300)
        problem.options["lengths"] = torch.tensor([0, 300, 7], dtype=torch.int32)
        out, lse = problem.run(bound(spec, isa))
        assert lse is not None
        for b, rows in ((0, slice(0, 40)), (2, slice(0, 33))):
            assert (out[b, :, rows] == 0).all()
            assert (lse[b, :, rows] == -torch.inf).all()
        check(problem, bound(spec, isa))
    call = bound(SPECS[5], isa)
    for batch, tq, tk in ((1, 0, 5), (0, 2, 5), (1, 2, 0), (1, 20, 0)):
        out, lse = make_problem(SPECS[5], batch, tq, tk).run(call)
        assert out.shape == (batch, 9, tq, 64)
        assert (out == 0).all()
        assert lse is not None
        assert (lse == -torch.inf).all()


def poison(problem: Problem, place: str, at: int, value: float) -> None:
    """Put a value into an element of query, key or value `at` of the first sequence's last head."""
    x = getattr(problem, place)
    if place == "k" and problem.spec.layout == "blocked":
        x[0, -1, at // 16, 5, at % 16] = value
    else:
        x[0, -1, at, 5] = value


@each(*POISONED)
def test_nan_and_inf_go_where_the_reference_puts_them(spec: AttentionSpec, isa: str) -> None:
    """Tq 40 over Tk 75 and window 20: key 30 is behind the window of late rows, 60 to come for early ones."""
    torch.set_num_threads(1)
    call = bound(spec, isa)
    for place, value in zip("qqkvvvkk", (torch.nan, torch.inf, *[torch.nan, torch.inf, -torch.inf] * 2)):
        for at in (30, 38) if place == "q" else (0, 30, 60, 74):
            problem = make_problem(spec, 2, 40, 75)
            if spec.window:
                problem.options["window"] = 20
            if spec.mask == "prefix":
                problem.options["prefix"] = torch.tensor([50, 75], dtype=torch.int32)
            poison(problem, place, at, value)
            check(problem, call)


@each(*POISONED)
def test_many_poisoned_values(spec: AttentionSpec, isa: str) -> None:
    """In several tiles of keys; a row is finite where it sees none of them, its neighbours are not."""
    problem = make_problem(spec, 1, 300, 600)
    for at, value in (
        (3, torch.nan),
        (290, torch.inf),
        (291, -torch.inf),
        (450, torch.nan),
        (599, torch.inf),
    ):
        poison(problem, "v", at, value)
    if spec.window:
        problem.options["window"] = 33
    if spec.mask == "prefix":
        problem.options["prefix"] = torch.tensor([400], dtype=torch.int32)
    expected, _ = problem.expected()
    if spec.window and spec.mask == "causal":
        clean = expected.isfinite().all(3)[0, -1]
        assert 0.5 < clean.float().mean() < 0.9
    check(problem, bound(spec, isa))


@elsewhere_slow
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_nan_in_the_scales_of_int8(name: str, isa: str) -> None:
    for spec in (SPECS[1], SPECS[7]):
        for at in (0, 30, 60, 74):
            problem = make_problem(spec, 2, 40, 75)
            problem.options[name][0, 1, at] = torch.nan
            check(problem, bound(spec, isa))


@each(*SPECS[5:])
def test_nothing_past_the_end_is_read(spec: AttentionSpec, isa: str, guarded_memory: GuardedMemory) -> None:
    call = bound(spec, isa)
    for tq, tk in ((1, 1), (1, 131), (3, 67), (19, 35), (20, 129), (33, 257)):
        problem = make_problem(spec, 1, tq, tk)
        inputs = (problem.q, problem.k, problem.v)
        problem.q, problem.k, problem.v = (guarded_memory.copy(x.contiguous()) for x in inputs)
        for name in ("k_scale", "v_scale", "lengths", "prefix", "sinks"):
            if name in problem.options:
                problem.options[name] = guarded_memory.copy(problem.options[name].contiguous())
        check(problem, call)


@everywhere
def test_strided_views_are_read_in_place(isa: str) -> None:
    spec = SPECS[5]
    call = bound(spec, isa)
    torch.manual_seed(0)
    for tq in (1, 33):
        fused = torch.randn(2, 60, 15 * 64 + 1)[:, :, 1:]  # rows that are not aligned
        fused = fused.unflatten(2, (15, 64)).transpose(1, 2)
        problem = make_problem(spec, 2, tq, 60)
        problem.q, problem.k, problem.v = fused[:, :9, 60 - tq :], fused[:, 9:12], fused[:, 12:]
        check(problem, call)
        problem.k = problem.k[:, :1].expand(2, 3, 60, 64)  # a head stride of 0
        check(problem, call)


@pytest.mark.parametrize("count", [1, 2])
@each(*SPECS)
def test_scratch_is_as_large_as_what_is_used(
    spec: AttentionSpec, isa: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(count)
    held: list[torch.Tensor] = []

    def exactly(nbytes: int) -> int:
        raw = torch.full((nbytes + 3 * 4096,), 0xA5, dtype=torch.uint8)
        start = -raw.data_ptr() % 4096 + 4096
        raw[start : start + nbytes] = 0xFF  # NaN
        held.extend((raw[:start], raw[start + nbytes :]))
        return raw.data_ptr() + start

    call = bound(spec, isa)
    monkeypatch.setattr(bind_module, "scratch", exactly)
    for tq, tk in ((3, 5), (70, 260)):
        held.clear()
        check(make_problem(spec, 1, tq, tk), call)
        assert len(held) == 2
        assert all((part == 0xA5).all() for part in held), "written outside of the scratch memory"


def test_auto_is_bf16_for_many_queries_on_a_matrix_unit_and_no_less_exact_than_the_cache() -> None:
    for target in [Target.parse(name) for name in known_targets()] + [detect().with_isa("portable16")]:
        for kv_dtype in KV_TYPES:
            exact = target.isa != "amx" or kv_dtype in ("float32", "float16")
            many = "float32" if exact else "bfloat16"
            assert [fastest_math(tq, kv_dtype, target) for tq in (1, 8)] == ["float32"] * 2
            assert [fastest_math(tq, kv_dtype, target) for tq in (9, 513)] == [many] * 2


def test_declines_with_a_reason() -> None:
    spec = SPECS[5]
    for target in [detect().with_isa(isa) for isa in HERE] + [Target.parse(name) for name in known_targets()]:
        answer = TVM_CPU.decide(spec, target)
        assert isinstance(answer, Declined) == (target.isa not in MATRIX)
        assert answer is None or f"{target.isa} has no bf16 matrix unit" in answer.reason
        assert TVM_CPU.decide(dataclasses.replace(spec, math="float32"), target) is None
    answer = TVM_CPU.decide(dataclasses.replace(spec, mask="additive"), detect().with_isa(UNITS[0]))
    assert isinstance(answer, Declined)
    assert "additive bias" in answer.reason


@pytest.mark.parametrize("name", sorted({detect().isa, "portable16"}))
@pytest.mark.parametrize(("short", "most"), [(True, 8e-5), (False, 2e-6)])
def test_powers_of_two(name: str, short: bool, most: float) -> None:
    from edgeformer.kernels.attention.tvm_math import exp2
    from edgeformer.kernels.shared import tir

    isa = by_name(name)
    lanes = isa.lanes
    k = tir.Kernel("f", [("x", "*float32"), ("y", "*float32"), ("count", "int64")])
    with tir.loop(k["count"]) as i:
        value = exp2(tir.load(k["x"], i * lanes, lanes), lanes, isa, short)
        tir.store(k["y"], i * lanes, value)
    function = tvm_llvm.JitLibrary(tvm_llvm.compile_module([k.finish()], detect())).function("f")
    edges = torch.tensor([0.0, -0.0, -torch.inf, -1e30, -200.0, -160.0, torch.nan, -1.0] * 2)
    x = torch.cat([edges, -126 * torch.rand(1 << 16), -torch.rand(1 << 16), 8 * torch.rand(1 << 10)])
    y = torch.full_like(x, 7)
    function(x.data_ptr(), y.data_ptr(), len(x) // lanes)
    assert (y[2:6] == 0).all()
    assert y[6].isnan()
    assert not y[16:].isnan().any()
    error = y.double() / torch.exp2(x.double()) - 1
    assert error[[0, 1, 7]].abs().max() <= most
    assert error[16:].abs().max() <= most
