"""The README's table of devices, made from the profiles in compiler/targets/devices.

python -m edgeformer.bench.readme_devices          # writes the section between the markers
python -m edgeformer.bench.readme_devices --check  # exit code 1 where it is not what the profiles say
python -m edgeformer.bench.readme_devices --file docs/devices.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..compiler.devices import Cores, Device, known_devices
from . import readme
from .table import markdown_table

ROOT = readme.ROOT
BEGIN = "<!-- devices: made by `python -m edgeformer.bench.readme_devices`; do not edit -->"
END = "<!-- devices: end -->"
HEAD = ["device", "CPU", "caches", "GPU", "memory", "back ends, in order", "shown"]


def section(devices: list[Device]) -> str:
    """Return the table: one row a device."""
    return markdown_table(HEAD, [_row(device) for device in devices], left=len(HEAD))


def _row(device: Device) -> list[str]:
    cpu, gpu, target = device.cpu, device.gpu, device.target()
    caches = [] if cpu is None else [_caches(cores) for cores in cpu.cores]
    if cpu is not None and cpu.l3:
        caches.append(f"L3 {_size(cpu.l3)}")
    size = f"{device.memory_bytes >> 30} GiB " if device.memory_bytes else ""
    return [
        f"{device.title} (`{device.name}`)",
        ""
        if cpu is None or target is None
        else f"{', '.join(f'{c.count} {c.name}' for c in cpu.cores)}; `{target.mcpu}`",
        "; ".join(caches),
        "" if gpu is None else f"{gpu.name}, `{gpu.arch}`, {gpu.units} {gpu.unit}",
        f"{size}{device.memory}, {device.bandwidth / 1e9:,.0f} GB/s",
        ", ".join(device.backends),
        "; ".join(f"{part} {proof.level}" for part, proof in device.proofs()),
    ]


def _caches(cores: Cores) -> str:
    shared = f" for {cores.l2_shared_by}" if cores.l2_shared_by > 1 else ""
    return f"L1d {_size(cores.l1d)}, L2 {_size(cores.l2)}{shared}"


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


def replaced(text: str, made: str) -> str:
    """Return a file with the table between its markers. Raises FormatError where they are missing."""
    return readme.replaced(text, made, BEGIN, END)


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 where it differs.")
    ] = False,
    file: Annotated[Path, typer.Option(help="The file with the markers.")] = ROOT / "README.md",
) -> None:
    """Write the section of devices from their profiles."""
    text = file.read_text(encoding="utf-8")
    made = replaced(text, section(known_devices()))
    if check:
        raise typer.Exit(0 if made == text else 1)
    file.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
