"""How much memory a decoder takes in ONNX Runtime, before its graph is written or loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..compiler.errors import CapacityError, FormatError, UnsupportedError
from ..kernels.quant_matmul import WeightFormat
from ..runtime.onnx_session import CPU, default_provider
from .config import ModelConfig
from .load import manifest
from .load.config_json import config_from_json
from .plan import MemoryPlan, WeightSource, choose_context, plan_folder
from .requantise import joined_format, requested_format, values_apart

# What the CPU provider holds beside each other, in bytes of the file of tensors (4 bits in groups of 32 are
# the worst case): a session with int8 activations packs codes, scales and the scaled zero points anew, one
# with fp32 activations the codes; scales and the table of tokens stay mapped.
_PACKED, _MAPPED = {"int8": 1.2, "float": 0.8}, 0.2
SESSIONS = {"auto": ("int8", "float"), "int8": ("int8",), "float": ("float",)}  # of an activation
_FLOAT = {"fp32": 4, "fp16": 2}  # bytes of a scale, by the type of the cache


def plan_onnx_folder(
    folder: manifest.CompiledFolder, context: int | None = None, kv: str | None = None
) -> MemoryPlan:  # fmt: skip
    """Return what loading a folder for DirectML takes, every graph of it that this provider opens counted.

    Raises FormatError for a damaged manifest, CapacityError for more context than the folder was compiled
    for, UnsupportedError for another type of the cache.
    """
    config = config_from_json(folder.data["config"], folder.path)
    options = folder.data["options"]
    own, own_kv, activation = (options.get(name) for name in ("context", "kv", "activation"))
    if type(own) is not int or not 0 < own <= config.max_context:
        raise FormatError(f"{folder.path}: the manifest's context is damaged")
    for name, value, values in (("kv", own_kv, _FLOAT), ("activation", activation, SESSIONS)):
        if value not in values:
            raise FormatError(f"{folder.path}: the manifest's option {name!r} is damaged")
    if kv is not None and kv != own_kv:
        raise UnsupportedError(
            f"{folder.path} was compiled with --kv {own_kv}; compile it again with --kv {kv}"
        )
    if context is not None and not 0 < context <= own:
        raise CapacityError(
            f"{folder.path} was compiled for a context of {own}; compile it again with --context {context}"
        )
    held = held_bytes(folder.data["files"][manifest.WEIGHTS]["bytes"], activation)
    return dataclasses.replace(plan_folder(config, held, own, own_kv), context=context or own)


def plan_onnx(
    checkpoint: WeightSource, *, context: int | None, kv: str, quantize: str | None, activation: str
) -> MemoryPlan:
    """Return what a folder made of a checkpoint will take; reads no weight. Raises UnsupportedError."""
    if kv not in _FLOAT:
        raise UnsupportedError(f"kv={kv!r} is not supported for directml; use one of {', '.join(_FLOAT)}")
    file = file_bytes(checkpoint, quantize, _FLOAT[kv])
    tokens = choose_context(checkpoint.config, context)
    return plan_folder(checkpoint.config, held_bytes(file, activation), tokens, kv)


def held_bytes(file: int, activation: str) -> int:
    """Return the bytes of weights in memory for a file of so many: DirectML's are the device's."""
    if default_provider() != CPU:
        return file
    return int(file * (_MAPPED + sum(_PACKED[one] for one in SESSIONS[activation])))


def file_bytes(checkpoint: WeightSource, quantize: str | None, float_bytes: int) -> int:
    """Return the bytes of the tensors that `build_graph` writes, but for what fills pages."""
    config: ModelConfig = checkpoint.config
    shapes = checkpoint.matrices()

    def fmt(name: str) -> WeightFormat:
        return requested_format(checkpoint.format(name), quantize, name)

    def matrix(*names: str, table: bool = False) -> int:
        rows = sum(shapes[name][0] for name in names)
        return _tensor_bytes(joined_format([fmt(n) for n in names]), rows, shapes[names[0]][1],
                             float_bytes, table)  # fmt: skip

    total = sum(matrix(name, table=name == "embed") for name in ("embed", "head") if name in shapes)
    for layer in range(config.num_layers):
        at = f"layers.{layer}."
        total += sum(matrix(*names) for names in _products(at, fmt))
    return total + sum(config.vectors().values()) * float_bytes


def _products(at: str, fmt: Any) -> Sequence[tuple[str, ...]]:
    q, k, v = (at + part for part in "qkv")
    apart = values_apart([fmt(name) for name in (q, k, v)])
    heads = [(q, k), (v,)] if apart else [(q, k, v)]
    return [*heads, (at + "o",), (at + "gate", at + "up"), (at + "down",)]


def _tensor_bytes(fmt: WeightFormat, n: int, k: int, float_bytes: int, table: bool) -> int:
    if fmt.is_float:
        return n * k * float_bytes
    bits, groups = 4 if fmt.bits <= 4 else 8, -(-k // fmt.group_size)
    floats = 1 + (fmt.zero == "minimum") + (table and fmt.zero in ("minimum", "integer"))
    return n * (groups * fmt.group_size * bits // 8 + -(-groups * bits // 8) + floats * groups * float_bytes)
