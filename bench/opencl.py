"""Every OpenCL kernel for every class of device, none needed: `make opencl-table`.

A class is a largest work-group (64, 128, 256), a local memory (16, 32 KiB) and a subgroup (8 to 64). For
each, the source is generated and held to the rules: work-group and local memory within the class, whole
subgroups of every size, no operation of subgroups (which a device may lack, and whose size a driver may
choose), no array in private memory, and in every size of subgroup neighbours that read neighbouring vectors
of 16 bytes where most of the bytes come from (weights, keys, values). The same schedules are generated as
Metal and WebGPU source.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..compiler.backends import tvm_opencl
from ..compiler.backends.opencl_device import LOCAL_KIB, SUBGROUPS, WORK_GROUPS, class_of, class_target
from ..compiler.errors import BuildError
from ..compiler.operator import Operator
from ..compiler.target import Target
from ..kernels.attention import AttentionSpec
from ..kernels.attention.append import AppendSpec
from ..kernels.embedding.spec import EmbeddingSpec
from ..kernels.gated_silu.spec import GatedSiluSpec
from ..kernels.norm.spec import NormSpec
from ..kernels.quant_matmul import QuantMatmulSpec, WeightFormat
from ..kernels.rope.spec import RopeSpec
from ..kernels.sampling.spec import SamplingSpec
from ..runtime.registry import operators
from .opencl_loads import kernels, neighbours

IN_A_ROW = 8  # vectors of 16 bytes: 128 bytes, a line of a GPU's memory
_SUBGROUP = re.compile(r"\b(?:intel_)?sub_group_\w+\s*\(")
DOMINANT = {"quant_matmul": ("w",), "attention": ("k", "v", "parts")}  # the buffers that most bytes come from

_FORMATS = {
    "int4": WeightFormat.int4(),
    "int8": WeightFormat.int8(),
    "Q4_K": WeightFormat.blocked(4, 32),
    "Q6_K": WeightFormat.blocked(6, 16, "constant"),
    "bfloat16": WeightFormat.float("bfloat16"),
    "float32": WeightFormat.float("float32"),
}


def problems_of_model() -> Iterator[tuple[str, str, Any]]:
    """Yield (label, operator, spec) of what a decoder runs, at the sizes of small and large ones."""
    for name, fmt in _FORMATS.items():
        yield f"{name}", "quant_matmul", QuantMatmulSpec(4096, 4096, fmt, "float", residual=True)
    pair = QuantMatmulSpec(8192, 2048, _FORMATS["int4"], "float", epilogue="silu_pair")
    yield "int4 pair", "quant_matmul", pair
    for kv in ("bfloat16", "float16", "float32", "int8"):
        spec = AttentionSpec(32, 8, 128, 128, kv_dtype=kv, mask="causal_lengths", layout="vectors")
        yield f"d128 {kv}", "attention", spec
        yield f"d128 {kv}", "kv_append", AppendSpec(128, 128, kv_dtype=kv)
    spec = AttentionSpec(9, 3, 64, 64, kv_dtype="bfloat16", mask="causal_lengths", layout="vectors")
    yield "d64 bfloat16", "attention", spec
    yield "4096", "norm", NormSpec("rms", 4096, 1e-5)
    yield "d128", "rope", RopeSpec(128)
    yield "d128 interleaved", "rope", RopeSpec(128, interleaved=True)
    yield "", "gated_silu", GatedSiluSpec()
    yield "int4", "embedding", EmbeddingSpec(49152, 4096, _FORMATS["int4"], "n32.unsigned")
    yield "49152", "sampling", SamplingSpec(49152)


def check(operator: Operator, spec: Any, label: str, target: Target) -> list[dict[str, Any]]:
    """Generate the kernels of a problem for a class (any subgroup) and read them, one row a kernel."""
    form = operator.form("tvm_opencl")
    base = {"operator": operator.name, "problem": label, "target": target.isa}
    if (answer := form.decide(spec, target)) is not None:
        return [{**base, "kernel": "", "problems": [answer.reason]}]
    try:
        functions = form.lower(spec, form.space(spec, target)[0], target) if form.lower else []
        source = tvm_opencl.generate(functions)
        facts = {f.name: f for f in tvm_opencl.inspect(source)}
        runs = {size: neighbours(source, size) for size in SUBGROUPS}
        operations = {name: len(_SUBGROUP.findall(body)) for name, _, body in kernels(source)}
    except BuildError as error:
        return [{**base, "kernel": "", "problems": [str(error)]}]
    rows = []
    for function in functions:
        found = facts[str(function.attrs["global_symbol"])]
        row = {
            **base,
            "kernel": found.name,
            "work_group": found.work_group,
            "local_bytes": found.local_bytes,
            "private_arrays": found.private_arrays,
            "subgroup_operations": operations[found.name],
            "in_a_row": {
                buffer: {size: runs[size].get((found.name, buffer), 0) for size in SUBGROUPS}
                for buffer in DOMINANT.get(operator.name, ())
                if any(argument in (buffer, f"{buffer}_ptr") for argument, _ in found.arguments)
            },
        }
        rows.append({**row, "problems": broken(row, target)})
    return rows


def broken(row: dict[str, Any], target: Target) -> list[str]:
    """Return which rules a kernel breaks."""
    work_group, local, _ = class_of(target)
    wrong = []
    if row["work_group"] > work_group:
        wrong.append(f"work-group of {row['work_group']}")
    if row["local_bytes"] > local:
        wrong.append(f"{row['local_bytes']} bytes of local memory")
    if row["private_arrays"]:
        wrong.append(f"{row['private_arrays']} arrays in private memory")
    if row["subgroup_operations"]:
        wrong.append(f"{row['subgroup_operations']} operations of subgroups")
    for buffer, by_size in row["in_a_row"].items():
        for size, run in by_size.items():
            if run < min(size, IN_A_ROW):
                wrong.append(f"{run} neighbours of {size} that read {buffer} in a row")
    if row["work_group"] % SUBGROUPS[-1]:
        wrong.append("a work-group that is not whole subgroups")
    return wrong


def languages(functions: list[Any]) -> dict[str, str]:
    """Return for Metal and WebGPU "generated", or why not."""
    found = {}
    for language in ("metal", "webgpu"):
        try:
            tvm_opencl.generate(functions, language)
            found[language] = "generated"
        except BuildError as error:
            found[language] = str(error).splitlines()[-1][-80:]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as Markdown, one line a kernel and (work-group, local memory)."""
    lines = [
        "| operator | problem | kernel | class | work-group | local bytes | private arrays "
        "| subgroup operations | in a row |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["operator"], row["problem"], row["kernel"], row["target"].rsplit(".", 1)[0]]
        if "work_group" not in row:
            lines.append(f"| {' | '.join(cells)} | declined: {row['problems'][0]} | | | | |")
            continue
        in_a_row = ", ".join(
            f"{buffer} {' '.join(map(str, runs.values()))}" for buffer, runs in row["in_a_row"].items()
        )
        figures = [row["work_group"], row["local_bytes"], row["private_arrays"], row["subgroup_operations"]]
        figures.append(in_a_row)
        lines.append(f"| {' | '.join(map(str, [*cells, *figures]))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Check the classes asked for; print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-group", nargs="*", type=int, default=list(WORK_GROUPS), choices=WORK_GROUPS)
    parser.add_argument("--local", nargs="*", type=int, default=list(LOCAL_KIB), choices=LOCAL_KIB)
    parser.add_argument("--table", type=Path, help="write the figures as Markdown")
    options = parser.parse_args()
    rows, known = [], operators()
    other: dict[tuple[str, str], dict[str, str]] = {}
    for work_group in options.work_group:
        for local in options.local:
            target = class_target(work_group, local, SUBGROUPS[-1])
            found = []
            for label, name, spec in problems_of_model():
                found += check(known[name], spec, label, target)
                form = known[name].form("tvm_opencl")
                if (name, label) not in other and form.lower is not None and form.space(spec, target):
                    functions = form.lower(spec, form.space(spec, target)[0], target)
                    other[name, label] = languages(functions)
            bad = [row for row in found if row["problems"]]
            print(
                f"{target.isa.rsplit('.', 1)[0]}: {len(found)} kernels, {len(bad)} with problems", flush=True
            )
            for row in bad:
                print(f"  {row['operator']} {row['problem']} {row['kernel']}: {'; '.join(row['problems'])}")
            rows += found
    for language in ("metal", "webgpu"):
        failed = {key: found[language] for key, found in other.items() if found[language] != "generated"}
        print(f"{language}: {len(other) - len(failed)} of {len(other)} problems generated")
        for key, reason in failed.items():
            print(f"  {' '.join(key)}: {reason}")
    if options.table:
        head = f"{tvm_opencl.versions()}; written by `make opencl-table`. "
        head += "Subgroups of 8 to 64 run the same code: no kernel uses their operations, and every "
        head += "work-group is whole ones.\nIn a row: how many neighbours of a subgroup of 8, 16, 32 and 64 "
        head += "read 16 bytes that lie one behind the other.\n\n"
        options.table.write_text(head + table(rows))
    sys.exit(any(row["problems"] for row in rows))


if __name__ == "__main__":
    main()
