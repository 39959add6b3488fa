"""No driver, a driver that computes wrong results, a device that is gone, and kernels that are too large."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import edgeformer
from edgeformer.cli import app
from edgeformer.compiler.backends import opencl_device, tvm_opencl
from edgeformer.compiler.backends.opencl_device import class_of, class_target
from edgeformer.compiler.errors import CapacityError, DeviceError, TargetError, UnsupportedError
from edgeformer.compiler.target import Target
from edgeformer.kernels.gated_silu import OPERATOR
from edgeformer.kernels.gated_silu.spec import GatedSiluSpec
from edgeformer.runtime import dispatch, opencl

SPEC = GatedSiluSpec()


def test_class_of_a_device() -> None:
    target = class_target(128, 32, 16)
    assert class_of(target) == (128, 32 << 10, 16)
    assert target.missing_on(Target.parse("auto")) == []
    with pytest.raises(TargetError, match="no OpenCL target"):
        class_of(Target.parse("auto"))


@pytest.mark.parametrize("name", ["opencl:x", "opencl:-1", "openclx"])
def test_misspelt_targets(name: str) -> None:
    with pytest.raises(TargetError, match="Unknown target"):
        Target.parse(name)


def test_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(opencl_device, "devices", lambda: ())
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    result = CliRunner().invoke(app, ["run", str(model), "--target", "opencl", "-p", "x"])
    assert result.exit_code == 2
    assert "OpenCL" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert "OpenCL" in CliRunner().invoke(app, ["doctor"]).stdout


def test_no_such_device(device: Any) -> None:
    with pytest.raises(DeviceError, match="no OpenCL device 99"):
        Target.parse("opencl:99")


def test_a_small_device_is_refused(device: Any) -> None:
    with pytest.raises(DeviceError, match="work-groups of 32"):
        dataclasses.replace(device.limits, work_group=32).classes()


def test_limits_are_asked_before_a_launch(device: Any, target: Target) -> None:
    form = OPERATOR.form("tvm_opencl")
    program = opencl.load(OPERATOR, form, SPEC, form.space(SPEC, target)[0], target)
    small = dataclasses.replace(device.limits, work_group=8)
    with pytest.raises(DeviceError, match="allows 8"):
        tvm_opencl.require_limits(program.facts["vectors"], small)


def test_a_wrong_driver_is_marked(device: Any, target: Target, marks: Path) -> None:
    form = OPERATOR.form("tvm_opencl")
    configuration = form.space(SPEC, target)[0]
    assert form.verify is not None
    verify = form.verify
    asked = []

    def broken(spec: Any, configuration: Any, session: Any, library: Any) -> str:
        asked.append(1)
        return verify(spec, configuration, session, _Doubled(library))

    wrong = dataclasses.replace(form, verify=broken)
    for _ in range(2):
        with pytest.raises(DeviceError, match="computes gated_silu wrong: gated SiLU differs by"):
            opencl.bind(OPERATOR, wrong, SPEC, configuration, target)
    assert len(asked) == 1  # the mark is enough
    (kernels,) = json.loads(marks.read_text()).values()
    assert "differs" in next(iter(kernels.values()))
    marks.write_text("{damaged")  # verified again, and right
    opencl.bind(OPERATOR, form, SPEC, configuration, target)
    assert set(*map(dict.values, json.loads(marks.read_text()).values())) == {"right"}


class _Doubled:
    """A library that a driver miscompiled: its input is read twice."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def function(self, name: str) -> Any:
        kernel = self._library.function(name)
        return lambda grid, **arguments: kernel(grid, **{**arguments, "up": arguments["gate"]})


def test_a_device_that_is_gone(device: Any, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyopencl as cl

    held = device.upload(torch.ones(8))

    def gone(*_: Any, **__: Any) -> None:
        raise cl.RuntimeError("clEnqueueReadBuffer", -36, "the queue is invalid")

    monkeypatch.setattr(cl, "enqueue_copy", gone)
    with pytest.raises(DeviceError, match="is gone or failed"):
        held.read()


def test_a_device_that_is_gone_in_the_middle_of_a_step(
    device: Any, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyopencl as cl

    form = OPERATOR.form("tvm_opencl")
    program = opencl.load(OPERATOR, form, SPEC, form.space(SPEC, target)[0], target)

    def gone(*_: Any, **__: Any) -> None:
        raise cl.RuntimeError("clEnqueueNDRangeKernel", -5, "out of resources")

    held = [device.upload(torch.ones(64)).buffer for _ in range(3)]
    call = form.bind(SPEC, form.space(SPEC, target)[0], target, program)
    for kernel in program._kernels.values():
        monkeypatch.setattr(kernel, "_kernel", gone)
    with pytest.raises(DeviceError, match="did not take"):
        call(*held, 64)
    monkeypatch.undo()
    call(*held, 64)  # the session and its programs stay usable
    device.finish()


def test_more_than_the_device_allocates(device: Any) -> None:
    with pytest.raises(CapacityError, match="allocates at once"):
        device.empty(device.limits.allocation_bytes // 4 + 1)


def test_an_operator_that_declines_says_why(target: Target) -> None:
    from edgeformer.compiler.errors import DeclinedError

    with pytest.raises(DeclinedError, match="float32, not bfloat16"):
        dispatch.choose(OPERATOR, GatedSiluSpec("bfloat16"), target, "tvm_opencl")


def test_what_is_for_cpus_alone(target: Target, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="a folder for opencl: only CPU targets"):
        edgeformer.compile(tmp_path / "model.gguf", tmp_path / "out", target="opencl")
