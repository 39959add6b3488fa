"""Every kernel for classes of devices: within limits, no private arrays, neighbours read neighbours."""

from __future__ import annotations

from typing import Any

import pytest

from edgeformer.bench import opencl as table
from edgeformer.bench.opencl_loads import neighbours
from edgeformer.compiler.backends.opencl_device import class_target
from edgeformer.runtime.registry import operators

PROBLEMS = list(table.problems_of_model())


def test_kernels_keep_to_the_smallest_class() -> None:
    target = class_target(64, 16, 64)
    for label, name, spec in PROBLEMS:
        for row in table.check(operators()[name], spec, label, target):
            assert row["problems"] == [], row


def test_the_rules_see_what_is_wrong() -> None:
    target = class_target(64, 16, 8)
    row: dict[str, Any] = {
        "work_group": 100,
        "local_bytes": 1 << 15,
        "private_arrays": 2,
        "subgroup_operations": 1,
        "in_a_row": {"w": {64: 1}},
    }
    assert len(table.broken(row, target)) == 6
    good = row | {"work_group": 64, "local_bytes": 0, "private_arrays": 0, "subgroup_operations": 0}
    good["in_a_row"] = {"k": {8: 8, 64: 8}}
    assert table.broken(good, target) == []
    good["in_a_row"] = {"k": {8: 4, 64: 8}}
    assert table.broken(good, target) == ["4 neighbours of 8 that read k in a row"]


KERNEL = """
__kernel void f_kernel(__global uint4* restrict a_ptr, __global float4* restrict b_ptr, int n, int one) {
  int v = ((convert_int(get_local_id(0))) & 31);
  for (int v_1 = 0; v_1 < n; ++v_1) {
    int v_2 = (((convert_int(get_local_id(0))) >> 5) * 40);
    uint4 v_3 = a_ptr[((v_1 * 80) + (v_2 + v))];
    float4 v_4 = b_ptr[(v * STRIDE)];
    float4 v_5 = b_ptr[(v_1 / n)];
    b_ptr[(v * 7)] = v_4;
  }
}
"""


@pytest.mark.parametrize(("stride", "run"), [(1, 32), (2, 1)])
def test_addresses_are_worked_out(stride: int, run: int) -> None:
    found = neighbours(KERNEL.replace("STRIDE", str(stride)), 64)
    assert found == {("f", "a"): 32, ("f", "b"): run}
    assert neighbours(KERNEL.replace("STRIDE", str(stride)), 16) == {("f", "a"): 16, ("f", "b"): min(run, 16)}


def test_metal_and_webgpu_source() -> None:
    target, known = class_target(128, 32, 32), operators()
    for label, name, spec in PROBLEMS:
        form = known[name].form("tvm_opencl")
        assert form.lower is not None
        found = table.languages(form.lower(spec, form.space(spec, target)[0], target))
        assert found["metal"] == "generated", (label, name, found)
        if name != "sampling":  # 64-bit integers, which WebGPU has not
            assert found["webgpu"] == "generated", (label, name, found)
