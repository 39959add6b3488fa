"""Profiles: which weight format each layer gets, by weight error per byte or by measured sensitivity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compiler.errors import UnsupportedError
from ...kernels.quant_matmul import CanonicalWeight, WeightFormat

PROFILES = ("exact", "balanced", "fast", "experimental")
INT4, INT8 = WeightFormat.int4(32, zero="minimum"), WeightFormat.int8(32)
_SAMPLE_ROWS = 64
_LOSSLESS = 1e-3  # relative error below which more bits gain nothing
_BUDGET = 0.25  # of the bytes of all layers in INT4, that "balanced" may add
_QKV = frozenset({"q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v"})
_GATE_UP = frozenset({"gate_proj", "up_proj", "gate", "up"})
_BYTES = {INT4: 0.625, INT8: 1.0625}  # a value with its share of scale and minimum


@dataclass
class Candidate:
    """A weight [N, K] that a format is chosen for; `table` marks an embedding or a vocabulary's head."""

    name: str
    weight: Tensor
    table: bool = False


def check_profile(profile: str) -> None:
    """Raise UnsupportedError for a profile that does not exist, or not yet."""
    if profile not in PROFILES:
        raise UnsupportedError(f"profile {profile!r} is not one of {', '.join(PROFILES)}")
    if profile == "experimental":
        raise UnsupportedError(
            "profile 'experimental' is declined: it needs weights of less than 4 bits, which have no kernel "
            "yet; use 'fast'"
        )


def choose_formats(
    candidates: list[Candidate],
    profile: str,
    decodes: bool = True,
    sensitivity: Callable[[dict[str, list[Candidate]]], dict[str, float]] | None = None,
) -> dict[str, WeightFormat]:
    """Return the format of each candidate by name.

    "exact" keeps each weight's own float type; "fast" is INT4 with tables in INT8. "balanced" is INT8 for a
    model that does not decode: its passes have many rows, and are bound by arithmetic and not by the bytes
    of weights, so that INT4 would only cost quality. Else it starts as "fast",
    and spends a quarter more bytes on INT8 where a byte buys most: of weight error, or of what
    `sensitivity` measured (the loss of quality when those layers alone are INT4). See `by_role`.
    """
    if profile == "exact":
        return {c.name: WeightFormat.float(c.weight.dtype) for c in candidates}
    formats = {c.name: INT8 if c.table else INT4 for c in candidates}
    if profile == "fast":
        return formats
    if not decodes:
        return dict.fromkeys(formats, INT8)
    groups = by_role([c for c in candidates if not c.table])
    gains = (sensitivity or _error_gains)(groups)
    values = {role: sum(c.weight.numel() for c in cs) for role, cs in groups.items()}
    budget = _BUDGET * sum(values.values()) * _BYTES[INT4]
    for role in sorted(groups, key=lambda r: gains[r] / values[r], reverse=True):
        extra = values[role] * (_BYTES[INT8] - _BYTES[INT4])
        if gains[role] > 0 and extra <= budget:
            formats |= {c.name: INT8 for c in groups[role]}
            budget -= extra
    return formats


def by_role(candidates: list[Candidate]) -> dict[str, list[Candidate]]:
    """Return the candidates by their place in a layer: the same product in all layers has one format.

    Queries, keys and values (and gate and up) go together: they are one product in the whole step.
    """
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        *path, last = ["*" if part.isdigit() else part for part in candidate.name.split(".")]
        last = "qkv" if last in _QKV else "gate_up" if last in _GATE_UP else last
        role = ".".join([*path, last])
        groups.setdefault(role, []).append(candidate)
    return groups


def _error_gains(groups: dict[str, list[Candidate]]) -> dict[str, float]:
    return {role: sum(error_gain(c.weight) for c in cs) for role, cs in groups.items()}


def error_gain(weight: Tensor) -> float:
    """Return the squared error that INT8 saves over INT4, estimated from some rows; 0 where INT4 is exact."""
    step = max(1, weight.shape[0] // _SAMPLE_ROWS)
    rows = weight.detach()[::step].float()
    error = [(CanonicalWeight.from_float(rows, f).dequantize() - rows).square().sum() for f in (INT4, INT8)]
    if error[0] <= _LOSSLESS**2 * rows.square().sum():
        return 0.0
    return float((error[0] - error[1]).clamp_min(0)) * weight.shape[0] / rows.shape[0]


def bits(fmt: WeightFormat) -> int:
    """Return the bits of one code or value."""
    return fmt.bits or 8 * torch.empty((), dtype=fmt.torch_dtype).element_size()
