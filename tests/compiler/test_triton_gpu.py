"""The Triton back end without a GPU: reading machine code, compiling for other machines, stored binaries."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from edgeformer.compiler.backends import triton_gpu
from edgeformer.compiler.backends.triton_inspect import inspect_amd
from edgeformer.compiler.errors import BuildError, TargetError

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="compiles with Triton, which is not installed or interprets",
)

AMD = """
kernel:
	v_mov_b32 v0, 0
	global_load_u16 v5, v[0:1], off
.LBB0_1:                                ; %loop
	global_load_b128 v[0:3], v[4:5], off
	buffer_load_dwordx2 v[8:9], v1, s[0:3], 0 offen
	scratch_store_b32 off, v0, s0
	v_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[16:23], v[0:7]
	v_dual_mul_f32 v0, v1, v2 :: v_dual_mul_f32 v3, v4, v5
	ds_load_b128 v[0:3], v4
	s_cbranch_scc1 .LBB0_1
	s_endpgm
.vgpr_count:     93
.vgpr_spill_count: 4
"""


def test_amd_machine_code_is_read() -> None:
    found = inspect_amd(AMD, 4096, 8)
    assert (found.registers, found.spilled, found.scratch, found.matrix) == (93, 4, 1, 1)
    assert found.loads == {8: 1, 16: 1}  # the two-byte load stands outside of the loop
    assert found.load_bytes == 16
    assert found.kinds == {"valu": 2, "lds": 1}
    assert (found.shared_bytes, found.warps) == (4096, 8)


def test_unknown_architectures_are_named() -> None:
    with pytest.raises(TargetError, match="gfx803.*PyTorch"):
        triton_gpu.architecture("gfx803")


@needs_triton
@pytest.mark.parametrize("arch", ["gfx1201", "sm_90"])
def test_a_kernel_is_compiled_read_and_stored(arch: str, tmp_path: Path) -> None:
    from edgeformer.kernels.gated_silu.triton_kernel import gated_silu_forward

    pointers = {"gate_ptr": "*fp16", "up_ptr": "*fp16", "out_ptr": "*fp16"}
    sizes = {"columns": "i32", "gate_st": "i32", "up_st": "i32"}
    kernel = triton_gpu.KernelBuild(
        "gated_silu", gated_silu_forward, {**pointers, **sizes}, {"BLOCK": 1024},
        {"num_warps": 4, "waves_per_eu": 2}, ("columns", "gate_st", "up_st"),
    )  # fmt: skip
    found = triton_gpu.inspect(triton_gpu.compile_kernel(kernel, arch), arch)
    assert found.registers > 0 and found.scratch == 0 and found.load_bytes == 16
    triton_gpu.build(kernel, arch, tmp_path)
    metadata = json.loads((tmp_path / "kernel.json").read_text())
    assert (tmp_path / metadata["binary"]).stat().st_size > 500
    assert metadata["threads"] == 128 and [n for n, _ in metadata["arguments"]] == [*pointers, *sizes]
    with pytest.raises(BuildError, match="no GPU driver|failed with code"):
        triton_gpu.load(tmp_path)


@needs_triton
def test_what_does_not_compile_is_a_build_error() -> None:
    from edgeformer.kernels.gated_silu.triton_kernel import gated_silu_forward

    types: dict[str, str] = dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), "*fp16")
    types |= dict.fromkeys(("columns", "gate_st", "up_st"), "i32")
    kernel = triton_gpu.KernelBuild("gated_silu", gated_silu_forward, types, {"BLOCK": 1000})
    with pytest.raises(BuildError, match="gated_silu for gfx942"):
        triton_gpu.compile_kernel(kernel, "gfx942")
