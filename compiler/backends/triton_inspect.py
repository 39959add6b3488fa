"""What machine code for a GPU says of itself: registers, spills, matrix instructions, widths of loads."""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BuildError


@dataclass(frozen=True)
class Inspection:
    """Figures of one compiled kernel; the loop is the innermost one with most matrix instructions or loads.

    `registers` of a lane (`accumulators` AMD's second file), `spilled` registers of the whole kernel,
    `scratch` instructions that touch spilled registers in the hot loop, `shared_bytes` of a workgroup,
    `matrix` instructions in the loop and the `products` (multiply-adds) that they do for a wave, `loads`
    global loads there by bytes a lane, `instructions` all of it.
    """

    registers: int
    accumulators: int
    spilled: int
    scratch: int
    shared_bytes: int
    warps: int
    matrix: int
    loads: dict[int, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    instructions: int = 0
    products: int = 0

    @property
    def load_bytes(self) -> int:
        """Bytes a lane of the loads that bring most of the data (0: none)."""
        return max(self.loads, key=lambda width: width * self.loads[width], default=0)


_AMD_LOAD = re.compile(r"(?:buffer|global|flat)_load_(\w+)")
_AMD_WIDTHS = {
    "dword": 4,
    "dwordx2": 8,
    "dwordx3": 12,
    "dwordx4": 16,
    "b32": 4,
    "b64": 8,
    "b96": 12,
    "b128": 16,
}
_AMD_MATRIX = re.compile(r"v_(?:wmma|mfma|swmmac|smfmac)")
_AMD_SHAPE = re.compile(r"_(\d+)x(\d+)x(\d+)")


def inspect_amd(text: str, shared: int, warps: int) -> Inspection:
    """Read the AMDGPU assembly of one kernel."""
    body, labels = [], {}
    for line in text.splitlines():
        code = line.split(";")[0].strip()
        if found := re.match(r"(\.?LBB\d+_\d+):", code):
            labels[found[1]] = len(body)
        elif code and not code.startswith(".") and not code.endswith(":"):
            body.append(code)
    loops = []
    for i, code in enumerate(body):
        found = re.match(r"s_c?branch\w*\s+(\.?LBB\d+_\d+)", code)
        if found and labels.get(found[1], i + 1) <= i:
            loops.append((labels[found[1]], i + 1))
    counts = _hottest([_amd_counts(body[a:b]) for a, b in loops] or [_amd_counts(body)])
    number = lambda key: int(found[1]) if (found := re.search(key + r":\s+(\d+)", text)) else 0  # noqa: E731
    return Inspection(
        number(r"\.vgpr_count"), number(r"\.agpr_count"), number(r"\.vgpr_spill_count"),
        counts["scratch"], shared, warps, counts["matrix"], _loads(counts), _kinds(counts),
        counts["instructions"], counts["products"],
    )  # fmt: skip


def _amd_counts(lines: list[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for line in lines:
        op = line.split()[0]
        counts["instructions"] += 1
        if _AMD_MATRIX.match(op):
            counts["matrix"] += 1
            counts["products"] += _shape(_AMD_SHAPE, op)
        elif op.startswith("scratch_"):
            counts["scratch"] += 1
        elif found := _AMD_LOAD.match(op):
            kind = found[1]
            counts[f"load{_AMD_WIDTHS.get(kind, 1 if 'byte' in kind or kind.endswith('8') else 2)}"] += 1
        elif op.startswith("ds_"):
            counts["lds"] += 1
        elif op.startswith("v_"):
            counts["valu"] += 2 if op.startswith("v_dual") else 1
    return counts


_NV_MATRIX = re.compile(r"^(?:HGMMA|QGMMA|IGMMA|HMMA|IMMA|QMMA)")
_NV_GROUP_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)")  # of four warps
_NV_SHAPE = re.compile(r"\.168(\d+)")  # 16 x 8 x this
_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def inspect_nvidia(cubin: bytes, shared: int, warps: int) -> Inspection:
    """Read a cubin with the `cuobjdump` that comes with Triton."""
    resources, text = (_cuobjdump(cubin, flag) for flag in ("--dump-resource-usage", "-sass"))
    code = [(int(a, 16), op, rest) for a, op, rest in _LINE.findall(text)]
    places = {address: i for i, (address, _, _) in enumerate(code)}
    loops = []
    for i, (_, op, rest) in enumerate(code):
        found = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        start = places.get(int(found[1], 16)) if found else None
        if start is not None and start < i:
            loops.append((start, i + 1))
    counts = _hottest([_nv_counts(code[a:b]) for a, b in loops] or [_nv_counts(code)])
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    registers, stack = (int(found[1]), int(found[2])) if found else (0, 0)
    return Inspection(
        registers, 0, stack // 4, counts["scratch"], shared, warps, counts["matrix"], _loads(counts),
        _kinds(counts), counts["instructions"], counts["products"],
    )  # fmt: skip


def _nv_counts(code: list[tuple[int, str, str]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for _, op, _ in code:
        counts["instructions"] += 1
        if _NV_MATRIX.match(op):
            counts["matrix"] += 1
            counts["products"] += _shape(_NV_GROUP_SHAPE, op) // 4 or 128 * _shape(_NV_SHAPE, op)
        elif op.startswith(("LDL", "STL")):
            counts["scratch"] += 1
        elif op.startswith(("LDG", "LDGSTS", "UTMALDG", "UBLKCP")):
            width = next((w for w in (128, 64) if f".{w}" in op), 8 if ".U8" in op or ".S8" in op else 32)
            width = 16 if ".U16" in op or ".S16" in op else width
            counts[f"load{16 if op.startswith('U') else width // 8}"] += 1
        elif op.startswith(("LDS", "STS", "LDSM")):
            counts["lds"] += 1
        else:
            counts["valu"] += 1
    return counts


def _cuobjdump(cubin: bytes, flag: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        environment = {**os.environ, "PATH": f"{folder}:{os.environ.get('PATH', '')}"}
        command = [str(folder / "cuobjdump"), flag, file.name]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        raise BuildError(f"cuobjdump {flag} failed: {result.stderr[:200]}")
    return result.stdout


def _hottest(loops: list[Counter[str]]) -> Counter[str]:
    """Return the loop with most matrix instructions, then most loaded bytes; of equals the shortest."""
    loaded = lambda c: sum(width * n for width, n in _loads(c).items())  # noqa: E731
    return max(loops, key=lambda c: (c["matrix"], loaded(c), -c["instructions"]))


def _shape(pattern: re.Pattern[str], op: str) -> int:
    """Return the product of the sizes in an instruction's name; 0 where it has none."""
    found = pattern.search(op)
    return math.prod(map(int, found.groups())) if found else 0


def _loads(counts: Counter[str]) -> dict[int, int]:
    return {int(key[4:]): n for key, n in sorted(counts.items()) if key.startswith("load")}


def _kinds(counts: Counter[str]) -> dict[str, int]:
    return {key: counts[key] for key in ("valu", "lds")}
