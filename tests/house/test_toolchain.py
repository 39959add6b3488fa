"""The tool chain's versions: a broken apache-tvm-ffi fails here with the reason, not later with a crash."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIX = "pip install apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post0"

SAVE_AND_TENSORIZE = """
import tvm
from tvm import s_tir, te
a = te.placeholder((16, 16), name="A")
b = te.compute((16, 16), lambda i, j: a[i, j] + 1.0, name="B")
function = te.create_prim_func([a, b])
text = tvm.ir.save_json(function)
assert tvm.ir.load_json(text) is not None
"""


def test_the_installed_ffi_is_the_pinned_one():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for pin in extras["cpu"]:
        name, _, version = pin.partition("==")
        installed = importlib.metadata.version(name)
        assert installed == version, f"{name} is {installed}, EdgeFormer needs {version}: {FIX}"


@pytest.mark.real
def test_saving_ir_as_json_does_not_crash():
    """apache-tvm-ffi 0.1.15 dies here with a segmentation fault (a plain compile still works with it)."""
    result = subprocess.run(
        [sys.executable, "-c", SAVE_AND_TENSORIZE], capture_output=True, text=True, timeout=120, check=False
    )
    version = importlib.metadata.version("apache-tvm-ffi")
    assert result.returncode == 0, (
        f"apache-tvm-ffi {version} is broken (exit {result.returncode}): {FIX}\n{result.stderr[-2000:]}"
    )


def test_a_broken_ffi_is_named_with_its_remedy():
    from edgeformer.compiler.backends import tvm_llvm

    assert tvm_llvm.ffi_problem("0.1.14.post0") is None
    for broken in ("0.1.15", "0.1.15.post2", "0.2.0"):
        problem = tvm_llvm.ffi_problem(broken)
        assert problem is not None
        assert broken in problem
        assert "pip install" in problem


def test_constraints_pin_what_the_extras_pin():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split(";")[0].split("==") for line in lines if line and not line.startswith("#"))
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    assert pins["torch"] == "2.13.0"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for requirement in (r for group in extras.values() for r in group if "==" in r and ";" not in r):
        name, _, version = requirement.partition("==")
        assert pins[re.sub(r"[-_.]+", "-", name).lower()] == version
