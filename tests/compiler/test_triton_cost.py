"""The static model of GPU kernels: the rules, and that a cost goes up with what makes a kernel slow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edgeformer.compiler.backends import triton_cost, triton_gpu
from edgeformer.compiler.backends.triton_gpu import ARCHITECTURES, KernelBuild
from edgeformer.compiler.backends.triton_inspect import Inspection, inspect_amd
from edgeformer.compiler.errors import TargetError
from edgeformer.compiler.search import Evolution
from edgeformer.kernels.shared import gpu_defaults
from edgeformer.kernels.shared.gpu_spaces import OPERATORS, space

KERNEL = KernelBuild("k", None, {}, {}, {"num_stages": 1}, contracting=True)
CODE = Inspection(
    registers=128, accumulators=0, spilled=0, scratch=0, shared_bytes=16 << 10, warps=4, matrix=4,
    loads={16: 4}, kinds={"valu": 100, "lds": 32}, instructions=200, products=4 * 4096,
)  # fmt: skip


@pytest.mark.parametrize("arch", ["gfx1151", "gfx942", "sm_90"])
@pytest.mark.parametrize(
    "change",
    [{"registers": 400}, {"scratch": 3}, {"kinds": {"valu": 4000, "lds": 32}}, {"shared_bytes": 60 << 10},
     {"loads": {16: 160}}, {"matrix": 0}, {"loads": {2: 128}}],
    ids=str,
)  # fmt: skip
def test_what_makes_a_kernel_slow_costs(arch: str, change: dict[str, Any]) -> None:
    entry = ARCHITECTURES[arch]
    before, after = (triton_cost.cost(KERNEL, entry, code) for code in (CODE, replace(CODE, **change)))
    assert after > before
    breaks_a_rule = bool({"scratch", "matrix"} & change.keys()) or change.get("loads") == {2: 128}
    assert bool(triton_cost.problems(KERNEL, entry, replace(CODE, **change))) == breaks_a_rule
    assert (after > 100 * before) == breaks_a_rule


def test_resident_waves() -> None:
    def waves(arch: str, **more: int) -> float:
        return triton_cost.resident_waves(ARCHITECTURES[arch], replace(CODE, **more))

    assert waves("gfx1151", registers=96, shared_bytes=0) == 16  # the unit's own limit
    assert waves("gfx1151", registers=256, shared_bytes=0) == 4  # 264 of 1536: 5, in groups of 2 a SIMD
    assert waves("gfx1151", registers=96, shared_bytes=32 << 10) == 4  # two groups by LDS
    assert waves("gfx942", registers=256, shared_bytes=0) == 2
    assert waves("sm_90", registers=168, shared_bytes=0) == 3


def test_products_are_read_from_the_instructions() -> None:
    text = ".LBB0_1:\n v_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]\n s_cbranch_scc1 .LBB0_1\n"
    assert inspect_amd(text, 0, 4).products == 32 * 32 * 8


def test_spaces_start_at_the_default_and_keep_within_the_device() -> None:
    for arch in ARCHITECTURES.values():
        for tile in gpu_defaults.tiles():
            found = space(tile, arch)
            default = gpu_defaults.default(tile, arch.family, arch.name)
            assert {**found.default, **default} == found.default
            assert ("waves_per_eu" in found.default) == (arch.backend == "hip")
            assert len(found) > 1, (tile, arch.name)
            assert Evolution(found).propose([]) is not None
    assert set(OPERATORS) == set(gpu_defaults.tiles())


def test_names_of_gpus() -> None:
    for name in ("cuda", "gfx1151", "gfx803", "sm_90", "h200", "rx-9070-xt"):
        assert triton_gpu.is_gpu(name)
    for name in ("auto", "x86-64-v3", "raspberry-pi-5", "ryzen-ai-max-395", "gfx", "nonsense"):
        assert not triton_gpu.is_gpu(name)
    with pytest.raises(TargetError, match="gfx803.*PyTorch"):
        triton_gpu.architecture("gfx803")
