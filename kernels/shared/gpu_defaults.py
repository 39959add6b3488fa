"""Default tiles of the Triton kernels by architecture family: from compiled code alone, none measured.

Chosen by the static model (no scratch in the hot loop, matrix instructions, resident waves); a device that
measures replaces them. "waves_per_eu" is read by AMD's back end only. Needs no Triton.
"""

from __future__ import annotations

from typing import Any

SOURCE = "static ranking, not measured"

_AMD_SMALL = {"num_warps": 4, "num_stages": 1}

_TABLE: dict[str, dict[str, dict[str, Any]]] = {
    "attention_forward": {
        "hopper": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        "ampere": {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        "cdna": {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        "rdna3": {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1, "waves_per_eu": 2},
        "rdna4": {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    },
    "attention_forward_256": {
        "hopper": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        "ampere": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        "cdna": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        "rdna3": {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1, "waves_per_eu": 1},
        "rdna4": {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    "attention_grad_q": {
        "hopper": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "ampere": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        "cdna": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        "rdna3": {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
        "rdna4": {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    "attention_grad_kv": {
        "hopper": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        "ampere": {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
        "cdna": {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        "rdna3": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1, "waves_per_eu": 2},
        "rdna4": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    "attention_decode": {
        "hopper": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        "ampere": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "cdna": {"BLOCK_N": 64, **_AMD_SMALL},
        "rdna3": {"BLOCK_N": 64, "num_warps": 8, "num_stages": 1, "waves_per_eu": 2},
        "rdna4": {"BLOCK_N": 32, **_AMD_SMALL},
    },
    "mla_decode": {
        "hopper": {"passes": 1, "BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        "ampere": {"passes": 1, "BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
        "cdna": {"passes": 1, "BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        "rdna3": {"passes": 2, "BLOCK_R": 64, "BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        "rdna4": {"passes": 2, "BLOCK_R": 64, "BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
    },
    "matvec": {
        "hopper": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "ampere": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "cdna": {"BLOCK_N": 128, "num_warps": 4, "num_stages": 2},
        "rdna3": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        "rdna4": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
    },
    "matmul_few": {
        "hopper": {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        "ampere": {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        "cdna": {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "rdna3": {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        "rdna4": {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
    },
    "matmul": {
        "hopper": {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
        "ampere": {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3},
        "cdna": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "rdna3": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        "rdna4": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
    },
    "matmul_grad_x": {
        "hopper": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        "ampere": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "cdna": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        "rdna3": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        "rdna4": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    },
    "matmul_w8a8": {
        "hopper": {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
        "ampere": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        "cdna": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        "rdna3": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        "rdna4": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
    },
    "sparse_mlp": dict.fromkeys(  # noqa: RUF024
        ("hopper", "ampere", "cdna", "rdna3", "rdna4"), {"num_warps": 4, "num_stages": 1}
    ),
}  # fmt: skip


# Where one member of a family needs another tile: compiled code differs within a family.
_BY_ARCHITECTURE: dict[str, dict[str, dict[str, Any]]] = {
    "attention_grad_q": {
        "gfx1103": {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1, "waves_per_eu": 2}
    },
    "matvec": {
        "sm_80": {"BLOCK_N": 32, "num_warps": 2, "num_stages": 1},
        "sm_90": {"BLOCK_N": 32, "num_warps": 2, "num_stages": 2},
    },
}


def default(kernel: str, family: str, arch: str = "") -> dict[str, Any]:
    """Return a kernel's default tile, warps and stages for an architecture, or for its family."""
    return dict(_BY_ARCHITECTURE.get(kernel, {}).get(arch) or _TABLE[kernel][family])


def tiles() -> list[str]:
    """Return the names of the kernels that have a tile to choose."""
    return list(_TABLE)
