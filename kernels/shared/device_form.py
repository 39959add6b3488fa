"""What the OpenCL forms of all operators share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...compiler.backends.opencl_device import class_of
from ...compiler.operator import Configuration, Declined, Form
from ...compiler.target import Target

_SHARED = ("kernels/shared/device_tir.py", "compiler/backends/tvm_opencl.py")


def device_form(
    decide: Callable[[Any, Target], Declined | None],
    space: Callable[[Any, Target], Sequence[dict[str, Any]]],
    lower: Callable[[Any, Configuration, Target], Any],
    bind: Callable[[Any, Configuration, Target, Any], Callable[..., Any]],
    verify: Callable[[Any, Configuration, Any, Any], str],
    *sources: str,
) -> Form:
    """Return an operator's form on OpenCL devices; it declines every other target."""

    def on_device(spec: Any, target: Target) -> Declined | None:
        if "tvm_opencl" not in target.backends:
            return Declined(f"{target.name} lists no tvm_opencl back end")
        return decide(spec, target)

    return Form(
        "tvm_opencl", "tvm_opencl", on_device, space, bind, lower, (*sources, *_SHARED), verify=verify
    )


def lanes_space(spec: Any, target: Target) -> list[dict[str, Any]]:
    """Return work-groups of 128, 64 and 256 lanes, as far as the device's class allows them."""
    return [{"lanes": n} for n in (128, 64, 256) if n <= class_of(target)[0]]


def only_float32(spec: Any, target: Target) -> Declined | None:
    """Decline 16-bit activations."""
    types = {getattr(spec, name, "float32") for name in ("dtype", "weight_dtype", "out_dtype")}
    if types != {"float32"}:
        return Declined(f"OpenCL kernels take float32, not {', '.join(sorted(types - {'float32'}))}")
    return None
