"""The KV cache: what is appended comes back, in every type, by every form; sizes, roll-back and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgeformer.compiler.errors import CapacityError, UnsupportedError
from edgeformer.compiler.target import detect
from edgeformer.kernels.attention import OPERATOR, AttentionSpec
from edgeformer.kernels.attention.append import OPERATOR as APPEND
from edgeformer.kernels.attention.append import AppendSpec, quantize, reference
from edgeformer.kernels.attention.reference import dense
from edgeformer.runtime import dispatch, kv_cache, launch
from edgeformer.runtime.kv_cache import KVCache, LayerKV

DTYPES = ["fp32", "bf16", "fp16", "int8"]


def _tokens(batch: int, tokens: int, heads: int = 3, dim: int = 64, v_dim: int = 80) -> tuple[Tensor, Tensor]:
    """k as a view of [B, T, H, D], v contiguous."""
    return torch.randn(batch, tokens, heads, dim).transpose(1, 2), torch.randn(batch, heads, tokens, v_dim)


def _read(layer: LayerKV, length: int) -> tuple[Tensor, Tensor]:
    spec = AttentionSpec(3, 3, layer.k.shape[3], layer.v.shape[3], kv_dtype=layer.dtype, layout="blocked")
    return dense(spec, layer.k, layer.v, length, layer.k_scale, layer.v_scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_appended_tokens_come_back(dtype: str) -> None:
    torch.manual_seed(0)
    cache = KVCache(2, 2, 3, 64, 100, dtype, v_head_dim=80)
    parts = [_tokens(2, n) for n in (1, 5, 40, 1, 17)]
    position = 0
    for k, v in parts:
        for i in range(2):
            cache.layer(i).append(k, v, position)
        position += k.shape[2]
    assert cache.length == position == 64
    for i in range(2):
        for stored, appended in zip(_read(cache.layer(i), 64), zip(*parts)):
            expected = torch.cat(appended, 2)
            if dtype == "int8":
                codes, scale = quantize(expected)
                expected = codes.double() * scale[..., None].double()
            else:
                expected = expected.to(cache.layer(i).v.dtype).double()
            assert torch.equal(stored, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float16", "int8"])
def test_compiled_append_equals_the_reference(dtype: str, kv_dtype: str) -> None:
    torch.manual_seed(1)
    spec = AppendSpec(48, 16, dtype, kv_dtype)
    form = APPEND.form("tvm_cpu")
    call = launch.bind(APPEND, form, spec, form.space(spec, detect())[0], detect())
    for batch, tokens, position in ((1, 1, 0), (2, 3, 15), (1, 300, 7)):
        k, v = (x.to(getattr(torch, dtype)) for x in _tokens(batch, tokens, 2, 48, 16))
        k[0, 0, 0] = 0  # its scale is 0
        kind = getattr(torch, kv_dtype)
        results = []
        for run in (call, lambda *a: reference(spec, *a)):
            k_cache = torch.zeros(batch, 2, 20, 48, 16, dtype=kind)
            v_cache = torch.zeros(batch, 2, 320, 16, dtype=kind)
            scales = [torch.full((batch, 2, 320), 9.0) if kv_dtype == "int8" else None for _ in range(2)]
            run(k, v, k_cache, v_cache, *scales, position)
            results.append([k_cache, v_cache, *(s for s in scales if s is not None)])
        for ours, expected in zip(*results):
            assert torch.equal(ours, expected)


def test_a_bad_value_gives_a_nan_scale() -> None:
    cache = KVCache(1, 1, 2, 64, 16, "int8")
    layer = cache.layer(0)
    k, v = _tokens(1, 3, 2, 64, 64)
    k[0, 0, 1, 5], v[0, 1, 2, 7] = torch.nan, torch.inf
    layer.append(k, v, 0)
    assert layer.k_scale is not None
    assert layer.v_scale is not None
    assert layer.k_scale[0, :, :3].isnan().tolist() == [[False, True, False], [False, False, False]]
    assert layer.v_scale[0, :, :3].isnan().tolist() == [[False, False, False], [False, False, True]]


def test_a_head_size_without_a_kernel_falls_back() -> None:
    cache = KVCache(1, 1, 3, 20, 40, "fp32")
    k, v = _tokens(1, 18, 3, 20, 20)
    cache.layer(0).append(k, v, 0)
    stored, _ = _read(cache.layer(0), 18)
    assert torch.equal(stored.float(), k)
    chosen, choice = dispatch.choose(APPEND, AppendSpec(20, 20), detect())
    assert chosen.name == "reference"
    assert "multiples of 16" in choice.declined[0][1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes(dtype: str) -> None:
    for capacity in (1, 16, 100):
        cache = KVCache(3, 2, 3, 64, capacity, dtype, v_head_dim=32)
        assert cache.nbytes == KVCache.bytes_needed(3, 2, 3, 64, capacity, dtype, 32)
        assert cache.layer(0).capacity % 16 == 0
        assert cache.batch == 2


def test_clone_trim_and_rollback() -> None:
    cache = KVCache(1, 1, 3, 64, 64)
    k, v = _tokens(1, 30, 3, 64, 64)
    cache.layer(0).append(k, v, 0)
    copy = cache.clone()
    cache.rollback(20)
    assert (cache.length, copy.length) == (10, 30)
    cache.layer(0).append(v[:, :, :5], k[:, :, :5], 10)
    assert cache.length == 15
    k_then, _ = _read(copy.layer(0), 30)
    assert torch.equal(k_then, k.bfloat16().double())
    k_now, _ = _read(cache.layer(0), 15)
    assert torch.equal(k_now, torch.cat([k[:, :, :10], v[:, :, :5]], 2).bfloat16().double())
    cache.trim(3)
    assert cache.length == 3
    for wrong in (lambda: cache.trim(4), lambda: cache.rollback(4), lambda: cache.trim(-1)):
        with pytest.raises(CapacityError):
            wrong()


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(1, 1, 3, 64, 20)
    k, v = _tokens(1, 15, 3, 64, 64)
    layer = cache.layer(0)
    layer.append(k, v, 0)
    with pytest.raises(CapacityError, match="30 tokens do not fit"):
        layer.append(k, v, 15)
    with pytest.raises(CapacityError, match="gap"):
        layer.append(k[:, :, :1], v[:, :, :1], 16)
    with pytest.raises(UnsupportedError, match="batch 1, 3 heads"):
        layer.append(k[:, :2, :1], v[:, :2, :1], 15)
    with pytest.raises(UnsupportedError, match="int4"):
        KVCache(1, 1, 3, 64, 20, "int4")
    monkeypatch.setattr(kv_cache, "available_memory", lambda: 1 << 20)
    with pytest.raises(CapacityError, match="smaller context"):
        KVCache(30, 1, 3, 64, 8192)
    assert KVCache(1, 1, 1, 64, 16).nbytes == 16 * 64 * 2 * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_reads_the_cache_as_the_reference_does(dtype: str) -> None:
    torch.manual_seed(2)
    cache = KVCache(1, 2, 3, 64, 90, dtype)
    layer = cache.layer(0)
    spec = AttentionSpec(9, 3, 64, 64, kv_dtype=layer.dtype, layout="blocked")
    call = dispatch.bound(OPERATOR, spec)
    position = 0
    for tokens in (33, 1, 20, 1):
        k, v = _tokens(2, tokens, 3, 64, 64)
        layer.append(k, v, position)
        position += tokens
        q = torch.randn(2, 9, tokens, 64)
        options = {"tk": position, "k_scale": layer.k_scale, "v_scale": layer.v_scale}
        out, _ = call(q, layer.k, layer.v, **options)
        expected, _ = OPERATOR.reference(spec, q, layer.k, layer.v, **options)
        assert (out - expected).norm() <= 1e-5 * expected.norm()
