"""The whole default suite: a model beside its peers, single kernels, and one page of both, in one folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..compiler.errors import FormatError
from .model import bench, require_plausible
from .ops import OpsOptions, bench_ops
from .options import Options
from .report import write
from .result_files import read_all
from .table import render

Progress = Callable[[str], None]


def suite(
    model: Path,
    options: Options,
    ops: OpsOptions,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Write model.json, ops.json and report.html into `folder`; return them.

    Each file is written as soon as its part is measured; where options.resume is set, a part whose file is
    there is not measured again. Raises FormatError where the folder cannot be written.
    """
    files = [folder / "model.json", folder / "ops.json"]
    parts: list[Callable[[], Sequence[dict[str, Any]]]] = [
        lambda: bench(model, options, progress),
        lambda: bench_ops(ops, progress),
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, measure in zip(files, parts, strict=True):
            if options.resume and path.exists():
                progress(f"{path} is measured already")
                continue
            path.unlink(missing_ok=True)
            rows = measure()
            path.write_text(render(rows, "json") + "\n", encoding="utf-8")
    except OSError as error:
        raise FormatError(f"cannot write {error.filename or folder}: {error.strerror or error}") from error
    results = read_all(files)
    written = [*files, *write(results, folder / "report.html")]
    require_plausible(results[0].rows)
    return written
