"""Changes of a weight's format: on request, and to give the parts of one fused weight a common one."""

from __future__ import annotations

from typing import Any

import torch

from ..compiler.errors import UnsupportedError
from ..kernels.quant_matmul import CanonicalWeight, WeightFormat
from .compress.range_search import round_to

INT4, INT8 = WeightFormat.int4(32, zero="minimum"), WeightFormat.int8(32)
# what a part of the decoder is rounded to; parts that are not named take the profile's second format
PROFILES: dict[str, tuple[dict[str, WeightFormat], WeightFormat]] = {
    "int8": ({}, INT8),
    "int4": ({"embed": INT8, "head": INT8}, INT4),
    "balanced": (dict.fromkeys(("embed", "head", "q", "k", "v", "down"), INT8), INT4),
}


def requested_format(current: WeightFormat, quantize: str | None, name: str) -> WeightFormat:
    """The format that ``quantize`` asks for the weight ``name``; never a wider one than it has.

    An embedding table (and the head that shares it) stays at 8 bits or more: it is the weight that
    suffers most. "balanced" also keeps at 8 bits the projections that lose most: queries, keys and values,
    and the MLP's second.
    """
    if quantize is None:
        return current
    if quantize not in PROFILES:
        raise UnsupportedError(
            f"quantize={quantize!r} is not supported; use None, {', '.join(map(repr, PROFILES))}"
        )
    parts, other = PROFILES[quantize]
    wanted = parts.get(name.rsplit(".", 1)[-1], other)
    return current if not current.is_float and current.bits <= wanted.bits else wanted


def requantise(weight: CanonicalWeight, quantize: str | None, name: str) -> CanonicalWeight:
    """The weight in the requested format, rounded to nearest; untouched where it already fits."""
    wanted = requested_format(weight.format, quantize, name)
    return weight if wanted == weight.format else round_to(weight.dequantize(), wanted)


class QuantisedCheckpoint:
    """Hands a checkpoint's weights on in the requested format (see `requested_format`)."""

    def __init__(self, checkpoint: Any, quantize: str | None) -> None:
        self._checkpoint, self._quantize = checkpoint, quantize
        self.config = checkpoint.config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def format(self, name: str) -> WeightFormat:
        """The format of a matrix after rounding."""
        return requested_format(self._checkpoint.format(name), self._quantize, name)

    def weight(self, name: str) -> CanonicalWeight:
        """One matrix, rounded."""
        return requantise(self._checkpoint.weight(name), self._quantize, name)


def joined_format(formats: list[WeightFormat]) -> WeightFormat:
    """The narrowest format that holds all of ``formats`` exactly."""
    first = formats[0]
    if all(fmt == first for fmt in formats):
        return first
    plain = all(not f.is_float and f.zero in ("none", "constant") and not f.block_size for f in formats)
    if plain and len({(fmt.group_size, fmt.scale_dtype) for fmt in formats}) == 1:
        return WeightFormat.int8(first.group_size, scale_dtype=first.scale_dtype)
    return WeightFormat.float("float32")


def values_apart(formats: list[WeightFormat]) -> bool:
    """Whether the values of [queries, keys, values] are a weight of their own: their format is another."""
    return joined_format(formats[:2]) != formats[2]


def common_format(weights: list[CanonicalWeight]) -> list[CanonicalWeight]:
    """The weights in one format, without loss, so that their rows can be one matrix."""
    wanted = joined_format([weight.format for weight in weights])
    return [weight if weight.format == wanted else _widen(weight, wanted) for weight in weights]


def _widen(weight: CanonicalWeight, wanted: WeightFormat) -> CanonicalWeight:
    if wanted.is_float:
        return CanonicalWeight(wanted, weight.dequantize())
    codes = (weight.codes.to(torch.int16) - weight.format.zero_point).to(torch.int8)
    return CanonicalWeight(wanted, codes, weight.scale)
