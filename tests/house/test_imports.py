"""The rules about imports: they go down only, and importing EdgeFormer touches no tool chain or hardware."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgeformer

ROOT = Path(edgeformer.__file__).resolve().parent
ORDER = ("compiler", "kernels", "runtime", "model", "bench")
ABOVE_ALL = {
    "console": len(ORDER),
    "cli_options": len(ORDER),
    "commands": len(ORDER) + 1,
    "cli_device": len(ORDER) + 1,
    "cli_targets": len(ORDER) + 1,
    "cli_tune": len(ORDER) + 1,
}
ABOVE_ALL |= {"cli": len(ORDER) + 2, "__init__": len(ORDER) + 2}


def level(module: str) -> int | None:
    """Return the height of a module by its first part, None for what does not belong to the package."""
    first = module.split(".")[0]
    return ORDER.index(first) if first in ORDER else ABOVE_ALL.get(first)


def imported(path: Path) -> list[tuple[int, str]]:
    """Return (line, package-relative module) of every import of the package's own modules in a file."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            prefix = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            names = [prefix] if prefix else [alias.name for alias in node.names]
            found += [(node.lineno, name) for name in names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "edgeformer":
            found.append((node.lineno, (node.module or "").partition(".")[2] or node.names[0].name))
        elif isinstance(node, ast.Import):
            own = [a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "edgeformer"]
            found += [(node.lineno, name or "__init__") for name in own]
    return found


def upward(root: Path) -> list[str]:
    wrong = []
    for folder in ORDER:
        for path in sorted((root / folder).rglob("*.py")):
            height = ORDER.index(folder)
            for line, module in imported(path):
                target = level(module)
                if target is not None and target > height:
                    wrong.append(f"{path.relative_to(root)}:{line} imports {module}")
    return wrong


def test_imports_go_down_only():
    assert upward(ROOT) == []


def test_an_upward_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "kernels" / "thing").mkdir(parents=True)
    (tmp_path / "kernels" / "thing" / "form.py").write_text(
        "from ...runtime.ops import a\nfrom ...compiler.target import b\nfrom ... import cli\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    found = upward(tmp_path)
    assert [text.split(" imports ")[1] for text in found] == ["runtime.ops", "cli"]


def test_no_init_in_the_top_folders():
    assert [folder for folder in ORDER if (ROOT / folder / "__init__.py").exists()] == []


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )


def test_importing_edgeformer_touches_nothing():
    code = """
import sys
touched = []
def hook(event, arguments):
    if event in ("subprocess.Popen", "os.system", "socket.connect"):
        touched.append(f"{event} {arguments[0]}")
    if event == "open" and str(arguments[0]).startswith(("/sys/", "/proc/", "/dev/")):
        touched.append(str(arguments[0]))
sys.addaudithook(hook)
import edgeformer
heavy = {"tvm", "tvm_ffi", "triton", "torch", "transformers", "onnx", "archspec", "psutil"} & set(sys.modules)
assert not heavy, f"import edgeformer imports {sorted(heavy)}"
assert not touched, f"import edgeformer touches {touched}"
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_the_runtime_and_the_model_import_no_compiler():
    code = """
import sys
import edgeformer.cli, edgeformer.runtime.ops, edgeformer.model.generate
heavy = {"tvm", "triton", "onnx", "transformers"} & set(sys.modules)
assert not heavy, f"imports {sorted(heavy)}"
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
