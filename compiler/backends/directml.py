"""Which nodes of an ONNX model DirectML has kernels for, by its published list (directml_operators.yaml).

A node without one runs on the CPU, and its tensors cross the bus twice a step: not wrong, but slow.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .onnx_graph import require

TABLE = "directml_operators.yaml"


@dataclass(frozen=True)
class Fallback:
    """A node that DirectML would leave to the CPU, and why."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node} ({self.operator}): {self.reason}"


@functools.cache
def support() -> dict[str, Any]:
    """Return the table of kernels, with its source and the date when it was read."""
    import yaml

    return yaml.safe_load((resources.files(__package__ or "") / TABLE).read_text())


def fallbacks(model: Any) -> list[Fallback]:
    """Return the nodes of a ModelProto that have no DirectML kernel, in order."""
    table, found = support(), []
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    types = _known_types(model.graph)
    for node in model.graph.node:
        domain = node.domain or "ai.onnx"
        entry = table["operators"].get(domain, {}).get(node.op_type)
        if entry is None:
            reason = "DirectML has no such kernel"
        elif versions.get(domain, 0) < entry[0]:
            reason = f"DirectML has it from opset {entry[0]} on, the model has {versions.get(domain, 0)}"
        else:
            reason = _wrong_type(node, entry[1], types, table["types"]) or _wrong_use(
                node, table["limits"].get(node.op_type)
            )
        if reason:
            found.append(Fallback(node.name, node.op_type, reason))
        for name in node.output:
            types[name] = _output_type(node, entry, types)
    return found


def _known_types(graph: Any) -> dict[str, str]:
    types = {value.name: _name(value.type.tensor_type.elem_type) for value in graph.input}
    return types | {tensor.name: _name(tensor.data_type) for tensor in graph.initializer}


def _name(number: int) -> str:
    try:
        return str(require("onnx").helper.tensor_dtype_to_np_dtype(number))
    except (KeyError, TypeError):
        return f"type {number}"


def _output_type(node: Any, entry: list[Any] | None, types: dict[str, str]) -> str:
    """An element type, "" where the table does not tell."""
    if node.op_type == "Cast":
        return _name(next(a.i for a in node.attribute if a.name == "to"))
    out = entry[2][0] if entry else ""
    if out.startswith("="):
        at = int(out[1:])
        return types.get(node.input[at], "") if at < len(node.input) else ""
    return out


def _wrong_type(node: Any, wanted: list[Any], types: dict[str, str], names: dict[str, list[str]]) -> str:
    for at, name in enumerate(node.input):
        kind = wanted[min(at, len(wanted) - 1)]
        allowed = kind if isinstance(kind, list) else names.get(kind, [kind])
        found = types.get(name, "")
        if name and found and found not in allowed:
            return f"input {at} is {found}, DirectML takes {', '.join(allowed)}"
    return ""


def _wrong_use(node: Any, limit: dict[str, Any] | None) -> str:
    if limit is None:
        return ""
    given = [bool(name) for name in node.input]
    if "inputs" in limit and len(given) != limit["inputs"]:
        return f"{len(given)} inputs, DirectML's kernel takes {limit['inputs']}"
    for at in limit.get("present", ()):
        if at >= len(given) or not given[at]:
            return f"input {at} is left out, which DirectML's kernel needs"
    for at in limit.get("absent", ()):
        if at < len(given) and given[at]:
            return f"input {at} is given, which DirectML's kernel ignores"
    attributes = {a.name: a.f if a.type == a.FLOAT else a.i for a in node.attribute}
    for name, values in limit.get("attributes", {}).items():
        if attributes.get(name, values[0]) not in values:
            return f"{name} is {attributes[name]}, DirectML's kernel takes {', '.join(map(str, values))}"
    return ""
