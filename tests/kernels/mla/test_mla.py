"""Latent attention: both modes against the reference at odd sizes, on NaN-filled outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from edgeformer.compiler.errors import UnsupportedError
from edgeformer.compiler.operator import Declined
from edgeformer.compiler.target import Target, detect
from edgeformer.kernels.attention.append import quantize
from edgeformer.kernels.mla import OPERATOR, TVM_CPU, MlaSpec, cheaper_mode
from edgeformer.kernels.mla.reference import mla as reference
from edgeformer.kernels.mla.spec import examples
from edgeformer.kernels.shared.isa.table import MATRIX
from edgeformer.runtime import launch, ops

from ..attention.conftest import assert_close

# (batch, T, tk): decode, a few queries, prefill; one token, odd lengths, fewer keys than queries.
SHAPES = [(1, 1, 1), (2, 1, 37), (1, 1, 300), (3, 5, 70), (1, 40, 61), (2, 7, 4)]
SMALL = MlaSpec(6, 80, 32, 16, 48, cache_dtype="float32", weight_dtype="float32", lse=True)
SPECS = [
    SMALL,
    dataclasses.replace(SMALL, mask="causal_lengths", cache_dtype="bfloat16", weight_dtype="bfloat16"),
    dataclasses.replace(SMALL, num_heads=32, q_dtype="bfloat16", cache_dtype="int8", mask="none"),
    dataclasses.replace(SMALL, num_heads=5, q_dtype="float16", cache_dtype="float16", lse=False),
]
BOTH = [dataclasses.replace(spec, mode=mode) for spec in SPECS for mode in ("absorbed", "expanded")]


def problem(spec: MlaSpec, batch: int, tq: int, tk: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Random arguments; the cache has three slots that are not used and hold NaN (int8: garbage)."""
    torch.manual_seed(1000 * tk + 10 * tq + batch)
    kind = getattr(torch, spec.q_dtype)
    q_nope = torch.randn(batch, tq, spec.num_heads, spec.qk_nope_head_dim).transpose(1, 2).to(kind)
    q_rope = torch.randn(batch, tq, spec.num_heads, spec.qk_rope_head_dim).transpose(1, 2).to(kind)
    options: dict[str, Any] = {"tk": tk}
    latents = torch.randn(batch, tk + 3, spec.latent_dim)
    if spec.cache_dtype == "int8":
        latents, options["cache_scale"] = quantize(latents)
        options["cache_scale"][:, tk:] = torch.nan
    else:
        latents[:, tk:] = torch.nan
    wide = getattr(torch, spec.weight_dtype)
    w_uk = torch.randn(spec.num_heads, spec.qk_nope_head_dim, spec.kv_lora_rank) / spec.kv_lora_rank**0.5
    w_uv = torch.randn(spec.num_heads, spec.kv_lora_rank, spec.v_head_dim) / spec.kv_lora_rank**0.5
    if spec.mask == "causal_lengths":
        options["lengths"] = torch.randint(1, tk + 1, (batch,), dtype=torch.int32)
    cache = latents.to(getattr(torch, spec.cache_dtype))
    return [q_nope, q_rope, cache, w_uk.to(wide), w_uv.to(wide)], options


def bound(spec: MlaSpec, isa: str = "") -> Callable[..., Any]:
    target = detect().with_isa(isa) if isa else detect()
    return launch.bind(OPERATOR, TVM_CPU, spec, TVM_CPU.space(spec, target)[0], target)


def compare(spec: MlaSpec, call: Callable[..., Any], shape: tuple[int, int, int], **more: Any) -> None:
    arguments, options = problem(spec, *shape)
    options |= more
    batch, tq, _ = shape
    out = torch.full((batch, tq, spec.num_heads, spec.v_head_dim), torch.nan, dtype=arguments[0].dtype)
    got, lse = call(*arguments, out=out.transpose(1, 2), **options)
    expected, expected_lse = reference(spec, *arguments, **options)
    assert_close(got, expected, spec.tolerance)
    if spec.lse:
        assert_close(lse, expected_lse, max(1e-5, spec.tolerance if spec.math == "bfloat16" else 0))


@pytest.mark.parametrize("spec", BOTH, ids=lambda s: s.key())
def test_equals_the_reference(spec: MlaSpec) -> None:
    call = bound(spec)
    for shape in SHAPES:
        compare(spec, call, shape)
    compare(spec, call, (2, 3, 50), scale=0.3, q_offset=20)


@pytest.mark.parametrize("isa", ["portable", "portable16"])
def test_other_instruction_sets(isa: str) -> None:
    call = bound(SPECS[1], isa)
    for shape in SHAPES:
        compare(SPECS[1], call, shape)


@pytest.mark.parametrize("isa", sorted(MATRIX))
@pytest.mark.parametrize("mode", ["expanded"])
def test_bf16_products(mode: str, isa: str) -> None:
    if isa == "amx" and detect().isa != "amx":
        pytest.skip("this host has no AMX")
    spec = dataclasses.replace(SPECS[1], mode=mode, math="bfloat16", q_dtype="bfloat16")
    call = bound(spec, isa)
    for shape in SHAPES:
        compare(spec, call, shape)


def test_the_reference_by_hand() -> None:
    """One head, one latent element: scores and values are products of three numbers."""
    spec = MlaSpec(1, 1, 1, 1, 1, cache_dtype="float32", weight_dtype="float32", mask="none")
    cache = torch.tensor([[[1.0, 0.5], [2.0, -1.0]]])
    q, w_uk, w_uv = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 10.0)
    out, lse = reference(spec, q, torch.ones(1, 1, 1, 1), cache, w_uk, w_uv, scale=0.1)
    scores = torch.tensor([0.1 * (3 * 2 * 1 + 0.5), 0.1 * (3 * 2 * 2 - 1)], dtype=torch.float64)
    assert torch.allclose(lse.flatten(), scores.logsumexp(0))
    assert torch.allclose(out.flatten(), scores.softmax(0) @ torch.tensor([10.0, 20.0], dtype=torch.float64))


def test_the_op_and_its_modes_agree() -> None:
    arguments, options = problem(SMALL, 2, 3, 90)
    expected, expected_lse = reference(SMALL, *arguments, **options)
    for mode in ("auto", "absorbed", "expanded"):
        out, lse = ops.mla(*arguments, mode=mode, return_lse=True, **options)
        assert_close(out, expected, SMALL.tolerance)
        assert_close(lse, expected_lse, 1e-5)
    assert_close(ops.mla(*arguments, form="reference", **options), expected, SMALL.tolerance)


def test_auto_takes_the_mode_with_fewer_operations() -> None:
    deepseek = examples()[0]
    assert cheaper_mode(deepseek, 1, 4096) == "absorbed"
    assert cheaper_mode(deepseek, 4096, 4096) == "expanded"
    for queries in (1, 64, 1024):
        cheap = dataclasses.replace(deepseek, mode=cheaper_mode(deepseek, queries, 2048))
        dear = dataclasses.replace(deepseek, mode="expanded" if cheap.mode == "absorbed" else "absorbed")
        assert cheap.operations(queries, 2048) <= dear.operations(queries, 2048)


def test_empty_sizes() -> None:
    arguments, options = problem(SMALL, 2, 3, 20)
    for mode in ("absorbed", "expanded"):
        spec = dataclasses.replace(SMALL, mode=mode)
        call = bound(spec)
        out, lse = call(*arguments, **{**options, "tk": 0})
        assert (out == 0).all() and (lse == -torch.inf).all()
        out, _ = call(arguments[0][:, :, :0], arguments[1][:, :, :0], *arguments[2:], **options)
        assert out.shape == (2, 6, 0, 48)


def test_bad_arguments_are_refused() -> None:
    arguments, options = problem(SMALL, 2, 3, 20)
    call = bound(SMALL)
    for place, wrong in (
        (0, arguments[0].double()),
        (1, arguments[1][..., :8]),
        (2, arguments[2][:1]),
        (2, arguments[2].half()),
        (3, arguments[3].transpose(1, 2)),
        (4, arguments[4].transpose(1, 2).contiguous().transpose(1, 2)),
    ):
        bad = [wrong if i == place else x for i, x in enumerate(arguments)]
        with pytest.raises(UnsupportedError):
            call(*bad, **options)
    for wrong_option in ({"tk": 24}, {"tk": -1}, {"cache_scale": torch.ones(2, 23)}):
        with pytest.raises(UnsupportedError):
            call(*arguments, **{**options, **wrong_option})
    with pytest.raises(UnsupportedError, match="q \\[B, H, T, D\\]"):
        ops.mla(arguments[0][0], *arguments[1:])
    unknown = {"mode": "both", "mask": "prefix", "q_dtype": "int8", "num_heads": 0, "math": "tf32"}
    for change in ({name: value} for name, value in unknown.items()):
        with pytest.raises(UnsupportedError):
            dataclasses.replace(SMALL, **change)


def test_declines_with_a_reason() -> None:
    target = detect()
    for change, word in (({"kv_lora_rank": 70}, "multiples of 16"), ({"v_head_dim": 2048}, "above 1024")):
        answer = TVM_CPU.decide(dataclasses.replace(SMALL, **change), target)
        assert isinstance(answer, Declined) and word in answer.reason
    narrow = dataclasses.replace(SMALL, mode="expanded", math="bfloat16")
    answer = TVM_CPU.decide(narrow, Target.parse("znver5"))
    assert isinstance(answer, Declined) and "matrix unit" in answer.reason


def test_costs() -> None:
    spec = examples()[0]
    assert spec.latent_dim == 576 and spec.cache_bytes(1) == 1152
    assert spec.weight_bytes() == 2 * 16 * 256 * 512
    assert spec.operations(1, 4096) == 2 * 16 * (4096 * 1088 + 512 * 256)
