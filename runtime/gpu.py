"""Operators on GPU tensors: the Triton kernels with the device's default tiles, under autograd.

Nothing here is imported before the first GPU tensor. A problem that the kernels do not take raises
UnsupportedError with the reason; they never guess.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from ..compiler.backends.triton_gpu import ARCHITECTURES, Architecture, available
from ..compiler.errors import UnsupportedError
from ..kernels.norm.spec import NormSpec
from ..kernels.quant_matmul.triton_packing import GpuWeight
from ..kernels.rope.spec import RopeSpec
from . import gpu_tiles

_HALF = (torch.float16, torch.bfloat16)
_MOST = (1 << 31) - 1
_VECTOR_ROWS = 4  # rows that vector units multiply faster than matrix instructions
_FEW_ROWS = 16


def require_gpu(x: Tensor) -> None:
    """Raise UnsupportedError for a tensor on a device that has no kernels of ours."""
    if x.device.type not in ("cuda", "xpu"):
        raise UnsupportedError(
            f"there is no form for device {x.device}; move the tensors to the CPU or a GPU"
        )


@functools.cache
def architecture_of(device: torch.device) -> Architecture:
    """Return a device's architecture. Raises UnsupportedError for one that the kernels do not cover."""
    if problem := available():
        raise UnsupportedError(problem)
    if device.type == "cpu":  # Triton's interpreter
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise UnsupportedError("Triton kernels run on a CPU under TRITON_INTERPRET=1 only")
        return ARCHITECTURES["gfx1151"]
    if device.type == "xpu":
        return Architecture("xpu", "xpu", 16, 128 << 10, "ampere")
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(device)
        number = 10 * major + minor
        name = next((f"sm_{n}" for n in (90, 89, 80) if number >= n), f"sm_{number}")
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"GPU architecture {name} has no kernels of ours (known: {', '.join(ARCHITECTURES)}); "
            "use PyTorch's own there"
        )
    return ARCHITECTURES[name]


@functools.cache
def compute_units(device: torch.device) -> int:
    """Return the device's multiprocessors (compute units; on Intel, Xe cores)."""
    if device.type == "cpu":
        return 8
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 0


def tile(name: str, device: torch.device) -> dict[str, Any]:
    """Return the tile that a kernel runs with on a device: a tuning record's, or the default."""
    return gpu_tiles.chosen(name, architecture_of(device), _cache_bytes(device))


def _check(**tensors: Tensor | None) -> Architecture:
    """Require one device, half precision, last strides of 1 and sizes that fit 32-bit indices of rows."""
    first = next(t for t in tensors.values() if t is not None)
    for name, t in tensors.items():
        if t is None:
            continue
        if t.device != first.device:
            raise UnsupportedError(f"{name} is on {t.device}, other arguments on {first.device}")
        if t.dtype not in _HALF and t.dtype != torch.int8:
            raise UnsupportedError(f"{name} is {t.dtype}; GPU kernels take float16 and bfloat16")
        if t.shape[-1] != 1 and t.stride(-1) != 1:
            raise UnsupportedError(f"the last stride of {name} is {t.stride(-1)}, not 1; make it contiguous")
        if t.shape[:-1].numel() > _MOST:
            raise UnsupportedError(f"{name} has {t.shape[:-1].numel()} rows; at most {_MOST} can be indexed")
    return architecture_of(first.device)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Any:
        from ..kernels.attention.triton_prefill import forward

        name = "attention_forward_256" if q.shape[3] > 128 else "attention_forward"
        batch, heads, tq, _ = q.shape
        out = torch.empty(batch, tq, heads, v.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
        lse = forward(q, k, v, out=out, configuration=tile(name, q.device), **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:  # pyright: ignore
        from ..kernels.attention.triton_backward import backward

        q, k, v, out, lse = ctx.saved_tensors
        tiles = {name: tile(f"attention_grad_{name}", q.device) for name in ("q", "kv")}
        return *backward(q, k, v, out, lse, grad, configurations=tiles, **ctx.options), None


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: str = "none", lengths: Tensor | None = None, window: int = 0,
    softcap: float = 0.0, scale: float | None = None, q_offset: int | None = None,
        k_scale: Tensor | None = None,
    v_scale: Tensor | None = None, **others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (out, lse) as `ops.attention`; few causal queries split their keys over the device."""
    _check(q=q, k=k, v=v)
    used = [name for name, value in others.items() if value is not None]
    if used or mask not in ("none", "causal", "causal_lengths"):
        raise UnsupportedError(f"attention on a GPU has no {', '.join(used) or f'mask {mask!r}'}")
    if max(q.shape[3], v.shape[3]) > 256 or min(q.shape[3], v.shape[3]) < 16:
        raise UnsupportedError(f"head sizes {q.shape[3]} and {v.shape[3]} are not within 16 to 256")
    if q.shape[1] % k.shape[1] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise UnsupportedError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}")
    tq, tk = q.shape[2], k.shape[2]
    scale = float(q.shape[3] ** -0.5) if scale is None else scale
    offset = tk - tq if q_offset is None else q_offset
    causal = mask != "none"
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    packed = tq * (q.shape[1] // k.shape[1])
    if causal and offset == tk - tq and packed <= 16 and lengths is None and not needs_grad:
        rows = torch.full((q.shape[0],), tk, dtype=torch.int32, device=q.device)
        return decode(
            q, k, v, rows, scale=scale, window=window, softcap=softcap, k_scale=k_scale, v_scale=v_scale
        )
    if k.dtype == torch.int8:
        raise UnsupportedError(
            f"int8 keys have a decode kernel only; {tq} queries of this mask need float ones"
        )
    limits = None if lengths is None else lengths.to(device=q.device, dtype=torch.int32)
    options = {
        "causal": causal, "window": window, "softcap": softcap, "scale": scale, "q_offset": offset,
        "lengths": limits,
    }  # fmt: skip
    result: tuple[Tensor, Tensor] = _Attention.apply(q, k, v, options)  # pyright: ignore
    return result


def decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, scale: float | None = None, window: int = 0,
    softcap: float = 0.0, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
        pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (out, lse) of the last Tq queries of each sequence; lengths int32 [B] on the device.

    k [B, Hkv, capacity, D], or with `pages` int32 [B, *] [P, Hkv, page, D]; int8 with fp32 scales alike.
    """
    from ..kernels.attention import triton_decode

    _check(q=q, k=k, v=v)
    if (k.dtype == torch.int8) != (k_scale is not None) or (k_scale is None) != (v_scale is None):
        raise UnsupportedError("int8 keys and values need k_scale and v_scale, and no others have them")
    batch, heads, tq, dim = q.shape
    settings = tile("attention_decode", q.device)
    keys = k.shape[2] if pages is None else pages.shape[1] * k.shape[2]
    splits = triton_decode.splits_for(batch * k.shape[1], keys, compute_units(q.device), settings["BLOCK_N"])
    out = torch.empty(batch, heads, tq, v.shape[3], dtype=q.dtype, device=q.device)
    lse = triton_decode.decode(
        q, k, v, lengths=lengths, scale=dim**-0.5 if scale is None else scale, softcap=softcap, window=window,
        k_scale=k_scale, v_scale=v_scale, pages=pages, splits=splits, out=out, configuration=settings,
    )  # fmt: skip
    return out, lse


def mla(
    q_nope: Tensor, q_rope: Tensor, cache: Tensor, w_uk: Tensor, w_uv: Tensor, *, tk: int, mask: str,
    mode: str, scale: float | None = None, lengths: Tensor | None = None, **others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (out, lse) as `ops.mla`: absorbed in the latent kernel, expanded through `attention`.

    Absorbed, `lengths` int32 [B] on the device count each sequence's cached tokens, at most `tk`: the same
    launches then serve every step (CUDA graphs).
    """
    from ..kernels.attention.triton_decode import splits_for
    from ..kernels.mla import triton_decode

    _check(q_nope=q_nope, q_rope=q_rope, cache=cache, w_uk=w_uk, w_uv=w_uv)
    used = [name for name, value in others.items() if value is not None]
    if used or mask not in ("none", "causal"):
        raise UnsupportedError(f"mla on a GPU has no {', '.join(used) or f'mask {mask!r}'}")
    batch, heads, tq, nope = q_nope.shape
    rank, rope = w_uk.shape[2], q_rope.shape[3]
    scale = float((nope + rope) ** -0.5) if scale is None else scale
    if mode == "expanded" or (mask == "none" and tq > 1):
        if lengths is not None:
            raise UnsupportedError("expanded mla has no lengths on the device; use mode 'absorbed'")
        c, r = cache[:, :tk].unsqueeze(1).split([rank, rope], 3)
        k = torch.cat([c @ w_uk.transpose(1, 2), r.expand(-1, heads, -1, -1)], 3)
        return attention(torch.cat([q_nope, q_rope], 3), k, c @ w_uv, mask=mask, scale=scale)
    if rank & (rank - 1) or rope & (rope - 1):
        raise UnsupportedError(f"absorbed latents of {rank} + {rope} elements: both have to be powers of two")
    q = torch.cat([q_nope @ w_uk, q_rope], 3)
    settings = tile("mla_decode", q.device)
    programs = batch * tq * -(-heads // settings["BLOCK_M"])
    splits = splits_for(programs, tk, compute_units(q.device), settings["BLOCK_N"])
    if lengths is None:
        lengths = torch.full((batch,), tk, dtype=torch.int32, device=q.device)
    latent = torch.empty(batch, heads, tq, rank, dtype=q.dtype, device=q.device)
    lse = triton_decode.decode(
        q, cache, rank, lengths=lengths, scale=scale, splits=splits, out=latent, configuration=settings
    )
    return latent @ w_uv, lse


class _QuantMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: GpuWeight, bias: Tensor | None, activation: str) -> Tensor:
        ctx.weight = weight
        return _product(x, weight, bias, None, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        from ..kernels.quant_matmul.triton_matmul import grad_x

        dx = grad_x(grad.contiguous(), ctx.weight, tile("matmul_grad_x", grad.device))
        return dx, None, grad.float().sum(0) if ctx.needs_input_grad[2] else None, None


def quant_matmul(
    x: Tensor,
    weight: GpuWeight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "float",
) -> Tensor:
    """Return x @ W.T + bias + residual for x [..., K] in half precision; "int8" quantises x (8-bit
    weights).
    """
    _check(x=x, residual=residual)
    if x.shape[-1] != weight.k or weight.words.device != x.device:
        raise UnsupportedError(f"x is {tuple(x.shape)} on {x.device}, the weight {weight.n} x {weight.k} "
                               f"on {weight.words.device}")  # fmt: skip
    if activation not in ("float", "int8") or (activation == "int8" and weight.format.bits != 8):
        raise UnsupportedError(
            f"activation {activation!r} with {weight.format.key()} weights has no GPU kernel"
        )
    flat = x.reshape(-1, weight.k)
    shape = (*x.shape[:-1], weight.n)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _QuantMatmul.apply(flat, weight, bias, activation).view(shape)  # pyright: ignore
        return y if residual is None else y + residual
    extra = None if residual is None else residual.reshape(-1, weight.n).contiguous()
    return _product(flat, weight, bias, extra, activation).view(shape)


def _product(
    x: Tensor, weight: GpuWeight, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    from ..kernels.quant_matmul import triton_matmul, triton_w8a8

    m = x.shape[0]
    y = torch.empty(m, weight.n, dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    if activation == "int8":
        triton_w8a8.launch(x, weight, bias, residual, y, tile("matmul_w8a8", x.device))
        return y
    name = "matvec" if m <= _VECTOR_ROWS else "matmul_few" if m <= _FEW_ROWS else "matmul"
    settings = tile(name, x.device)
    if name == "matvec":  # the registers of one row's tile serve a few
        settings["BLOCK_N"] = max(16, settings["BLOCK_N"] // (1 << (m - 1).bit_length()))
    columns = -(-weight.n // settings["BLOCK_N"])
    rows = 1 if name == "matvec" else -(-m // settings["BLOCK_M"])
    runs = -(-weight.k // weight.k_run)
    wanted = 4 * compute_units(x.device) // max(1, rows * columns)
    splits = max(1, min(wanted, runs // 4)) if m <= 64 else 1
    triton_matmul.launch(x, weight, bias, residual, y, {**settings, "vector": name == "matvec"}, splits)
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec: NormSpec) -> Tensor:
        from ..kernels.norm.triton_kernel import forward

        ctx.save_for_backward(x, weight)
        ctx.spec, ctx.has_bias = spec, bias is not None
        return forward(spec, x, weight, bias)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        from ..kernels.norm.triton_kernel import backward

        x, weight = ctx.saved_tensors
        return *backward(ctx.spec, x, weight, grad.contiguous(), ctx.has_bias), None


def norm(spec: NormSpec, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the norm of the last dimension of x."""
    _check(x=x, weight=weight, bias=bias)
    if spec.group_size:
        raise UnsupportedError("a norm that quantises its output has no GPU kernel")
    if spec.dim > 1 << 16:
        raise UnsupportedError(f"a norm over {spec.dim} elements is above {1 << 16}")
    y: Tensor = _Norm.apply(x.reshape(-1, spec.dim), weight, bias, spec)  # pyright: ignore
    return y.view(x.shape)


def add_norm(spec: NormSpec, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (norm(x + residual), x + residual) in one pass; inference only."""
    from ..kernels.norm.triton_kernel import forward

    _check(x=x, residual=residual, weight=weight)
    y, total = forward(spec, x.reshape(-1, spec.dim), weight, None, residual.reshape(-1, spec.dim))
    assert total is not None
    return y.view(x.shape), total.view(x.shape)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec) -> Tensor:
        from ..kernels.rope.triton_kernel import rotate

        ctx.save_for_backward(cos, sin)
        ctx.spec = spec
        return rotate(spec, x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        from ..kernels.rope.triton_kernel import rotate

        grad = grad if grad.stride(3) == 1 else grad.contiguous()
        cos, sin = ctx.saved_tensors
        return rotate(ctx.spec, grad, cos, sin, inverse=True), None, None, None


def rope(spec: RopeSpec, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Return x [B, H, T, D] rotated by fp32 tables; `out` may be x (inference)."""
    from ..kernels.rope.triton_kernel import rotate

    _check(x=x, out=out)
    half, positions = spec.rotary_dim // 2, x.shape[2]
    shapes = ((positions, half), (x.shape[0], positions, half), (1, positions, half))
    if cos.shape != sin.shape or cos.dtype != torch.float32 or tuple(cos.shape) not in shapes:
        raise UnsupportedError(f"rope's tables are {cos.dtype} {tuple(cos.shape)}, not float32 {shapes[0]}")
    cos, sin = cos.contiguous(), sin.contiguous()
    if out is not None:
        return rotate(spec, x, cos, sin, out)
    y: Tensor = _Rope.apply(x, cos, sin, spec)  # pyright: ignore
    return y


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from ..kernels.gated_silu.triton_kernel import forward

        ctx.save_for_backward(gate, up)
        return forward(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        from ..kernels.gated_silu.triton_kernel import backward

        gate, up = ctx.saved_tensors
        return backward(gate, up, grad.contiguous())


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up [..., F]."""
    _check(gate=gate, up=up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise UnsupportedError(
            f"gate {tuple(gate.shape)} {gate.dtype} does not fit up {tuple(up.shape)} {up.dtype}"
        )
    columns = gate.shape[-1]
    y: Tensor = _GatedSilu.apply(gate.reshape(-1, columns), up.reshape(-1, columns))  # pyright: ignore
    return y.view(gate.shape)


def sparse_mlp(
    x: Tensor,
    weights: Any,
    *,
    block: int,
    threshold: float = 0.0,
    fires: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """Return the sparse MLP of x [M <= 16, K] (`kernels.sparse_mlp.triton_kernel.pack_sparse`); see its
    spec.
    """
    from ..kernels.sparse_mlp.triton_kernel import launch

    _check(x=x)
    if x.dim() != 2 or x.shape[0] > _FEW_ROWS or x.shape[1] != weights.gate.k:
        raise UnsupportedError(f"x is {tuple(x.shape)}, not [1 to {_FEW_ROWS}, {weights.gate.k}]")
    if any(w.format.bits == 8 for w in (weights.gate, weights.up, weights.down)):
        raise UnsupportedError("8-bit weights have no sparse GPU kernel")
    y = torch.empty_like(x)
    launch(x, weights, y, threshold=threshold, fires=fires, block=block, activation=activation, splits=8,
           configuration=tile("sparse_mlp", x.device))  # fmt: skip
    return y
