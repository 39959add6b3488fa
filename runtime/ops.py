"""The functions that models call. Each makes a spec, binds a form once, and then is one look-up away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..compiler.errors import UnsupportedError
from ..compiler.operator import Operator, Sizes
from ..kernels.attention import OPERATOR as ATTENTION
from ..kernels.attention import AttentionSpec
from ..kernels.attention.space import fastest_math
from ..kernels.embedding import OPERATOR as EMBEDDING
from ..kernels.embedding.spec import EmbeddingSpec
from ..kernels.gated_silu import OPERATOR as GATED_SILU
from ..kernels.gated_silu.spec import GatedSiluSpec
from ..kernels.mla import OPERATOR as MLA
from ..kernels.mla import MlaSpec, cheaper_mode
from ..kernels.norm import OPERATOR as NORM
from ..kernels.norm.spec import NormSpec
from ..kernels.quant_matmul import OPERATOR as QUANT_MATMUL
from ..kernels.quant_matmul import PackedWeight, QuantMatmulSpec
from ..kernels.quant_matmul.packing import layout_for
from ..kernels.quant_matmul.space import fastest_activation
from ..kernels.rope import OPERATOR as ROPE
from ..kernels.rope.spec import RopeSpec
from ..kernels.sampling import OPERATOR as SAMPLING
from ..kernels.sampling.spec import SamplingOptions, SamplingSpec
from ..kernels.sparse_mlp import OPERATOR as SPARSE_MLP
from ..kernels.sparse_mlp import SparseMlpSpec
from . import dispatch
from .dispatch import bound
from .kv_cache import LayerKV

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


_calls: dict[tuple[Any, ...], Any] = {}


def _call(
    key: tuple[Any, ...],
    operator: Operator,
    spec: Callable[[], Any],
    form: str | None,
    sizes: Sizes | None = None,
) -> Any:
    """Return the bound callable for `key`; the spec (some microseconds of checks) is made once."""
    key = (*key, dispatch.generation())
    call = _calls.get(key)
    if call is None:
        call = _calls[key] = bound(operator, spec(), form, sizes)
    return call


def dtype_name(tensor: torch.Tensor, what: str) -> str:
    """Return a float tensor's dtype as specs name it. Raises UnsupportedError."""
    name = _DTYPES.get(tensor.dtype)
    if name is None:
        raise UnsupportedError(f"{what} is {tensor.dtype}; use float32, bfloat16 or float16")
    return name


def quant_matmul(
    x: torch.Tensor,
    weight: PackedWeight,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    epilogue: str = "none",
    activation: str = "int8",
    softcap: float = 0.0,
    form: str | None = None,
) -> torch.Tensor:
    """Return epilogue(x @ W.T + bias) + residual, capped before the residual where a softcap is given.

    x is [..., K] fp32, bf16 or fp16 on the CPU; the result is [..., N] in x's dtype ([..., N/2] for
    "silu_pair" and "gelu_pair", whose weight is packed as a pair). bias is fp32 [N]; residual has the
    result's shape and x's dtype. With activation "int8" x is quantised dynamically, with "bfloat16" it is
    rounded (see QuantMatmulSpec); "auto" takes the faster of both for this target and number of rows. The
    gradient flows to x, bias and residual; the packed weight has none.
    Raises UnsupportedError for other shapes and dtypes.
    """
    if x.device.type != "cpu":
        return _gpu_matmul(x, weight, bias, residual, epilogue, activation, softcap)
    k = weight.k
    if x.dim() == 0 or x.shape[-1] != k:
        raise UnsupportedError(f"x is {tuple(x.shape)}, but the weight {weight.n} x {k} wants [..., {k}]")
    if bias is not None and (
        bias.dtype != torch.float32 or bias.shape != (weight.n,) or not bias.is_contiguous()
    ):
        raise UnsupportedError(
            f"bias is {tuple(bias.shape)} {bias.dtype}, not contiguous float32 [{weight.n}]"
        )
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        from . import autograd

        if softcap:
            raise UnsupportedError(
                "a softcap has no gradient; call the product without it and cap in PyTorch"
            )
        return autograd.quant_matmul(x, weight, bias, residual, epilogue, activation, form)
    m = x.numel() // k
    if activation == "auto":
        activation = fastest_activation(m, weight.format, dispatch.current_target())
    cache: dict[Any, Any] = weight.__dict__.setdefault("bound_calls", {})
    flags = (bias is None, residual is None, softcap, form, dispatch.generation())
    key = (x.dtype, epilogue, activation, m.bit_length(), *flags)
    call = cache.get(key)
    if call is None:
        call = cache[key] = bind_matmul(
            x, weight, bias is not None, residual is not None, epilogue, activation, softcap, form, m
        )
    shape = x.shape
    flat = x if x.dim() == 2 else x.reshape(-1, k)
    if not flat.is_contiguous():
        flat = flat.contiguous()
    n_out = weight.n // 2 if weight.pair else weight.n
    if residual is not None:
        if residual.dtype != x.dtype or residual.device != x.device or residual.shape != (*shape[:-1], n_out):
            raise UnsupportedError(
                f"residual is {tuple(residual.shape)} {residual.dtype}, not {(*shape[:-1], n_out)} {x.dtype}"
            )
        residual = residual.reshape(-1, n_out).contiguous()
    y = call(flat, weight, bias, residual)
    return y if x.dim() == 2 else y.view(*shape[:-1], n_out)


def bind_matmul(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: bool,
    residual: bool,
    epilogue: str,
    activation: str,
    softcap: float,
    form: str | None,
    m: int,
) -> Any:
    if weight.format.is_float and activation == "int8":
        activation = "float"
    if epilogue.endswith("_pair") != weight.pair:
        raise UnsupportedError(f"epilogue {epilogue!r} does not fit a weight in layout {weight.layout}")
    target = dispatch.current_target()
    if weight.layout != layout_for(weight.format, target, weight.pair):
        raise UnsupportedError(
            f"the weight's layout {weight.layout} is not the one that {target.name} reads; "
            "pack(weight.unpack(), target) lays it out again"
        )
    spec = QuantMatmulSpec(
        weight.n, weight.k, weight.format, activation, dtype_name(x, "x"), epilogue, bias, residual, softcap
    )
    return bound(QUANT_MATMUL, spec, form, {"m": max(m, 1)})


def _gpu_matmul(
    x: torch.Tensor, weight: Any, bias: torch.Tensor | None, residual: torch.Tensor | None, epilogue: str,
    activation: str, softcap: float,
) -> torch.Tensor:  # fmt: skip
    from . import gpu

    gpu.require_gpu(x)
    if isinstance(weight, PackedWeight):
        raise UnsupportedError(
            f"x is on {x.device} but the weight lies in a CPU layout; "
            "triton_packing.pack_gpu(weight.unpack()).to(x.device) lays it out for GPUs"
        )
    if epilogue != "none" or softcap:
        raise UnsupportedError(
            f"epilogue {epilogue!r} (softcap {softcap}) has no GPU kernel; see ops.gated_silu"
        )
    activation = "float" if activation == "auto" or weight.format.bits < 8 else activation
    return gpu.quant_matmul(x, weight, bias=bias, residual=residual, activation=activation)


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    kind: str = "rms",
    weight_offset: float = 0.0,
    form: str | None = None,
) -> torch.Tensor:
    """Return RMSNorm ("rms") or LayerNorm ("layer") of the last dimension of x, in x's shape and dtype.

    A residual, of the same shape and dtype, is added before the one rounding.
    """
    return _norm(x, weight, bias, residual, eps, kind, weight_offset, 0, form)


def norm_quantized(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    group_size: int,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    kind: str = "rms",
    weight_offset: float = 0.0,
    form: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the norm quantised: int8 codes [..., D], fp32 scales and int32 code sums [..., groups]."""
    return _norm(x, weight, bias, None, eps, kind, weight_offset, group_size, form)


def _norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
    eps: float, kind: str, offset: float, group_size: int, form: str | None,
) -> Any:  # fmt: skip
    dim = x.shape[-1]
    if weight.shape != (dim,):
        raise UnsupportedError(f"a norm over {dim} elements has a weight of shape {tuple(weight.shape)}")

    def spec() -> NormSpec:
        types = (dtype_name(x, "x"), dtype_name(weight, "weight"))
        return NormSpec(
            kind, dim, eps, *types, "", offset, bias is not None, group_size, residual is not None
        )

    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise UnsupportedError(
            f"residual is {tuple(residual.shape)} {residual.dtype}, not {tuple(x.shape)} {x.dtype}"
        )
    if x.device.type != "cpu":
        from . import gpu

        gpu.require_gpu(x)
        y = gpu.norm(NormSpec(**{**vars(spec()), "residual": False}), x, weight, bias)
        return y if residual is None else y + residual
    flags = (bias is None, residual is None, group_size)
    key = ("norm", kind, dim, eps, x.dtype, weight.dtype, offset, *flags, form)
    return _call(key, NORM, spec, form)(x, weight, bias, residual)


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    out: torch.Tensor | None = None,
    form: str | None = None,
) -> torch.Tensor:
    """Return x [B, H, T, D] rotated by fp32 tables [T or B, T, rotary_dim/2]; `out` may be x."""
    dim = x.shape[-1]
    key = ("rope", dim, rotary_dim, interleaved, x.dtype, form)
    spec = lambda: RopeSpec(dim, rotary_dim or 0, interleaved, dtype_name(x, "x"))  # noqa: E731
    if x.device.type != "cpu":
        from . import gpu

        gpu.require_gpu(x)
        return gpu.rope(spec(), x, cos, sin, out)
    return _call(key, ROPE, spec, form)(x, cos, sin, out)


def gated_silu(gate: torch.Tensor, up: torch.Tensor, *, form: str | None = None) -> torch.Tensor:
    """Return silu(gate) * up [..., F] in gate's dtype, with gradients. (CPU models fuse it into the
    matmul.)
    """
    if gate.device.type != "cpu":
        from . import gpu

        gpu.require_gpu(gate)
        return gpu.gated_silu(gate, up)
    spec = lambda: GatedSiluSpec(dtype_name(gate, "gate"))  # noqa: E731
    return _call(("gated_silu", gate.dtype, form), GATED_SILU, spec, form)(gate, up)


def embedding(
    ids: torch.Tensor, weight: PackedWeight, *, factor: float = 1.0, form: str | None = None
) -> torch.Tensor:
    """Return rows int64 ids [...] of a packed table times `factor` as fp32 [..., K].

    An id out of range raises EdgeFormerError.
    """
    key = ("embedding", weight.n, weight.k, weight.format, weight.layout, factor, form)
    spec = lambda: EmbeddingSpec.of(weight, factor=factor)  # noqa: E731
    return _call(key, EMBEDDING, spec, form)(ids, weight)


def sample(
    logits: torch.Tensor,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    previous: torch.Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    form: str | None = None,
) -> torch.Tensor:
    """Return a token int64 [B] for each row of fp32 logits [B, V]; the same seed and step, the same token.

    Options as in SamplingOptions; `previous` int64 [B, *] are the tokens that the penalty looks at.
    """
    options = SamplingOptions(repetition_penalty, temperature, top_k, top_p, min_p)
    vocab = logits.shape[-1]
    call = _call(("sampling", vocab, form), SAMPLING, lambda: SamplingSpec(vocab), form)
    return call(logits, options, previous, seed, step)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: str = "none",
    lengths: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    q_offset: int | None = None,
    return_lse: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    math: str = "float32",
    form: str | None = None,
) -> Any:
    """Return attention of q [B, Hq, Tq, D] over k [B, Hkv, Tk, D] and v [B, Hkv, Tk, Dv], in q's dtype.

    Tensors may have any strides with a last one of 1. Masks, window, softcap and sinks as in
    AttentionSpec; with `return_lse` the result is (out, lse fp32 [B, Hq, Tq]). `math` as in
    `attention_cached`.
    """
    if q.device.type != "cpu":
        from . import gpu

        gpu.require_gpu(q)
        result = gpu.attention(
            q, k, v, mask=mask, lengths=lengths, window=window, softcap=softcap, scale=scale,
                q_offset=q_offset,
            k_scale=k_scale, v_scale=v_scale, bias=bias, prefix=prefix, sinks=sinks,
        )  # fmt: skip
        return result if return_lse else result[0]
    if math == "auto":
        math = _fastest_math(q, _kv_name(k), mask)
    shape = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    flags = (bool(window), bool(softcap), sinks is not None, return_lse)

    def spec() -> AttentionSpec:
        bias_name = "float32" if bias is None else dtype_name(bias, "bias")
        types = (dtype_name(q, "q"), _kv_name(k))
        return AttentionSpec(*shape, *types, mask, "strided", *flags, bias_name, math=math)

    bias_dtype, tq, tk = None if bias is None else bias.dtype, q.shape[2], k.shape[2]
    key = ("attention", *shape, q.dtype, k.dtype, mask, *flags, bias_dtype, math, form)
    key = (*key, tq.bit_length(), tk.bit_length())
    out, lse = _call(key, ATTENTION, spec, form, {"tq": tq, "tk": tk})(
        q, k, v, lengths=lengths, bias=bias, prefix=prefix, window=window, sinks=sinks, softcap=softcap,
        scale=scale, q_offset=q_offset, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attention_cached(
    q: torch.Tensor,
    cache: LayerKV,
    position: int,
    *,
    mask: str = "causal",
    lengths: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    math: str = "float32",
    form: str | None = None,
) -> torch.Tensor:
    """Return attention of q [B, Hq, T, D], whose first query stands at `position`, over a layer's KV cache.

    The cache already holds the keys and values of these T positions. `math` is "float32", "bfloat16" (see
    AttentionSpec), or "auto": bf16 for many queries over a cache of no more precision, where a matrix unit
    makes it faster.
    """
    if math == "auto":
        math = _fastest_math(q, cache.dtype, mask)
    shape = (q.shape[1], cache.k.shape[1], q.shape[3], cache.v.shape[3])
    flags = (bool(window), bool(softcap), sinks is not None)

    def spec() -> AttentionSpec:
        bias_name = "float32" if bias is None else dtype_name(bias, "bias")
        types = (dtype_name(q, "q"), cache.dtype)
        return AttentionSpec(*shape, *types, mask, "blocked", *flags, bias_dtype=bias_name, math=math)

    bias_dtype = None if bias is None else bias.dtype
    tq, tk = q.shape[2], position + q.shape[2]
    key = ("attention_cached", *shape, q.dtype, cache.k.dtype, mask, *flags, bias_dtype, math, form)
    key = (*key, tq.bit_length(), tk.bit_length())
    return _call(key, ATTENTION, spec, form, {"tq": tq, "tk": tk})(
        q, cache.k, cache.v, tk=tk, k_scale=cache.k_scale, v_scale=cache.v_scale,
        lengths=lengths, bias=bias, window=window, softcap=softcap, scale=scale, sinks=sinks,
    )[0]  # fmt: skip


def mla(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    *,
    tk: int | None = None,
    mask: str = "causal",
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
    cache_scale: torch.Tensor | None = None,
    return_lse: bool = False,
    mode: str = "auto",
    math: str = "float32",
    form: str | None = None,
) -> Any:
    """Return multi-head latent attention [B, H, T, Dv] over the first `tk` cached latents, in q's dtype.

    q_nope [B, H, T, Dn], q_rope [B, H, T, Dr] (rotated), cache [B, capacity, R + Dr] (normalised latents and
    rotated keys side by side, the T new tokens included), w_uk [H, Dn, R], w_uv [H, R, Dv]; see MlaSpec.
    `mode` "absorbed", "expanded", or "auto": the one with fewer operations. With `return_lse` the result is
    (out, lse fp32 [B, H, T]). Raises UnsupportedError for other shapes and dtypes.
    """
    if q_nope.dim() != 4 or q_rope.dim() != 4 or w_uk.dim() != 3 or w_uv.dim() != 3 or cache.dim() != 3:
        raise UnsupportedError("mla takes q [B, H, T, D], a cache [B, capacity, R + Dr] and w [H, D, R]")
    sizes = (q_nope.shape[1], w_uk.shape[2], q_nope.shape[3], q_rope.shape[3], w_uv.shape[2])
    keys = cache.shape[1] if tk is None else tk
    types = (q_nope.dtype, cache.dtype, w_uk.dtype)

    def spec(mode: str) -> MlaSpec:
        names = (dtype_name(q_nope, "q_nope"), _kv_name(cache), dtype_name(w_uk, "w_uk"))
        return MlaSpec(*sizes, *names, mode, mask, return_lse, math)

    if mode == "auto":
        mode = cheaper_mode(spec("absorbed"), q_nope.shape[2], keys)
    if q_nope.device.type != "cpu":
        from . import gpu

        gpu.require_gpu(q_nope)
        result = gpu.mla(
            q_nope, q_rope, cache, w_uk, w_uv, tk=keys, mask=mask, mode=mode, scale=scale, q_offset=q_offset,
            lengths=lengths, cache_scale=cache_scale,
        )  # fmt: skip
        return result if return_lse else result[0]
    key = ("mla", *sizes, *types, mode, mask, return_lse, math, form)
    out, lse = _call(key, MLA, lambda: spec(mode), form)(
        q_nope, q_rope, cache, w_uk, w_uv, tk=keys, scale=scale, q_offset=q_offset, lengths=lengths,
        cache_scale=cache_scale,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def sparse_mlp(
    x: torch.Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    *,
    threshold: float = 0.0,
    indices: torch.Tensor | None = None,
    activation: str = "silu",
    arithmetic: str = "int8",
    form: str | None = None,
) -> torch.Tensor:
    """Return down(act(gate(x)) * up(x)) [..., K] of the active blocks of neurons only, in x's dtype.

    x is [..., K]; `gate_up` the packed pair [2 F, K], `down` the packed [K, F], both as the dense MLP has
    them. Active are the blocks with a |act(gate)| >= `threshold` in a row, or those that int `indices` [n]
    name; see SparseMlpSpec. Made for few rows: at one row it is twice as fast as the dense MLP where a tenth
    of the blocks fires, and as fast where all do (`bench.sparse_mlp`; a weight keeps how many fired last,
    and from 80% on gates and ups are read in one pass). For prompts the dense
    MLP is the one to call. Raises UnsupportedError for other shapes and types.
    """
    hidden, neurons = down.n, down.k
    if x.dim() == 0 or x.shape[-1] != hidden:
        raise UnsupportedError(f"x is {tuple(x.shape)}, but the MLP wants [..., {hidden}]")
    select = "threshold" if indices is None else "indices"
    key = (
        "sparse_mlp",
        hidden,
        neurons,
        gate_up.format,
        down.format,
        activation,
        select,
        arithmetic,
        x.dtype,
    )

    def spec() -> SparseMlpSpec:
        formats = (gate_up.format, down.format)
        return SparseMlpSpec(hidden, neurons, *formats, activation, select, arithmetic, dtype_name(x, "x"))

    flat = x.reshape(-1, hidden).contiguous()
    options = {"threshold": threshold} if indices is None else {"indices": indices}
    return _call((*key, form), SPARSE_MLP, spec, form)(flat, gate_up, down, **options).view(x.shape)


def decode_attention(
    q: torch.Tensor, cache: LayerKV, position: int, *, softcap: float = 0.0, scale: float | None = None
) -> torch.Tensor:
    """Return attention of one query a row, q [B, Hq, 1, D] at `position`, over all that a cache holds.

    The same as `attention_cached` without a mask, and without its checks: the owner of the cache has made it
    for these heads.
    """
    calls: dict[Any, Any] = cache.cache.bound_calls
    tk = position + 1
    key = (q.shape, q.dtype, softcap, cache.k.shape[:2], tk.bit_length(), dispatch.generation())
    call = calls.get(key)
    if call is None:
        spec = AttentionSpec(
            q.shape[1], cache.k.shape[1], q.shape[3], cache.v.shape[3], dtype_name(q, "q"), cache.dtype,
            "none", "blocked", softcap=bool(softcap),
        )  # fmt: skip
        checked = bound(ATTENTION, spec, None, {"tq": 1, "tk": tk})
        checked(q, cache.k, cache.v, tk=1, softcap=softcap, **_scales(cache))  # once with every check
        call = calls[key] = getattr(checked, "unchecked", checked)
    if q.stride(3) != 1:
        q = q.contiguous()
    options = _scales(cache)
    return call(q, cache.k, cache.v, tk=tk, softcap=softcap, scale=scale, **options)[0]


def _scales(cache: LayerKV) -> dict[str, Any]:
    return {} if cache.k_scale is None else {"k_scale": cache.k_scale, "v_scale": cache.v_scale}


def _fastest_math(q: torch.Tensor, kv_dtype: str, mask: str) -> str:
    """Return what "auto" stands for; a bias has no matrix-unit kernel."""
    return "float32" if mask == "additive" else fastest_math(q.shape[2], kv_dtype, dispatch.current_target())


def _kv_name(k: torch.Tensor) -> str:
    return "int8" if k.dtype == torch.int8 else dtype_name(k, "k")


def describe_bound() -> list[dict[str, Any]]:
    """Return what runs in this process: operator, spec, form, back end, configuration, record, declined."""
    return [vars(choice) | {"declined": list(choice.declined)} for choice in dispatch.choices()]
