"""`edgeformer targets`: what code can be compiled for, and how far each known device was shown."""

from __future__ import annotations

import json
from typing import Any

import typer

from .cli_options import OutputText, Text


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(targets)


def targets(output: OutputText = Text.text) -> None:
    """List the targets that code can be compiled for, this host first, then the known devices."""
    rows, devices = target_rows(), device_rows()
    if output == Text.json:
        typer.echo(json.dumps([*rows, *devices], indent=1))
        return
    from .compiler.target import PROOFS

    for row in rows:
        here = "runs here" if row["runs_here"] else "lacks " + ", ".join(row["missing"][:4])
        typer.echo(
            f"{row['name']:18} {row['arch']:8} {row['mcpu']:16} {row['isa']:12} {row['proof']:10} {here}"
        )
    typer.echo("\ndevices (a name is a target, too, where there is a CPU)")
    for row in devices:
        typer.echo(f"{row['name']:18} {row['device']}: {row['memory']}; {' > '.join(row['backends'])}")
        for proof in row["proofs"]:
            shown = f"{proof['level']} {proof['date']}, `{proof['command']}`"
            typer.echo(f"{'':18} {proof['part']} {proof['what']}: {shown}")
    typer.echo("\n".join(f"{name}: {meaning}" for name, meaning in PROOFS.items()), err=True)


def target_rows() -> list[dict[str, Any]]:
    """One row a target, this host first."""
    from .compiler.target import Target, detect, known_targets

    host, rows = detect(), []
    for target in (host, *(Target.parse(name) for name in known_targets())):
        missing = target.missing_on(host)
        rows.append(
            {
                "name": "auto" if target is host else target.name,
                "kind": "target",
                "arch": target.arch,
                "mcpu": target.mcpu,
                "isa": target.isa,
                "proof": target.proof,
                "runs_here": not missing,
                "missing": missing,
            }
        )
    return rows


def device_rows() -> list[dict[str, Any]]:
    """One row a device."""
    from .compiler.devices import known_devices

    rows = []
    for device in known_devices():
        target = device.target()
        what = {"CPU": target and f"{target.mcpu} ({target.isa})", "GPU": device.gpu and device.gpu.arch}
        rows.append(
            {
                "name": device.name,
                "kind": "device",
                "device": device.title,
                "memory": f"{device.memory}, {device.bandwidth / 1e9:.1f} GB/s",
                "backends": list(device.backends),
                "proofs": [
                    {"part": part, "what": what[part], "level": proof.level, "date": proof.date,
                     "command": proof.command}
                    for part, proof in device.proofs()
                ],
                "sources": device.sources,
            }
        )  # fmt: skip
    return rows
