"""The price of a call through PyTorch: a whole layer's forward against its native function alone."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..kernels.quant_matmul import CanonicalWeight, WeightFormat, pack
from ..model.dropin.layers import LayerWeight, Linear, Norm
from ..runtime import dispatch, launch

_CALLS = 2000


def call_overhead() -> Iterator[tuple[str, float, float]]:
    """Yield (name, microseconds of the layer's call, microseconds of the native function) at one row."""
    for n, k in ((64, 64), (576, 576), (1536, 576)):
        weight = CanonicalWeight.from_float(torch.randn(n, k), WeightFormat.int4(zero="minimum"))
        packed = LayerWeight.of(pack(weight, dispatch.current_target()), torch.float32)
        layer = Linear(packed, None)
        yield f"linear {n} x {k}, int4", *_compare(layer, torch.randn(1, 1, k))
    for d in (64, 576):
        norm = Norm(torch.nn.Parameter(torch.ones(d), requires_grad=False), None, 1e-5, "rms", 0.0)
        yield f"norm {d}", *_compare(norm, torch.randn(1, 1, d))


@torch.inference_mode()
def _compare(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[float, float]:
    """Medians of both, in turn; the native call is the one that the layer made, with its arguments."""
    layer(x)
    native = _native_call(layer, x)
    calls = functools.partial(layer, x), native
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_CALLS):
        for side, call in enumerate(calls):
            start = time.perf_counter()
            call()
            times[side].append(time.perf_counter() - start)
    return statistics.median(times[0]) * 1e6, statistics.median(times[1]) * 1e6


def _native_call(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], Any]:
    """Record the native function and its arguments that one call of the layer ends in."""
    seen: list[tuple[Any, tuple[Any, ...]]] = []
    keep: list[torch.Tensor] = [x]

    class Spy:
        """Stands in for a library while the layer is bound anew."""

        def __init__(self, library: Any) -> None:
            self.library = library

        def function(self, name: str) -> Callable[..., Any]:
            function = self.library.function(name)

            def call(*arguments: Any) -> Any:
                seen.append((function, arguments))
                return function(*arguments)

            return call

        def __getattr__(self, name: str) -> Any:
            return getattr(self.library, name)

    libraries = dict(launch._libraries)
    launch._libraries.update({key: Spy(library) for key, library in libraries.items()})
    bound, held = dict(dispatch._bound), dispatch.generation()
    dispatch._bound.clear()
    dispatch._generation = held + 1
    try:
        keep.append(layer(x))
    finally:
        launch._libraries.update(libraries)
        dispatch._bound.clear()
        dispatch._bound.update(bound)
        dispatch._generation = held
    function, arguments = seen[-1]
    call = functools.partial(function, *arguments)
    call.keep = keep  # pyright: ignore[reportAttributeAccessIssue]  # addresses stay valid
    return call
