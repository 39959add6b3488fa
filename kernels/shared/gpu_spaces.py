"""Tuning spaces of the Triton kernels: tile, warps, stages and waves around an architecture's default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...compiler.backends.triton_gpu import Architecture
from ...compiler.space import Axis, Constraint, Space
from .gpu_defaults import default

# The operator of each tile: what `tune --operators` takes.
OPERATORS = {
    "attention_forward": "attention", "attention_forward_256": "attention", "attention_grad_q": "attention",
    "attention_grad_kv": "attention", "attention_decode": "attention", "mla_decode": "mla",
    "matvec": "quant_matmul", "matmul_few": "quant_matmul", "matmul": "quant_matmul",
    "matmul_grad_x": "quant_matmul", "matmul_w8a8": "quant_matmul", "sparse_mlp": "sparse_mlp",
}  # fmt: skip

_BLOCKS = {"BLOCK_M": (16, 32, 64, 128, 256), "BLOCK_N": (16, 32, 64, 128, 256), "BLOCK_R": (32, 64, 128)}
_NARROW = {"matmul_few": ("BLOCK_M",), "mla_decode": ("BLOCK_M", "passes")}  # what the problem fixes
_MOST_SUMS = 128  # fp32 sums of a lane: a tile that holds more of them spills


def space(tile: str, arch: Architecture) -> Space:
    """Return the configurations of a kernel's tile on an architecture, its default first."""
    first = default(tile, arch.family, arch.name)
    amd = arch.backend == "hip"
    values: dict[str, tuple[int, ...]] = {**_BLOCKS, "num_warps": (2, 4, 8)}
    values["num_stages"] = (1, 2) if amd else (1, 2, 3, 4)
    if amd:
        first = {"waves_per_eu": 0, **first}
        values["waves_per_eu"] = (0, 1, 2, 3, 4)
    axes = []
    for name, value in first.items():
        fixed = name in _NARROW.get(tile, ()) or name not in values
        others = () if fixed else tuple(v for v in values[name] if v != value)
        axes.append(Axis(name, (value, *others)))

    def holds_its_sums(c: Mapping[str, Any]) -> bool:
        sums = c.get("BLOCK_M", 1) * c.get("BLOCK_N", 1)
        return sums <= _MOST_SUMS * c["num_warps"] * arch.lanes

    def feeds_its_warps(c: Mapping[str, Any]) -> bool:
        sums = c.get("BLOCK_M", 16) * c.get("BLOCK_N", 256)
        return sums >= 32 * c["num_warps"]

    return Space(
        tuple(axes),
        (
            Constraint(f"a lane holds at most {_MOST_SUMS} sums", holds_its_sums),
            Constraint("a warp has at least 32 sums", feeds_its_warps),
        ),
    )
