"""A ModelConfig as JSON values and back: nested frozen dataclasses and tuples by their type hints."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from ...compiler.errors import FormatError, UnsupportedError
from ...kernels.quant_matmul import WeightFormat
from ..config import ModelConfig


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Return a configuration as JSON values."""
    return dataclasses.asdict(config)


def config_from_json(data: Any, source: Any) -> ModelConfig:
    """Return the configuration of JSON values. Raises FormatError for an unknown field or type."""
    try:
        return _build(ModelConfig, data)
    except (TypeError, LookupError, ValueError, ArithmeticError) as error:
        raise FormatError(f"{source}: the configuration is damaged: {str(error)[:200]}") from error


def format_from_json(data: Any, source: Any) -> WeightFormat:
    """Return the weight format of JSON values. Raises FormatError, or UnsupportedError for an unknown one."""
    try:
        found = _build(WeightFormat, data)
    except (TypeError, LookupError, ValueError, ArithmeticError) as error:
        raise FormatError(f"{source}: a weight format is damaged: {str(error)[:200]}") from error
    if found.block_size not in (0, 256):
        raise UnsupportedError(f"{source}: blocks of {found.block_size} weights are not supported")
    return found


def _build(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"{value!r} is no {getattr(kind, '__name__', kind)}")
        hints = typing.get_type_hints(kind)
        make: Any = kind
        return make(**{name: _build(hints[name], item) for name, item in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _build(next(a for a in arguments if a is not type(None)), value)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{value!r} is no list")
        items = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        return tuple(_build(item, v) for item, v in zip(items, value, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
