"""Stored GPU kernels: what a launch hands to the driver, seen by a driver that writes it down."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from edgeformer.compiler.backends import triton_gpu
from edgeformer.compiler.errors import BuildError, UnsupportedError

compiler = shutil.which("cc")
pytestmark = pytest.mark.skipif(compiler is None, reason="no C compiler for the test's driver")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the driver writes to."""
    assert compiler is not None
    library = tmp_path / "driver.so"
    source = Path(__file__).with_name("driver.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True, timeout=60)
    monkeypatch.setenv("EDGEFORMER_TEST_DRIVER_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(triton_gpu, "_driver", lambda name: ctypes.CDLL(str(library)))
    return tmp_path / "log"


def stored(folder: Path, binary: str, shared: int = 1024, name: str = "kernel_name") -> Path:
    """A folder as `build` writes it."""
    pointers, sizes = ["a_ptr", "b_ptr", "y_ptr"], ["columns", "a_st", "rows"]
    metadata = {
        "name": name, "architecture": "any", "binary": binary, "shared_bytes": shared, "threads": 128,
        "arguments": [[p, "*fp16"] for p in pointers] + [[s, "i32"] for s in sizes],
        "multiples_of_16": [*pointers, "columns", "a_st"], "hidden_pointers": 2, "global_scratch_bytes": 0,
        "constants": {}, "versions": "triton 3.9.0",
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "kernel.json").write_text(json.dumps(metadata))
    (folder / binary).write_bytes(b"\x7fELF")
    return folder


@pytest.mark.parametrize("binary", ["kernel.cubin", "kernel.hsaco"])
def test_a_launch_hands_over_every_argument(log: Path, tmp_path: Path, binary: str) -> None:
    kernel = triton_gpu.load(stored(tmp_path / "k", binary))
    kernel((3, 2, 1), 0xABC0, 0x7F0000001000, 0x7F0000002000, 0x7F0000003000, 4096, -16, 7)
    lines = log.read_text().splitlines()
    context = ["init 0", "context 0x1005"] if binary.endswith("cubin") else []
    assert lines == [
        *context, "load ELF", "function 0x77 kernel_name",
        "launch 0x88 3 2 1 128 1 1 1024 0xabc0 0x7f0000001000 0x7f0000002000 0x7f0000003000 4096 -16 7 "
        "(nil) (nil)",
    ]  # fmt: skip


def test_much_shared_memory_is_asked_for(log: Path, tmp_path: Path) -> None:
    triton_gpu.load(stored(tmp_path / "k", "kernel.cubin", 100 << 10))
    assert log.read_text().splitlines()[-1] == f"attribute 0x88 8 {100 << 10}"


def test_what_the_code_does_not_take_is_refused(log: Path, tmp_path: Path) -> None:
    kernel = triton_gpu.load(stored(tmp_path / "k", "kernel.hsaco"))
    with pytest.raises(TypeError, match="takes 6 arguments, not 1"):
        kernel((1, 1, 1), 0, 16)
    with pytest.raises(UnsupportedError, match="b_ptr=40 is no multiple of 16"):
        kernel((1, 1, 1), 0, 16, 40, 16, 16, 16, 1)
    with pytest.raises(UnsupportedError, match="columns=17"):
        kernel((1, 1, 1), 0, 16, 16, 16, 17, 16, 1)
    assert "launch" not in log.read_text()
    with pytest.raises(BuildError, match="hipModuleGetFunction of missing failed with code 500"):
        triton_gpu.load(stored(tmp_path / "k", "kernel.hsaco", name="missing"))


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="compiles with Triton, which is not installed or interprets",
)
@pytest.mark.parametrize("arch", ["gfx942", "sm_90"])
def test_a_built_kernel_loads_without_triton(log: Path, tmp_path: Path, arch: str) -> None:
    from edgeformer.kernels.gated_silu.triton_kernel import gated_silu_forward

    types: dict[str, str] = dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("columns", "gate_st", "up_st"), "i32")
    even = ("columns", "gate_st", "up_st")
    kernel = triton_gpu.KernelBuild("k", gated_silu_forward, types, {"BLOCK": 1024}, {"num_warps": 4}, even)
    triton_gpu.build(kernel, arch, tmp_path)
    threads = 4 * triton_gpu.ARCHITECTURES[arch].lanes
    triton_gpu.load(tmp_path)((5, 1, 1), 0, 32, 48, 64, 4096, 4096, 8192)
    *_, function, launch = log.read_text().splitlines()
    assert function == "function 0x77 gated_silu_forward"
    assert launch.startswith(f"launch 0x88 5 1 1 {threads} 1 1 ")
    assert launch.endswith("0x20 0x30 0x40 4096 4096 8192 (nil) (nil)")
