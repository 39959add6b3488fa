"""What a wheel and a source distribution hold, and that the wheel works where nothing else is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, made by setuptools from a copy of the tree, offline."""
    folder = tmp_path_factory.mktemp("packages")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
    (tree / "bench" / "results").mkdir(exist_ok=True)
    (tree / "bench" / "results" / "planted.json").write_text("[]")
    code = (
        "from setuptools import build_meta\n"
        f"build_meta.build_wheel({str(folder)!r})\nbuild_meta.build_sdist({str(folder)!r})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(built: Path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    own = {name.removeprefix("edgeformer/") for name in names if name.startswith("edgeformer/")}
    for needed in ("__init__.py", "cli.py", "py.typed", "compiler/target.py", "runtime/launcher.c"):
        assert needed in own
    assert any(name.startswith("compiler/targets/") and name.endswith(".yaml") for name in own)
    forbidden = ("tests/", "docs/", "examples/", "bench/results", "build/", ".")
    assert [name for name in own if name.startswith(forbidden)] == []
    assert {"setup.py", "conftest.py"} & own == set()
    others = {name.split("/")[0] for name in names} - {"edgeformer"}
    assert all(name.endswith(".dist-info") for name in others)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_module_of_the_tree_is_in_the_wheel(built: Path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    for folder in ("compiler", "kernels", "runtime", "model", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            if "results" not in path.parts:
                assert f"edgeformer/{path.relative_to(ROOT)}" in names


def test_the_wheel_works_alone(built: Path, tmp_path: Path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    environment = dict(os.environ, PYTHONPATH=str(tmp_path / "site"))
    code = (
        "import edgeformer, edgeformer.cli\n"
        "from edgeformer.compiler.target import known_targets\n"
        "assert known_targets()\nprint(edgeformer.__file__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "site") in result.stdout


def test_the_sdist_can_build_and_test_itself(built: Path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"setup.py", "pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "README.md", "cli.py"}
    assert needed - names == set()
    assert "tests/house/test_packages.py" in names
    assert not any(name.startswith("bench/results") for name in names)
