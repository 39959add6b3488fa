"""The TVM back end: linkers in order, errors with the tool's words, and loading without TVM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.errors import BuildError
from edgeformer.compiler.target import Target, detect


def doubling(name: str = "twice"):
    """A kernel that doubles n floats in place, over all threads."""
    from edgeformer.kernels.shared import tir

    kernel = tir.Kernel(name, [("n", "int64"), ("x", "*float32")])
    with tir.parallel(kernel["n"]) as i:
        tir.store(kernel["x"], i, tir.load(kernel["x"], i) + tir.load(kernel["x"], i))
    return kernel.finish()


@pytest.fixture
def path_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Call with names of programs: they become all that PATH has."""

    def install(*names: str, text: str = "#!/bin/sh\nexit 0\n") -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.delenv("CC", raising=False)

    return install


@pytest.fixture
def ziglang(monkeypatch: pytest.MonkeyPatch):
    return lambda present: monkeypatch.setattr(tvm_llvm, "_has_ziglang", lambda: present)


@pytest.mark.parametrize(
    ("version", "good"),
    [("0.1.14.post0", True), ("0.1.14", True), ("0.1.15", False), ("0.1.15.post2", False), ("1.0", False)],
)
def test_ffi_problem(version: str, good: bool) -> None:
    problem = tvm_llvm.ffi_problem(version)
    assert (problem is None) == good
    assert problem is None or (version in problem and "pip install" in problem)


def test_available_here_and_not_without_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tvm_llvm.available() is None and "apache-tvm=" in tvm_llvm.versions()

    def missing(name: str) -> str:
        raise tvm_llvm.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tvm_llvm.importlib.metadata, "version", missing)
    assert "pip install 'edgeformer[cpu]'" in (tvm_llvm.available() or "")
    for call in (tvm_llvm.versions, lambda: tvm_llvm.compile_module([], detect())):
        with pytest.raises(BuildError, match="pip install"):
            call()


def test_linker_order(path_with, ziglang, monkeypatch: pytest.MonkeyPatch) -> None:
    ziglang(True)
    path_with("clang")
    assert tvm_llvm.linker(detect()) == ["clang"]
    path_with("gcc")
    assert tvm_llvm.linker(detect()) == ["gcc"]
    path_with("cc")
    assert tvm_llvm.linker(detect()) == ["cc"]
    path_with("mycc")
    monkeypatch.setenv("CC", "mycc")
    assert tvm_llvm.linker(detect()) == ["mycc"]
    monkeypatch.setenv("CC", "not-there")
    assert tvm_llvm.linker(detect()) == ["cc"]


def test_without_a_system_compiler_it_is_ziglang_then_nothing(path_with, ziglang) -> None:
    path_with()
    ziglang(True)
    command = tvm_llvm.linker(detect())
    assert command is not None and command[:4] == [sys.executable, "-m", "ziglang", "cc"]
    assert f"{detect().arch}-linux-gnu.2.28" in command
    ziglang(False)
    assert tvm_llvm.linker(detect()) is None


def test_another_architecture_needs_a_cross_linker(path_with, ziglang) -> None:
    other = Target.parse("raspberry-pi-5" if detect().arch == "x86_64" else "x86-64-v3")
    path_with("cc", "gcc")
    ziglang(False)
    assert tvm_llvm.linker(other) is None
    ziglang(True)
    assert f"{other.arch}-linux-gnu.2.28" in (tvm_llvm.linker(other) or [])
    path_with(f"{other.arch}-linux-gnu-gcc")
    assert tvm_llvm.linker(other) == [f"{other.arch}-linux-gnu-gcc"]


def test_a_broken_compiler_is_reported_in_its_own_words(path_with, tmp_path: Path) -> None:
    path_with("cc", text="#!/bin/sh\necho 'ld: cannot find -lmystery' >&2\nexit 1\n")
    with pytest.raises(BuildError, match="cc .*failed: ld: cannot find -lmystery"):
        tvm_llvm.build([doubling()], detect(), tmp_path)


def test_a_compiler_without_space_is_an_os_error(path_with, tmp_path: Path) -> None:
    path_with("cc", text="#!/bin/sh\necho 'final link failed: No space left on device' >&2\nexit 1\n")
    with pytest.raises(OSError, match="no space left"):
        tvm_llvm.build([doubling()], detect(), tmp_path)


def test_a_compiler_that_cannot_start_is_a_build_error(path_with, tmp_path: Path) -> None:
    path_with("cc", text="not a program\n")
    with pytest.raises(BuildError, match="cc could not be run"):
        tvm_llvm.build([doubling()], detect(), tmp_path)


def test_no_linker_is_a_build_error_that_names_two(path_with, ziglang, tmp_path: Path) -> None:
    path_with()
    ziglang(False)
    with pytest.raises(BuildError, match="gcc or clang.*ziglang"):
        tvm_llvm.build([doubling()], detect(), tmp_path)


FULL = """
import sys
from pathlib import Path
from edgeformer.compiler.backends import tvm_llvm
from edgeformer.compiler.target import detect
from edgeformer.kernels.shared import tir
kernel = tir.Kernel("one", [("x", "*float32")])
tir.store(kernel["x"], 0, tir.f32(1.0))
try:
    tvm_llvm.build([kernel.finish()], detect(), Path(sys.argv[1]))
except OSError as error:
    print("still here:", error)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_while_the_object_is_written_does_not_end_the_process(tmp_path: Path) -> None:
    """LLVM calls exit() when its output stream fails, so the object must not go straight to the disk."""
    (tmp_path / "kernels.o").symlink_to("/dev/full")
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "still here: [Errno 28] No space left" in done.stdout, done.stderr


def test_tvm_errors_are_build_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    import tvm

    with pytest.raises(BuildError, match="no LLVM triple for architecture 'riscv99'"):
        tvm_llvm.compile_module([doubling()], dataclasses.replace(detect(), arch="riscv99"))

    def fail(*args: object, **kwargs: object) -> None:
        raise tvm.error.InternalError("cannot allocate a register")

    monkeypatch.setattr(tvm, "compile", fail)
    with pytest.raises(BuildError, match=f"TVM could not compile for {detect().name}: cannot allocate"):
        tvm_llvm.compile_module([doubling()], detect())


def test_inspect_counts_instructions() -> None:
    for name, register in (("znver5", "%zmm"), ("x86-64-v3", "%ymm")):
        from edgeformer.kernels.shared import tir

        lanes = 16 if register == "%zmm" else 8
        kernel = tir.Kernel("add", [("x", "*float32"), ("y", "*float32")])
        tir.store(kernel["y"], 0, tir.load(kernel["x"], 0, lanes) * tir.f32(2.5, lanes))
        inspection = tvm_llvm.inspect([kernel.finish()], Target.parse(name))
        assert register in inspection.assembly and inspection.spills == 0
        assert inspection.count("vmulps") == 1 and inspection.count("vdivps") == 0
        assert inspection.instructions > 4


def test_compiles_for_another_architecture() -> None:
    inspection = tvm_llvm.inspect([doubling()], Target.parse("raspberry-pi-5"))
    assert "\tfadd\t" in inspection.assembly


def test_jit_without_a_linker() -> None:
    import torch

    library = tvm_llvm.JitLibrary(tvm_llvm.compile_module([doubling()], detect()))
    x = torch.ones(5)
    library.function("twice")(5, x.data_ptr())
    assert library.handle is None and x.tolist() == [2.0] * 5


def test_a_damaged_library_is_a_build_error(tmp_path: Path) -> None:
    for content in (b"", b"\x7fELF damaged", b"x" * 5000):
        (tmp_path / "kernels.so").write_bytes(content)
        with pytest.raises(BuildError, match="cannot load"):
            tvm_llvm.load(tmp_path / "kernels.so")
    with pytest.raises(BuildError, match="cannot load"):
        tvm_llvm.load(tmp_path / "not-there.so")


LOAD = """
import sys, warnings
warnings.simplefilter("error", RuntimeWarning)
import torch
from edgeformer.kernels.quant_matmul import CanonicalWeight, WeightFormat, pack
from edgeformer.runtime import launch, ops
torch.manual_seed(0)
weight = CanonicalWeight.from_float(torch.randn(40, 33), WeightFormat.int4())
x = torch.randn(3, 33)
packed = pack(weight)
got, want = ops.quant_matmul(x, packed, form="tvm_cpu"), ops.quant_matmul(x, packed, form="reference")
assert (got - want).norm() / want.norm() < 1e-5
print(*launch.statistics.values(), "tvm" in sys.modules)
"""


@pytest.mark.real
def test_a_fresh_process_loads_what_another_built_without_importing_tvm(cache: Path) -> None:
    results = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", LOAD], capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        results.append(done.stdout.split())
    assert results == [["1", "1", "True"], ["0", "1", "False"]]  # built, loaded, tvm imported
