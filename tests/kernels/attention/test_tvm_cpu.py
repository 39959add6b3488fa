"""The compiled form against the reference, at odd sizes, on NaN-filled outputs."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.errors import UnsupportedError
from edgeformer.compiler.operator import Declined
from edgeformer.compiler.target import Target, detect
from edgeformer.kernels.attention import TVM_CPU, AttentionSpec

from ..conftest import GuardedMemory
from .conftest import assert_close, bound, check, make_problem

# (batch, Tq, Tk): decode and prefill, lengths 1 and 513, more queries than keys.
SHAPES = [(1, 1, 1), (1, 1, 513), (2, 2, 5), (5, 3, 70), (2, 5, 513)]
SHAPES += [(1, 17, 17), (2, 130, 513), (5, 17, 33), (1, 12, 4)]

BLOCKED: dict[str, Any] = {"layout": "blocked"}
HALF: dict[str, Any] = {"q_dtype": "float16", "kv_dtype": "float16"}
BRAIN: dict[str, Any] = {"q_dtype": "bfloat16", "kv_dtype": "bfloat16"}
SPECS = [
    AttentionSpec(9, 3, 64, 64, mask="causal_lengths", lse=True, **BLOCKED),
    AttentionSpec(9, 3, 64, 64, mask="causal", kv_dtype="bfloat16", **BLOCKED),
    AttentionSpec(9, 3, 64, 64, mask="causal_lengths", kv_dtype="int8", window=True, **BLOCKED),
    AttentionSpec(8, 8, 80, 80, mask="prefix", kv_dtype="float16", window=True, lse=True, **BLOCKED),
    AttentionSpec(8, 1, 128, 128, mask="causal", softcap=True, sinks=True, **BLOCKED, **BRAIN),
    AttentionSpec(9, 3, 64, 64, mask="causal", lse=True),
    AttentionSpec(8, 8, 128, 128, mask="additive", kv_dtype="bfloat16", lse=True),
    AttentionSpec(8, 1, 80, 80, mask="causal_lengths", window=True, softcap=True, **HALF),
    AttentionSpec(8, 8, 256, 256, mask="none", kv_dtype="float32", sinks=True, lse=True),
    AttentionSpec(8, 1, 64, 64, mask="additive", kv_dtype="int8", bias_dtype="bfloat16", softcap=True),
    AttentionSpec(4, 2, 48, 112, mask="none", kv_dtype="int8", window=True, **BLOCKED),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.key())
def test_equals_the_reference(spec: AttentionSpec) -> None:
    call = bound(spec)
    for batch, tq, tk in SHAPES:
        check(make_problem(spec, batch, tq, tk), call)


@pytest.mark.parametrize("isa", ["portable", "portable16"])
@pytest.mark.parametrize("spec", [SPECS[2], SPECS[5]], ids=lambda s: s.key())
def test_other_instruction_sets(spec: AttentionSpec, isa: str) -> None:
    if "portable" == detect().isa == isa:
        pytest.skip("this host is the portable one")
    call = bound(spec, isa)
    for batch, tq, tk in SHAPES:
        check(make_problem(spec, batch, tq, tk), call)


def test_every_configuration_is_right() -> None:
    spec = SPECS[1]
    problems = [make_problem(spec, 1, tq, 700) for tq in (1, 150)]
    for changes in (
        {"block_q": 48, "block_k": 64, "chunk": 128, "prefetch": False},
        {"decode_rows": 4, "block_k": 256, "chunk": 512},
    ):
        call = bound(spec, changes=changes)
        for problem in problems:
            check(problem, call)


def test_decode_and_prefill_agree() -> None:
    spec = SPECS[0]
    problem = make_problem(spec, 2, 8, 333)
    few, _ = problem.run(bound(spec, changes={"decode_rows": 16}))
    many, _ = problem.run(bound(spec, changes={"decode_rows": 4}))
    assert_close(few, many, 1e-6)


@pytest.mark.parametrize(("tq", "tk"), [(1, 1500), (64, 300)])
def test_result_does_not_depend_on_threads(tq: int, tk: int) -> None:
    spec = SPECS[1]
    problem, call, threads = make_problem(spec, 1, tq, tk), bound(spec), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(problem.run(call)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results)


def test_explicit_offset_and_scale() -> None:
    spec = SPECS[5]
    call = bound(spec)
    for tq, offset in ((1, 3), (2, -1), (40, 20), (40, -13), (20, 100)):
        problem = make_problem(spec, 1, tq, 50)
        problem.options |= {"q_offset": offset, "scale": 0.7}
        check(problem, call)


@pytest.mark.parametrize("tq", [2, 40])
def test_nan_and_inf_go_where_the_reference_puts_them(tq: int) -> None:
    for spec, isa in ((SPECS[5], ""), (SPECS[0], ""), (SPECS[5], "portable"), (SPECS[5], "portable16")):
        call = bound(spec, isa)
        for place, value in zip("qqkvv", (torch.nan, torch.inf, torch.nan, torch.nan, torch.inf)):
            problem = make_problem(spec, 2, tq, 75)
            x = getattr(problem, place)
            if place == "q":
                x[0, 4, tq - 2, 3] = value
            elif place == "k" and spec.layout == "blocked":
                x[0, 1, 74 // 16, 5, 74 % 16] = value
            else:
                x[0, 1, 74 if place == "k" else 72, 5] = value
            check(problem, call)


def test_large_scores_and_rows_that_see_nothing() -> None:
    spec = SPECS[6]
    call = bound(spec)
    for tq in (3, 30):
        problem = make_problem(spec, 1, tq, 40)
        problem.q *= 200
        check(problem, call)
        problem.options["bias"] = torch.full((1, 1, tq, 40), -torch.inf)
        out, lse = problem.run(call)
        assert (out == 0).all()
        assert lse is not None
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("spec", [SPECS[5], SPECS[7], SPECS[9]], ids=lambda s: s.key())
def test_nothing_past_the_end_is_read(spec: AttentionSpec, guarded_memory: GuardedMemory) -> None:
    call = bound(spec)
    for tq, tk in ((1, 1), (1, 131), (3, 67), (19, 35), (20, 129)):
        problem = make_problem(spec, 1, tq, tk)
        inputs = (problem.q, problem.k, problem.v)
        problem.q, problem.k, problem.v = (guarded_memory.copy(x.contiguous()) for x in inputs)
        for name in ("k_scale", "v_scale", "bias", "lengths"):
            if name in problem.options:
                problem.options[name] = guarded_memory.copy(problem.options[name].contiguous())
        check(problem, call)


def test_strided_views_are_read_in_place() -> None:
    spec = SPECS[5]
    call = bound(spec)
    torch.manual_seed(0)
    for tq in (1, 33):
        fused = torch.randn(2, 60, 15 * 64 + 1)[:, :, 1:]  # rows that are not aligned
        fused = fused.unflatten(2, (15, 64)).transpose(1, 2)
        problem = make_problem(spec, 2, tq, 60)
        problem.q, problem.k, problem.v = fused[:, :9, 60 - tq :], fused[:, 9:12], fused[:, 12:]
        check(problem, call)
        problem.k = problem.k[:, :1].expand(2, 3, 60, 64)  # a head stride of 0
        check(problem, call)


def test_empty_sizes() -> None:
    call = bound(SPECS[5])
    for batch, tq, tk in ((1, 0, 5), (0, 2, 5), (1, 2, 0), (1, 20, 0)):
        out, lse = make_problem(SPECS[5], batch, tq, tk).run(call)
        assert out.shape == (batch, 9, tq, 64)
        assert (out == 0).all()
        assert lse is not None
        assert (lse == -torch.inf).all()


def test_declines_with_a_reason() -> None:
    target = detect()
    for changes, word in (
        ({"head_dim": 72}, "multiples of 16"),
        ({"mask": "block", "block": 64}, "block"),
        ({"layout": "paged"}, "paged"),
        ({"layout": "latent"}, "latent"),
    ):
        spec = dataclasses.replace(AttentionSpec(8, 8, 64, 64), **changes)
        answer = TVM_CPU.decide(spec, target)
        assert isinstance(answer, Declined)
        assert word in answer.reason


def test_wrong_inputs_are_refused() -> None:
    problem, call = make_problem(SPECS[5], 2, 3, 9), bound(SPECS[5])
    for wrong in (
        lambda: call(problem.q[:, :8], problem.k, problem.v),
        lambda: call(problem.q.bfloat16(), problem.k, problem.v),
        lambda: call(problem.q, problem.k[:, :, :4], problem.v),
        lambda: call(problem.q, problem.k[:1], problem.v[:1]),
        lambda: call(problem.q, problem.k, problem.v, tk=10),
        lambda: call(problem.q, problem.k, problem.v, window=4),
        lambda: call(problem.q, problem.k, problem.v, sinks=torch.zeros(9)),
    ):
        with pytest.raises(UnsupportedError):
            wrong()
    lengths = make_problem(SPECS[0], 2, 3, 9)
    with pytest.raises(UnsupportedError, match="lengths"):
        bound(SPECS[0])(lengths.q, lengths.k, lengths.v, tk=9)
    biased = make_problem(SPECS[6], 2, 3, 9)
    with pytest.raises(UnsupportedError, match="bias"):
        bound(SPECS[6])(biased.q, biased.k, biased.v, bias=torch.zeros(3, 9, dtype=torch.float64))
    codes = make_problem(SPECS[9], 2, 3, 9)
    codes.options["k_scale"] = codes.options["k_scale"][:1]
    with pytest.raises(UnsupportedError, match="k_scale"):
        codes.run(bound(SPECS[9]))


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_avx512_hot_loops_do_not_spill(name: str, avx512: Target) -> None:
    from edgeformer.kernels.attention.tvm_cpu import lower

    spec = SPECS[1]
    functions = lower(spec, TVM_CPU.space(spec, avx512)[0], avx512)
    function = next(f for f in functions if str(f.attrs["global_symbol"]) == name)
    assembly = tvm_llvm.inspect([function], avx512).assembly
    hot = [loop for loop in innermost_loops(assembly) if sum("vfmadd" in line for line in loop) >= 24]
    # The loops of q . k and of weights @ V; those of 2**x fetch a few constants from the stack.
    products = [loop for loop in hot if not any("vscalefps" in line for line in loop)]
    assert products
    for loop in products:
        assert not any(re.search(r"\(%rsp", line) for line in loop), "\n".join(loop)


def innermost_loops(assembly: str) -> list[list[str]]:
    """Return the instructions between each backward branch and its target, without loops around others."""
    lines = assembly.splitlines()
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:$", line)}
    loops = []
    for i, line in enumerate(lines):
        branch = re.search(r"\sj\w+\s+(\.LBB\w+)", line)
        if branch and labels.get(branch[1], i) < i:
            loops.append((labels[branch[1]], i))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [[line for line in lines[a : b + 1] if line.startswith("\t")] for a, b in inner]
