"""Target: names, detection within the process's limits, and the shipped data."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeformer.compiler import target as target_module
from edgeformer.compiler.errors import BuildError, TargetError
from edgeformer.compiler.target import (
    ISA_FEATURES,
    PROOFS,
    Target,
    available_cores,
    available_memory,
    detect,
    known_targets,
)

AMX_FEATURES = {"amx_tile", "amx_int8", "amx_bf16"}
IMPOSSIBLE = dataclasses.replace(detect(), name="imaginary", features=detect().features | {"teleport"})


def test_parse_returns_names_targets_and_the_host() -> None:
    znver5 = Target.parse("znver5")
    assert znver5.isa == "avx512_vnni" and Target.parse(znver5) is znver5
    assert Target.parse("auto") is detect() and Target.parse("host") is detect()
    assert Target.parse("sapphirerapids").isa == "amx"
    assert Target.parse("x86-64-v3").isa == "avx2" and Target.parse("x86-64-v2").isa == "portable"


@pytest.mark.parametrize(("wrong", "close"), [("znver55", "znver5"), ("haswel", "haswell"), ("aut", "auto")])
def test_an_unknown_name_is_refused_with_close_ones(wrong: str, close: str) -> None:
    with pytest.raises(TargetError, match=f"{wrong}.*Did you mean.*{close}.*edgeformer targets"):
        Target.parse(wrong)


def test_directml_is_a_target_of_compile_alone() -> None:
    with pytest.raises(TargetError, match="compile --target directml"):
        Target.parse("directml")


@pytest.mark.parametrize("wrong", ["", "???", "../znver5", "x" * 10_000])
def test_an_unknown_name_without_a_close_one(wrong: str) -> None:
    with pytest.raises(TargetError, match="Unknown target"):
        Target.parse(wrong)


def test_a_target_is_frozen_and_hashable() -> None:
    target = detect()
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.isa = "avx2"  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(target) == hash(dataclasses.replace(target))


def test_with_isa_changes_the_key_and_not_the_original() -> None:
    target = Target.parse("znver5")
    portable = target.with_isa("portable")
    assert target.isa == "avx512_vnni" and portable.isa == "portable"
    assert portable.key() != target.key() and portable != target


def test_what_this_host_cannot_run_is_refused_with_what_is_missing() -> None:
    detect().require_runnable()
    with pytest.raises(TargetError, match="imaginary needs teleport.*lacks.*auto"):
        IMPOSSIBLE.require_runnable()
    other = "aarch64" if detect().arch == "x86_64" else "x86_64"
    with pytest.raises(TargetError, match=f"architecture {other}"):
        dataclasses.replace(detect(), arch=other).require_runnable()


def test_detected_target_is_complete() -> None:
    host = detect()
    assert host.features and host.mcpu and host.cores >= 1
    assert host.isa in {name for name, _ in ISA_FEATURES}
    assert host.l1d >= 4 << 10 and host.l2 >= host.l1d


def features_of(name: str) -> frozenset[str]:
    return Target.parse(name).features


@pytest.mark.parametrize(
    ("name", "features", "refused", "want"),
    [
        ("sapphirerapids", features_of("sapphirerapids"), "", ("host-sapphirerapids", "amx")),
        ("granite_rapids", features_of("sapphirerapids"), "", ("host-granite_rapids", "amx")),
        ("sapphirerapids", features_of("sapphirerapids"), "no", ("host-sapphirerapids", "avx512_vnni")),
        # A virtual machine that hides a feature: archspec names an older CPU, with that one's features.
        ("icelake", features_of("icelake-server"), "", ("host-sapphirerapids", "amx")),
        ("icelake", features_of("icelake-server"), "no", ("host-icelake", "avx512_vnni")),
    ],
)
def test_amx_is_taken_only_where_the_kernel_grants_it(
    name: str, features: frozenset[str], refused: str, want: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import archspec.cpu

    before = [SimpleNamespace(name="sapphirerapids")] if name == "granite_rapids" else []
    seen = SimpleNamespace(vendor="GenuineIntel", features=features_of("sapphirerapids"))
    host = SimpleNamespace(name=name, features=features, ancestors=before)
    monkeypatch.setattr(archspec.cpu, "host", lambda: host)
    monkeypatch.setattr(archspec.cpu.detect, "detected_info", lambda: seen)
    monkeypatch.setattr(target_module, "amx_refused", lambda: refused)
    found = detect.__wrapped__()
    assert (found.name, found.isa) == want
    amx = {feature for feature in found.features if feature.startswith("amx")}
    assert amx == (set() if refused else AMX_FEATURES)
    assert features_of("sapphirerapids") - found.features == (AMX_FEATURES if refused else set())


def test_the_kernel_is_not_asked_for_tiles_that_the_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    import archspec.cpu

    def asked() -> str:
        raise AssertionError("asked for tile registers")

    host = SimpleNamespace(name="zen5", vendor="", features=features_of("znver5"), ancestors=[])
    monkeypatch.setattr(archspec.cpu, "host", lambda: host)
    monkeypatch.setattr(archspec.cpu.detect, "detected_info", lambda: host)
    monkeypatch.setattr(target_module, "amx_refused", asked)
    assert detect.__wrapped__().isa == "avx512_vnni"


@pytest.mark.parametrize(
    ("micro", "hidden", "seen_as", "want"),
    [
        ("zen4", {"pku", "flush_l1d"}, "x86_64_v4", "zen4"),
        ("zen3", {"pku"}, "zen2", "zen3"),
        ("zen4", {"avx512_vnni"}, "zen3", "zen3"),
        ("sapphirerapids", {"cldemote", "waitpkg"}, "icelake", "sapphirerapids"),
        ("zen4", set[str](), "zen4", "zen4"),
    ],
)
def test_a_virtual_machine_may_hide_what_kernels_do_not_use(
    micro: str, hidden: set[str], seen_as: str, want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import archspec.cpu

    whole = archspec.cpu.TARGETS[micro]
    seen = SimpleNamespace(vendor=whole.vendor, features=whole.features - hidden)
    monkeypatch.setattr(archspec.cpu, "host", lambda: archspec.cpu.TARGETS[seen_as])
    monkeypatch.setattr(archspec.cpu.detect, "detected_info", lambda: seen)
    monkeypatch.setattr(target_module, "amx_refused", lambda: "")
    found = detect.__wrapped__()
    assert found.name == f"host-{want}"
    assert not found.features & hidden


def test_system_instructions_alone_make_no_other_cpu() -> None:
    import archspec.cpu

    for micro in archspec.cpu.TARGETS.values():
        for before in micro.parents:
            if micro.vendor == before.vendor != "generic":
                added = micro.features - before.features
                assert not added or added - target_module._SYSTEM, f"{micro.name} beside {before.name}"


def test_a_refusal_of_tiles_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    calls: list[tuple[int, ...]] = []

    def syscall(*arguments: int) -> int:
        calls.append(arguments)
        return answers.pop()

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(syscall=syscall))
    monkeypatch.setattr(ctypes, "get_errno", lambda: 95)
    answers = [-1, 0]
    assert target_module.amx_refused.__wrapped__() == ""
    assert "refuses tile registers: " + os.strerror(95) in target_module.amx_refused.__wrapped__()
    assert set(calls) == {(158, 0x1023, 18)}  # arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    monkeypatch.setattr(sys, "platform", "win32")
    assert "Linux only" in target_module.amx_refused.__wrapped__()
    assert len(calls) == 2


def test_arm_features_are_those_that_the_kernel_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not cpuinfo's, which an emulator may show of the machine below it."""
    import ctypes

    import archspec.cpu

    class Ask:
        def __call__(self, entry: int) -> int:
            return {16: 1 << 1 | 1 << 20, 26: 1 << 13}[entry]

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(target_module.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(archspec.cpu.detect, "detected_info", lambda: SimpleNamespace(features=set()))
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: SimpleNamespace(getauxval=Ask()))
    assert target_module._cpu_features() == {"asimd", "asimddp", "i8mm"}
    assert target_module._isa_for(target_module._cpu_features()) == "i8mm"


def test_cores_respect_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(target_module, "_cgroup_numbers", lambda name: [])
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    for usable, cores in ((1, 1), (2, 1), (3, 2), (16, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=usable: set(range(n)), raising=False)
        assert available_cores() == cores
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)  # containers may hide the topology
    assert available_cores() == 16


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000", 8),
        ("300000 100000", 3),
        ("50000 100000", 1),
        ("900000 100000", 8),
        ("nonsense", 8),
        ("", 8),
    ],
)
def test_cores_respect_the_cgroup(text: str, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(Path, "read_text", lambda self: text)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert available_cores() == cores


def test_memory_respects_the_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    free = available_memory()
    limits = {"memory.max": [1000], "memory.current": [400]}
    monkeypatch.setattr(target_module, "_cgroup_numbers", limits.get)
    assert available_memory() == 600
    monkeypatch.setattr(target_module, "_cgroup_numbers", {"memory.max": [], "memory.current": [400]}.get)
    assert available_memory() > 1000 and free > 1000
    monkeypatch.setattr(target_module, "_cgroup_numbers", {"memory.max": [10], "memory.current": [400]}.get)
    assert available_memory() == 0


@pytest.mark.parametrize("name", known_targets())
def test_shipped_data(name: str) -> None:
    target = Target.parse(name)
    assert target.name == name and target.arch in ("x86_64", "aarch64")
    assert 8 << 10 <= target.l1d <= 1 << 20 and target.l1d < target.l2 <= 64 << 20 and target.l3 >= 0
    assert target.backends[0] == "tvm_llvm" and target.backends[-1] == "torch"
    assert dict(ISA_FEATURES)[target.isa] <= target.features and target.proof in PROOFS
    wanted = {"raspberry-pi-4": "neon", "raspberry-pi-5": "dotprod", "alderlake": "avx_vnni"}
    wanted |= {"x86-64-v4": "avx512", "x86-64-v3": "avx2"}
    assert target.isa == wanted.get(name, target.isa)


@pytest.mark.parametrize(("isa", "lacking"), [("avx512_vnni", "avx512_vnni"), ("dotprod", "asimddp")])
def test_an_instruction_that_a_target_lacks_never_reaches_llvm(isa: str, lacking: str) -> None:
    """It would end the process."""
    from edgeformer.compiler.backends import tvm_llvm

    target = Target.parse("x86-64-v3" if isa.startswith("avx") else "raspberry-pi-4").with_isa(isa)
    with pytest.raises(BuildError, match=f"lacks .*{lacking}.*{isa} kernels"):
        tvm_llvm.compile_module([], target)


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("znver4", "vpdpbusd"),
        ("icelake-server", "vpdpbusd"),
        ("alderlake", "vpdpbusd"),
        ("haswell", "vpmaddubsw"),
    ],
)
def test_an_instruction_that_a_cpu_of_an_unknown_name_has_is_used(name: str, instruction: str) -> None:
    """A virtual machine may hide a part of a newer name; then LLVM knew no int8 dot product, and ended."""
    from edgeformer.compiler.backends import tvm_llvm
    from edgeformer.kernels.quant_matmul import OPERATOR, QuantMatmulSpec, WeightFormat

    target = dataclasses.replace(Target.parse(name), mcpu="x86-64-v2")
    form = OPERATOR.form("tvm_cpu")
    spec = QuantMatmulSpec(64, 64, WeightFormat.int4(), "int8")
    assert form.lower is not None
    functions = form.lower(spec, form.space(spec, target)[0], target)
    assert tvm_llvm.inspect(functions, target).count(instruction) > 0


def test_a_misspelt_cpu_is_refused_with_close_names() -> None:
    from edgeformer.compiler.backends import tvm_llvm

    target = dataclasses.replace(Target.parse("raspberry-pi-5"), mcpu="cortex-a67")
    with pytest.raises(TargetError, match="no aarch64 CPU 'cortex-a67'. Did you mean cortex-a"):
        tvm_llvm.compile_module([], target)


def test_a_missing_cross_linker_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeformer.compiler.backends import tvm_llvm

    monkeypatch.setattr(tvm_llvm, "_has_ziglang", lambda: False)
    monkeypatch.setattr(tvm_llvm.shutil, "which", lambda name: None)
    other = Target.parse("raspberry-pi-5" if detect().arch == "x86_64" else "x86-64-v3")
    assert tvm_llvm.linker(other) is None
    assert "pip install ziglang" in tvm_llvm.no_linker(other) and other.arch in tvm_llvm.no_linker(other)


def _llvm_cpus(arch: str) -> set[str]:
    import tvm
    from tvm.target import codegen

    return {
        str(n)
        for n in codegen.llvm_get_cpu_archlist(
            tvm.target.Target({"kind": "llvm", "mtriple": f"{arch}-linux-gnu"})
        )
    }


def test_llvm_knows_every_cpu_that_can_be_detected_or_named() -> None:
    """An unknown name makes LLVM generate code for a generic CPU, without the ISA entry's instructions."""
    import archspec.cpu

    known = {arch: _llvm_cpus(arch) for arch in ("x86_64", "aarch64")}
    for name, micro in archspec.cpu.TARGETS.items():
        if (arch := str(micro.family)) in known:
            assert target_module._llvm_name(name) in known[arch], f"archspec's {name}"
    for name in known_targets():
        assert Target.parse(name).mcpu in known[Target.parse(name).arch], name


def test_feature_names_are_those_of_linux() -> None:
    """A misspelt feature would refuse the target on a CPU that has it."""
    import archspec.cpu

    spelt = {feature for target in archspec.cpu.TARGETS.values() for feature in target.features}
    spelt |= {"asimd", "asimddp", "popcnt"}
    for name in known_targets():
        target = Target.parse(name)
        assert target.features <= spelt, (name, target.features - spelt)
