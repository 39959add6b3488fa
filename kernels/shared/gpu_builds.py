"""Every Triton kernel as it is compiled without a device: types of its arguments, constants, tile, rules.

The list is what `make cross` reads for each architecture and what tuning without a device ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...compiler.backends.triton_gpu import Architecture, KernelBuild
from .gpu_defaults import default

Tile = Callable[[str], dict[str, Any]]
_OPTIONS = ("num_warps", "num_stages", "waves_per_eu")
_MULTIPLES = ("n", "k", "f", "dim", "columns", "total", "keys")  # sizes that are multiples of 16


def builds(arch: Architecture, dtype: str, tiles: Mapping[str, Any] | None = None) -> Iterator[KernelBuild]:
    """Yield every kernel for an architecture; dtype is "fp16" or "bf16".

    `tiles` replaces default tiles by their name (see gpu_defaults). A kernel without a choice (rows, merges)
    has `tile` "".
    """
    given = tiles or {}

    def tile(name: str) -> dict[str, Any]:
        return dict(given[name]) if name in given else default(name, arch.family, arch.name)

    makers = (_attention, _gradients, _decode, _latent, _weight_only, _int8, _sparse)
    yield from itertools.chain(*(maker(tile, dtype) for maker in makers), _rows(dtype))


def _make(
    function: Any, types: Mapping[str, str], constants: Mapping[str, Any], chosen: Mapping[str, Any],
    name: str = "", **more: Any,
) -> KernelBuild:  # fmt: skip
    """Other arguments are int32; strides and most sizes are multiples of 16."""
    options = {k: chosen[k] for k in _OPTIONS if k in chosen}
    fixed = {**constants, **{k: v for k, v in chosen.items() if k not in _OPTIONS}}
    fixed = {k: v for k, v in fixed.items() if k in function.arg_names}
    signature = {n: types.get(n, "i32") for n in function.arg_names if n not in fixed}
    even = tuple(n for n in signature if n.endswith(("_st", "_sb", "_sh")) or n in _MULTIPLES)
    return KernelBuild(name or function.fn.__name__, function, signature, fixed, options, even, **more)


def _types(half: str, dtype: str, single: str = "", other: str = "") -> dict[str, str]:
    """Argument types: pointers to halves, pointers to fp32, and others as "name:type"."""
    found = dict.fromkeys(half.split(), f"*{dtype}") | dict.fromkeys(single.split(), "*fp32")
    return found | dict(pair.split(":") for pair in other.split())


def _heads(dim: int) -> dict[str, Any]:
    return {"D": dim, "DV": dim, "BLOCK_D": dim, "BLOCK_DV": dim}


_FLAGS = {"CAUSAL": True, "WINDOW": False, "SOFTCAP": False, "LENGTHS": False}
_ATTENTION = "scale:fp32 softcap:fp32 lengths_ptr:*i32"


def _attention(tile: Tile, dtype: str) -> Iterator[KernelBuild]:
    from ..attention.triton_prefill import attention_forward

    types = _types("q_ptr k_ptr v_ptr out_ptr", dtype, "lse_ptr", _ATTENTION)
    for dim in (64, 128, 256):
        name = "attention_forward_256" if dim == 256 else "attention_forward"
        yield _make(
            attention_forward, types, {**_heads(dim), **_FLAGS}, tile(name), f"attention_forward d{dim}",
            tile=name, contracting=True,
        )  # fmt: skip


def _gradients(tile: Tile, dtype: str) -> Iterator[KernelBuild]:
    from ..attention.triton_backward import attention_grad_kv, attention_grad_q

    half = "q_ptr k_ptr v_ptr do_ptr dq_ptr dk_ptr dv_ptr"
    types = _types(half, dtype, "lse_ptr delta_ptr", _ATTENTION)
    for function in (attention_grad_q, attention_grad_kv):
        name = function.fn.__name__
        yield _make(
            function, types, {**_heads(128), **_FLAGS}, tile(name), f"{name} d128", tile=name,
            contracting=True,
        )  # fmt: skip


def _decode(tile: Tile, dtype: str) -> Iterator[KernelBuild]:
    from ..attention.triton_decode import attention_decode, attention_merge

    for int8, page in ((False, 0), (True, 64)):
        other = f"{_ATTENTION} pages_ptr:*i32" + (" k_ptr:*i8 v_ptr:*i8" if int8 else "")
        single = "k_scale_ptr v_scale_ptr part_ptr part_lse_ptr"
        types = _types("q_ptr k_ptr v_ptr", dtype, single, other)
        sizes = {**_heads(128), "BLOCK_M": 16, "PAGE": page, "INT8": int8, "WINDOW": False, "SOFTCAP": False}
        name = "attention_decode " + ("int8 paged" if int8 else "d128")
        yield _make(
            attention_decode, types, sizes, tile("attention_decode"), name, tile="attention_decode",
            contracting=True, cached=int8, streams=True,
        )  # fmt: skip
    types = _types("out_ptr", dtype, "part_ptr part_lse_ptr lse_ptr")
    yield _make(attention_merge, types, {"DV": 128, "BLOCK_DV": 128, "BLOCK_S": 16}, {"num_warps": 4})


def _latent(tile: Tile, dtype: str) -> Iterator[KernelBuild]:
    from ..mla import triton_decode

    chosen = tile("mla_decode")
    types = _types("q_ptr cache_ptr", dtype, "scores_ptr part_ptr part_lse_ptr",
                   "scale:fp32 lengths_ptr:*i32")  # fmt: skip
    sizes = {"R": 512, "DR": 64, "DIM": 576}
    one, two = [triton_decode.mla_decode], [triton_decode.mla_scores, triton_decode.mla_values]
    for function in one if chosen["passes"] == 1 else two:
        yield _make(function, types, sizes, chosen, tile="mla_decode", contracting=True, streams=True)


_WEIGHT = "scale_ptr:*fp16 zero_ptr:*fp16"


def _format(bits: int, group: int, dtype: str) -> dict[str, Any]:
    import triton.language as tl

    kind = tl.float16 if dtype == "fp16" else tl.bfloat16
    zero = 0 if bits == 8 else 1 << (bits - 1)
    words = 64 if bits == 8 else 32
    return {"BITS": bits, "GROUP": group, "ZERO": zero, "ZERO_MODE": 0, "WORDS": words, "DTYPE": kind}


def _weight_only(tile: Tile, dtype: str) -> Iterator[KernelBuild]:
    from ..quant_matmul.triton_matmul import matmul, matmul_grad_x, matvec, sum_splits

    half = "x_ptr y_ptr dy_ptr dx_ptr residual_ptr"
    plain = {"BIAS": False, "RESIDUAL": False}
    for bits, group in ((4, 128), (4, 32), (2, 64), (8, 128)):
        words = "*i8" if bits == 8 else "*i16"
        types = _types(half, dtype, "part_ptr bias_ptr", f"w_ptr:{words} {_WEIGHT}")
        fixed, label = {**_format(bits, group, dtype), **plain}, f"w{bits}a16 g{group}"
        yield _make(
            matvec, types, {**fixed, "BLOCK_M": 1}, tile("matvec"), f"matvec {label}", tile="matvec",
            cached=True, streams=True, step_bytes=64 * tile("matvec")["BLOCK_N"],
        )  # fmt: skip
        few = {**fixed, "SCALE_AFTER": True, "SPLIT": True}
        yield _make(
            matmul, types, few, tile("matmul_few"), f"matmul {label} M16", tile="matmul_few",
            contracting=True, cached=True, streams=True,
        )  # fmt: skip
        many = {**fixed, "SCALE_AFTER": False, "SPLIT": False}
        yield _make(matmul, types, many, tile("matmul"), f"matmul {label}", tile="matmul", contracting=True)
    types = _types(half, dtype, "part_ptr bias_ptr", f"w_ptr:*i16 {_WEIGHT}")
    yield _make(
        matmul_grad_x, types, _format(4, 128, dtype), tile("matmul_grad_x"), "matmul_grad_x w4a16",
        tile="matmul_grad_x", contracting=True,
    )  # fmt: skip
    types = {**_types("y_ptr residual_ptr", dtype, "part_ptr bias_ptr"), "total": "i32"}
    yield _make(sum_splits, types, {"BLOCK": 1024, **plain}, {"num_warps": 4})


def _int8(tile: Tile, dtype: str) -> Iterator[KernelBuild]:
    from ..quant_matmul.triton_w8a8 import matmul_w8a8, quantise_rows

    types = _types("y_ptr residual_ptr", dtype, "a_scale_ptr bias_ptr",
                   "a_ptr:*i8 w_ptr:*i8 w_scale_ptr:*fp16")  # fmt: skip
    fixed = {"GROUP": 128, "BIAS": False, "RESIDUAL": False}
    yield _make(matmul_w8a8, types, fixed, tile("matmul_w8a8"), tile="matmul_w8a8", contracting=True)
    types = _types("x_ptr", dtype, "scale_ptr", "codes_ptr:*i8")
    yield _make(quantise_rows, types, {"GROUP": 128, "BLOCK_G": 16}, {"num_warps": 4})


def _sparse(tile: Tile, dtype: str) -> Iterator[KernelBuild]:
    from ..sparse_mlp import triton_kernel as sparse

    types = _types("x_ptr", dtype, "gates_ptr h_ptr part_ptr",
                   f"w_ptr:*i16 {_WEIGHT} fires_ptr:*i32 threshold:fp32")  # fmt: skip
    fixed = {**_format(4, 128, dtype), "BLOCK_M": 1, "BLOCK_F": 32, "KIND": 0}
    for function in (sparse.sparse_gates, sparse.sparse_hidden, sparse.sparse_down):
        yield _make(
            function, types, fixed, tile("sparse_mlp"), tile="sparse_mlp", cached=True, streams=True,
            step_bytes=32 * 64,
        )  # fmt: skip


def _rows(dtype: str) -> Iterator[KernelBuild]:
    from ..gated_silu import triton_kernel as gated
    from ..norm import triton_kernel as norm
    from ..rope import triton_kernel as rope

    half = "x_ptr residual_ptr weight_ptr bias_ptr y_ptr sum_ptr dy_ptr dx_ptr out_ptr gate_ptr up_ptr"
    half += " dgate_ptr dup_ptr"
    other = "eps:fp32 offset:fp32 sign:fp32"
    types = _types(half, dtype, "dw_ptr db_ptr cos_ptr sin_ptr", other)
    row = {"LAYER": False, "BIAS": False, "RESIDUAL": True, "BLOCK": 4096}
    yield _make(norm.norm_forward, types, row, {"num_warps": norm.warps(4096)})
    yield _make(norm.norm_backward, types, row, {"num_warps": norm.warps(4096)})
    sizes = {"ROTARY": 128, "DIM": 128, "INTERLEAVED": False, "BLOCK_H": 8, "BLOCK_R": 64, "BLOCK_D": 1}
    yield _make(rope.rope_rotate, types, sizes, {"num_warps": 1})
    yield _make(gated.gated_silu_forward, types, {"BLOCK": 1024}, {"num_warps": 4})
    yield _make(gated.gated_silu_backward, types, {"BLOCK": 1024}, {"num_warps": 4})
