"""Which tile a Triton kernel runs with: a tuning record's of this device, its architecture or family, or the
default.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from ..compiler.backends.triton_gpu import Architecture
from ..compiler.lookup import Wanted, look_up, stale
from ..compiler.records import RecordStore, policy
from ..compiler.target import Target
from ..kernels.shared.gpu_defaults import default
from ..kernels.shared.gpu_spaces import OPERATORS, space
from . import dispatch

FORM = "triton"
_FAMILY = "float16 bfloat16"  # both have the same instructions on every architecture
_given: dict[str, dict[str, Any]] = {}


def gpu_target(arch: Architecture, units: int = 1, l2: int = 0) -> Target:
    """Return an architecture as a target: records name it by its architecture and family."""
    return Target(
        arch.name, "gpu", arch.name, arch.family, cores=units, l1d=0, l2=l2, backends=("triton_gpu", "torch"),
        proof="compiled",
    )  # fmt: skip


def wanted(tile: str, arch: Architecture, l2: int = 0) -> Wanted:
    """Return what a record of a kernel's tile is about."""
    signature = space(tile, arch).signature
    return Wanted(OPERATORS[tile], FORM, signature, _FAMILY, tile, {}, 1, gpu_target(arch, l2=l2))


@contextlib.contextmanager
def using(tile: str, configuration: Mapping[str, Any]) -> Iterator[None]:
    """Run a kernel with another tile meanwhile (trials)."""
    before = _given.get(tile)
    _given[tile] = dict(configuration)
    try:
        yield
    finally:
        _given.pop(tile)
        if before is not None:
            _given[tile] = before


def chosen(tile: str, arch: Architecture, l2: int = 0) -> dict[str, Any]:
    """Return the tile that a kernel runs with here; what it is and where from stands in the report."""
    if tile in _given:
        return dict(_given[tile])
    return dict(_chosen(tile, arch, l2))


def forget() -> None:
    """Read the records anew at the next call (after tuning in this process)."""
    _chosen.cache_clear()


@functools.cache
def _chosen(tile: str, arch: Architecture, l2: int) -> dict[str, Any]:
    configuration, record = _look_up(tile, arch, l2)
    about = f"{tile} on {arch.name}"
    dispatch.note(dispatch.Choice(OPERATORS[tile], about, FORM, "triton_gpu", configuration, record))
    return configuration


def _look_up(tile: str, arch: Architecture, l2: int) -> tuple[dict[str, Any], str]:
    from .recorded import describe
    from .tuning import versions

    first = default(tile, arch.family, arch.name)
    if arch.backend == "xpu" or policy() == "off":
        return first, "default"
    whole, skipped = space(tile, arch), "default"
    for found in look_up(wanted(tile, arch, l2), RecordStore().all()):
        configuration = whole.complete(found.record.configuration)
        if found.origin == "imported":  # nothing has run it here, and a call never tunes
            skipped = "default (an imported record is not used; `edgeformer tune` on this device makes one)"
        elif old := stale(found.record, versions()):
            skipped = f"default (a record of {old}: tune again)"
        elif configuration.keys() == whole.default.keys() and not whole.refusal(configuration):
            return configuration, describe(found)
    return first, skipped
