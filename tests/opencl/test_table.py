"""Every kernel for classes of devices: within their limits, no private arrays."""

from __future__ import annotations

from typing import Any

from edgeformer.bench import opencl as table
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
    row: dict[str, Any] = {"work_group": 100, "local_bytes": 1 << 15, "private_arrays": 2}
    assert len(table.broken(row, target)) == 4
    assert table.broken({"work_group": 64, "local_bytes": 0, "private_arrays": 0}, target) == []


def test_metal_and_webgpu_source() -> None:
    target, known = class_target(128, 32, 32), operators()
    for label, name, spec in PROBLEMS:
        form = known[name].form("tvm_opencl")
        assert form.lower is not None
        found = table.languages(form.lower(spec, form.space(spec, target)[0], target))
        assert found["metal"] == "generated", (label, name, found)
        if name != "sampling":  # 64-bit integers, which WebGPU has not
            assert found["webgpu"] == "generated", (label, name, found)
