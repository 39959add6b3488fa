"""Where neighbouring work-items read: the addresses of a kernel's 16-byte loads, lane by lane.

TVM's OpenCL C names every value once, so an address is worked out from the text: the local id is the lane,
loop counters and what was read from memory are the same number for all lanes (a loaded number that differed
by lane would make a gather, which no kernel here does).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

_LANE = "convert_int(get_local_id(0))"
_HEAD = re.compile(r"^__kernel .*?\bvoid (\w+)_kernel\((.*?)\) \{$", re.MULTILINE)
_BINDING = re.compile(r"^\s*(?:for \()?int (\w+) = (.*?);")
_WIDE = re.compile(r"__global (?:const )?(?:uint4|int4|float4)\* restrict (\w+)")
_WORD = re.compile(r"[A-Za-z_]\w*")
_KNOWN = {"min": min, "max": max, "int": int}


def kernels(source: str) -> Iterator[tuple[str, str, str]]:
    """Yield (name, parameters, body) of every kernel that is defined in OpenCL C text."""
    heads = list(_HEAD.finditer(source))
    ends = [head.start() for head in heads[1:]] + [len(source)]
    for head, end in zip(heads, ends, strict=True):
        yield head[1], head[2], source[head.end() : end]


def neighbours(source: str, lanes: int) -> dict[tuple[str, str], int]:
    """Return for (kernel, buffer) how many of `lanes` neighbours in a row read one vector behind the other.

    The least over the buffer's loads of 16 bytes; a load of one address for all lanes does not count.
    """
    found: dict[tuple[str, str], int] = {}
    for name, parameters, body in kernels(source):
        buffers = set(_WIDE.findall(parameters))
        runs: dict[str, list[int]] = {}
        tables: list[dict[str, Any]] = [{} for _ in range(lanes)]
        for line in body.splitlines():
            for buffer, index in _loads(line, buffers):
                places = [_value(index, lane, table) for lane, table in enumerate(tables)]
                if len(set(places)) > 1:
                    runs.setdefault(buffer, []).append(_shortest_run(places))
            if bound := _BINDING.match(line):
                for lane, table in enumerate(tables):
                    table[bound[1]] = _value(bound[2], lane, table)
        found |= {(name, buffer.removesuffix("_ptr")): min(values) for buffer, values in runs.items()}
    return found


def _loads(line: str, buffers: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (buffer, index) of what a line reads; what it stores to is left out."""
    stored = line.split(" = ", 1)[0] if " = " in line else ""
    for match in _WORD.finditer(line):
        if match[0] not in buffers or line[match.end() : match.end() + 1] != "[":
            continue
        if match.end() < len(stored) and not stored.strip().startswith(("uint", "int", "float", "if")):
            continue
        yield match[0], _inside(line, match.end())


def _inside(text: str, start: int) -> str:
    """Return what stands in the brackets that open at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"[": 1, "]": -1}.get(text[i], 0)
        if not depth:
            return text[start + 1 : i]
    raise ValueError(f"brackets do not close: {text}")


def _value(expression: str, lane: int, table: dict[str, Any]) -> int:
    """Work out an integer expression; sizes that a call brings are 1, what is loaded is 0."""
    text = expression.replace(_LANE, str(lane))
    text = re.sub(r"\w+\([^()]*get_\w+\(\d\)\)", "0", text)  # group ids and sizes
    text = re.sub(r"get_\w+\(\d\)", "0", text)
    text = text.replace("(int)", "int").replace("/", "//").replace("&&", " and ").replace("||", " or ")
    text = re.sub(r"\(([^()?]*)\)\s*\?\s*([^:]*):(.*)$", r"((\2) if (\1) else (\3))", text)
    names = {word: table.get(word, _KNOWN.get(word, 1)) for word in _WORD.findall(text)}
    names = {word: value for word, value in names.items() if word not in ("and", "or", "if", "else")}
    if any(not isinstance(value, int) and word not in _KNOWN for word, value in names.items()):
        return 0
    try:
        return int(eval(text, {"__builtins__": {}}, names))
    except (SyntaxError, TypeError):
        return 0


def _shortest_run(places: list[int]) -> int:
    """Return the shortest stretch of lanes before a jump (all lanes, when there is none)."""
    runs, length = [], 1
    for before, after in pairwise(places):
        if after == before + 1:
            length += 1
            continue
        runs.append(length)
        length = 1
    return min(runs) if runs else len(places)
