"""Every default Triton kernel compiled for every GPU architecture, none needed: `make cross`.

Each is read from its machine code and held to the rules: matrix instructions in the hot loop of contracting
kernels, no scratch memory there (but for kernels whose count is known), and most bytes in loads of 8 or more
a lane. `--table FILE` writes the figures as Markdown; exit code 1 when a rule is broken.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..compiler.backends.triton_gpu import (
    ARCHITECTURES,
    Architecture,
    Inspection,
    KernelBuild,
    compile_kernel,
    inspect,
    versions,
)
from ..compiler.errors import BuildError
from ..kernels.shared.gpu_defaults import default

_OPTIONS = ("num_warps", "num_stages", "waves_per_eu")


def builds(arch: Architecture, dtype: str) -> Iterator[KernelBuild]:
    """Yield every default kernel for an architecture; dtype "fp16" or "bf16"."""
    yield from _attention(arch, dtype)
    yield from _latent(arch, dtype)
    yield from _matmul(arch, dtype)
    yield from _sparse(arch, dtype)
    yield from _rows(dtype)


def _make(
    function: Any, types: dict[str, str], constants: dict[str, Any], configuration: dict[str, Any],
    name: str = "", **more: Any,
) -> KernelBuild:  # fmt: skip
    """A build whose other arguments are int32, the strides multiples of 16."""
    options = {k: configuration.pop(k) for k in _OPTIONS if k in configuration}
    constants = {k: v for k, v in {**constants, **configuration}.items() if k in function.arg_names}
    signature = {n: types.get(n, "i32") for n in function.arg_names if n not in constants}
    strides = tuple(
        n
        for n in signature
        if n.endswith(("_st", "_sb", "_sh")) or n in ("n", "k", "f", "dim", "columns", "total", "keys")
    )
    return KernelBuild(name or function.fn.__name__, function, signature, constants, options, strides, **more)


def _pointers(
    half: tuple[str, ...], dtype: str, single: tuple[str, ...] = (), other: str = ""
) -> dict[str, str]:
    types = dict.fromkeys(half, f"*{dtype}") | dict.fromkeys(single, "*fp32")
    return types | dict(pair.split(":") for pair in other.split())


def _attention(arch: Architecture, dtype: str) -> Iterator[KernelBuild]:
    from ..kernels.attention import triton_backward, triton_decode, triton_prefill

    scalars = "scale:fp32 softcap:fp32 lengths_ptr:*i32"
    half = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "do_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    types = _pointers(half, dtype, ("lse_ptr", "delta_ptr"), scalars)
    flags = {"CAUSAL": True, "WINDOW": False, "SOFTCAP": False, "LENGTHS": False}
    for dim in (64, 128, 256):
        sizes = {"D": dim, "DV": dim, "BLOCK_D": dim, "BLOCK_DV": dim, **flags}
        tile = default("attention_forward", arch.family)
        if dim == 256:
            tile = default("attention_forward_256", arch.family)
        yield _make(
            triton_prefill.attention_forward,
            types,
            sizes,
            tile,
            f"attention_forward d{dim}",
            contracting=True,
        )
    sizes = {"D": 128, "DV": 128, "BLOCK_D": 128, "BLOCK_DV": 128, **flags}
    for function in (triton_backward.attention_grad_q, triton_backward.attention_grad_kv):
        name = function.fn.__name__
        yield _make(function, types, sizes, default(name, arch.family), f"{name} d128", contracting=True)
    for int8, page in ((False, 0), (True, 64)):
        kv = "k_ptr:*i8 v_ptr:*i8" if int8 else ""
        types = _pointers(("q_ptr", "k_ptr", "v_ptr"), dtype, ("k_scale_ptr", "v_scale_ptr", "part_ptr",
            "part_lse_ptr"),
                          f"scale:fp32 softcap:fp32 lengths_ptr:*i32 pages_ptr:*i32 {kv}")  # fmt: skip
        sizes = {
            "D": 128,
            "DV": 128,
            "BLOCK_D": 128,
            "BLOCK_DV": 128,
            "BLOCK_M": 16,
            "PAGE": page,
            "INT8": int8,
        }
        sizes |= {"WINDOW": False, "SOFTCAP": False}
        name = "attention_decode " + ("int8 paged" if int8 else "d128")
        tile = default("attention_decode", arch.family)
        yield _make(triton_decode.attention_decode, types, sizes, tile, name, contracting=True, cached=int8)
    types = _pointers(("out_ptr",), dtype, ("part_ptr", "part_lse_ptr", "lse_ptr"))
    yield _make(
        triton_decode.attention_merge, types, {"DV": 128, "BLOCK_DV": 128, "BLOCK_S": 16}, {"num_warps": 4}
    )


def _latent(arch: Architecture, dtype: str) -> Iterator[KernelBuild]:
    from ..kernels.mla import triton_decode

    tile = default("mla_decode", arch.family)
    types = _pointers(("q_ptr", "cache_ptr"), dtype, ("scores_ptr", "part_ptr", "part_lse_ptr"),
                      "scale:fp32 lengths_ptr:*i32")  # fmt: skip
    sizes = {"R": 512, "DR": 64, "DIM": 576}
    passes = tile.pop("passes")
    functions = (
        [triton_decode.mla_decode] if passes == 1 else [triton_decode.mla_scores, triton_decode.mla_values]
    )
    for function in functions:
        yield _make(function, types, sizes, dict(tile), contracting=True)


def _matmul(arch: Architecture, dtype: str) -> Iterator[KernelBuild]:
    import triton.language as tl

    from ..kernels.quant_matmul import triton_matmul, triton_w8a8

    kind = tl.float16 if dtype == "fp16" else tl.bfloat16
    for bits, group in ((4, 128), (4, 32), (2, 64), (8, 128)):
        words = "*i8" if bits == 8 else "*i16"
        types = _pointers(("x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "residual_ptr"), dtype, ("part_ptr",
            "bias_ptr"),
                          f"w_ptr:{words} scale_ptr:*fp16 zero_ptr:*fp16")  # fmt: skip
        fixed = {"BITS": bits, "GROUP": group, "ZERO": 0 if bits == 8 else 1 << (bits - 1), "ZERO_MODE": 0}
        fixed |= {"WORDS": 64 if bits == 8 else 32, "DTYPE": kind, "BIAS": False, "RESIDUAL": False}
        label = f"w{bits}a16 g{group}"
        yield _make(triton_matmul.matvec, types, {**fixed, "BLOCK_M": 1}, default("matvec", arch.family),
            f"matvec {label}",
                    cached=True)  # fmt: skip
        few = {**fixed, "SCALE_AFTER": True, "SPLIT": True}
        yield _make(triton_matmul.matmul, types, few, default("matmul_few", arch.family),
            f"matmul {label} M16",
                    contracting=True, cached=True)  # fmt: skip
        many = {**fixed, "SCALE_AFTER": False, "SPLIT": False}
        yield _make(
            triton_matmul.matmul,
            types,
            many,
            default("matmul", arch.family),
            f"matmul {label}",
            contracting=True,
        )
    fixed |= {"BITS": 4, "ZERO": 8, "WORDS": 32}
    types["w_ptr"] = "*i16"
    tile = default("matmul_grad_x", arch.family)
    yield _make(triton_matmul.matmul_grad_x, types, fixed, tile, "matmul_grad_x w4a16", contracting=True)
    types = _pointers(("y_ptr", "residual_ptr"), dtype, ("a_scale_ptr", "bias_ptr"),
                      "a_ptr:*i8 w_ptr:*i8 w_scale_ptr:*fp16")  # fmt: skip
    fixed = {"GROUP": 128, "BIAS": False, "RESIDUAL": False}
    yield _make(triton_w8a8.matmul_w8a8, types, fixed, default("matmul_w8a8", arch.family), contracting=True)
    types = _pointers(("x_ptr",), dtype, ("scale_ptr",), "codes_ptr:*i8")
    yield _make(triton_w8a8.quantise_rows, types, {"GROUP": 128, "BLOCK_G": 16}, {"num_warps": 4})
    types = _pointers(("y_ptr", "residual_ptr"), dtype, ("part_ptr", "bias_ptr"))
    fixed = {"BLOCK": 1024, "BIAS": False, "RESIDUAL": False}
    yield _make(triton_matmul.sum_splits, {**types, "total": "i32"}, fixed, {"num_warps": 4})


def _sparse(arch: Architecture, dtype: str) -> Iterator[KernelBuild]:
    import triton.language as tl

    from ..kernels.sparse_mlp import triton_kernel as sparse

    kind = tl.float16 if dtype == "fp16" else tl.bfloat16
    types = _pointers(("x_ptr",), dtype, ("gates_ptr", "h_ptr", "part_ptr"),
                      "w_ptr:*i16 scale_ptr:*fp16 zero_ptr:*fp16 fires_ptr:*i32 threshold:fp32")  # fmt: skip
    fixed = {"BITS": 4, "GROUP": 128, "ZERO": 8, "ZERO_MODE": 0, "WORDS": 32, "DTYPE": kind, "BLOCK_M": 1}
    fixed |= {"BLOCK_F": 32, "KIND": 0}
    for function in (sparse.sparse_gates, sparse.sparse_hidden, sparse.sparse_down):
        yield _make(function, types, fixed, default("sparse_mlp", arch.family), cached=True)


def _rows(dtype: str) -> Iterator[KernelBuild]:
    from ..kernels.gated_silu import triton_kernel as gated
    from ..kernels.norm import triton_kernel as norm
    from ..kernels.rope import triton_kernel as rope

    half = (
        "x_ptr",
        "residual_ptr",
        "weight_ptr",
        "bias_ptr",
        "y_ptr",
        "sum_ptr",
        "dy_ptr",
        "dx_ptr",
        "out_ptr",
    )
    half += ("gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr")
    types = _pointers(
        half, dtype, ("dw_ptr", "db_ptr", "cos_ptr", "sin_ptr"), "eps:fp32 offset:fp32 sign:fp32"
    )
    row = {"LAYER": False, "BIAS": False, "RESIDUAL": True, "BLOCK": 4096}
    yield _make(norm.norm_forward, types, row, {"num_warps": norm.warps(4096)})
    yield _make(norm.norm_backward, types, row, {"num_warps": norm.warps(4096)})
    sizes = {"ROTARY": 128, "DIM": 128, "INTERLEAVED": False, "BLOCK_H": 8, "BLOCK_R": 64, "BLOCK_D": 1}
    yield _make(rope.rope_rotate, types, sizes, {"num_warps": 1})
    yield _make(gated.gated_silu_forward, types, {"BLOCK": 1024}, {"num_warps": 4})
    yield _make(gated.gated_silu_backward, types, {"BLOCK": 1024}, {"num_warps": 4})


def problems(kernel: KernelBuild, arch: Architecture, found: Inspection) -> list[str]:
    """Return which rules the machine code breaks."""
    wrong = []
    if kernel.contracting and not found.matrix:
        wrong.append("no matrix instruction in the hot loop")
    if found.scratch and not kernel.spills:
        wrong.append(f"{found.scratch} scratch accesses in the hot loop")
    widest = max(found.loads, default=16)
    if (widest if kernel.cached else found.load_bytes or 16) < 8:
        wrong.append(f"most bytes come in loads of {found.load_bytes} a lane, the widest has {widest}")
    if found.shared_bytes > arch.shared_bytes:
        wrong.append(f"{found.shared_bytes} bytes of shared memory, {arch.shared_bytes} are there")
    return wrong


def check(arch: str, dtype: str, only: str = "") -> list[dict[str, Any]]:
    """Compile and read every default kernel for one architecture."""
    rows, entry = [], ARCHITECTURES[arch]
    for kernel in builds(entry, dtype):
        if only and only not in kernel.name:
            continue
        start = time.perf_counter()
        row: dict[str, Any] = {"architecture": arch, "dtype": dtype, "kernel": kernel.name}
        try:
            found = inspect(compile_kernel(kernel, arch), arch)
        except BuildError as error:
            rows.append({**row, "problems": [str(error)]})
            continue
        figures = vars(found) | {"load_bytes": found.load_bytes}
        rows.append({**row, **figures, "seconds": round(time.perf_counter() - start, 2),
                     "problems": problems(kernel, entry, found)})  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as Markdown, one line a kernel and architecture."""
    lines = ["| kernel | architecture | registers | scratch | matrix | load bytes | KiB | warps |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in sorted(rows, key=lambda r: (r["kernel"], r["architecture"])):
        if "registers" not in row:
            lines.append(f"| {row['kernel']} | {row['architecture']} | not compiled | | | | | |")
            continue
        registers = f"{row['registers']}+{row['accumulators']}" if row["accumulators"] else row["registers"]
        shared = round(row["shared_bytes"] / 1024, 1)
        lines.append(
            f"| {row['kernel']} | {row['architecture']} | {registers} | {row['scratch']} | {row['matrix']} | "
            f"{row['load_bytes'] or '-'} | {shared} | {row['warps']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Check the architectures and types asked for; print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="*", default=["fp16"], choices=["fp16", "bf16"])
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--table", type=Path, help="write the figures of the first type as Markdown")
    parser.add_argument("--json", type=Path, help="write all figures")
    parser.add_argument(
        "--read", nargs="*", type=Path, default=[], help="take figures of earlier --json files"
    )
    options = parser.parse_args()
    rows: list[dict[str, Any]] = [
        row for path in options.read for row in json.loads(path.read_text())["kernels"]
    ]
    for dtype in [] if options.read else options.dtype:
        for arch in options.arch:
            found = check(arch, dtype, options.only)
            rows += found
            bad = [row for row in found if row["problems"]]
            print(f"{arch} {dtype}: {len(found)} kernels, {len(bad)} with problems", flush=True)
            for row in bad:
                print(f"  {row['kernel']}: {'; '.join(row['problems'])}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"versions": versions(), "kernels": rows}, indent=1))
    if options.table:
        first = [row for row in rows if row["dtype"] == options.dtype[0]]
        head = f"{versions()}, {options.dtype[0]}, default tiles; written by `make cross-table`.\n\n"
        options.table.write_text(head + table(first))
    sys.exit(any(row["problems"] for row in rows))


if __name__ == "__main__":
    main()
