"""Device profiles: every file's schema, sources for every figure, and the targets that come of them."""

from __future__ import annotations

import datetime
from importlib import resources
from typing import Any

import pytest

from edgeformer.bench import readme_devices
from edgeformer.compiler.devices import BACKENDS, known_devices
from edgeformer.compiler.errors import FormatError, TargetError
from edgeformer.compiler.target import PROOFS, Target, known_targets, parse_target_file

FOLDER = resources.files("edgeformer.compiler") / "targets" / "devices"
FILES = sorted((entry for entry in FOLDER.iterdir() if entry.name.endswith(".yaml")), key=lambda e: e.name)
WANTED = {
    "ryzen-7-7840u", "ryzen-ai-max-395", "ryzen-5-5500u", "rx-7900-xtx", "rx-9070-xt", "mi300x",
    "core-ultra-7-155h", "core-i5-8250u", "xeon-platinum-8480", "arc-b580", "raspberry-pi-4",
    "raspberry-pi-5", "jetson-agx-orin", "snapdragon-x-elite", "graviton3", "graviton4", "rk3588", "apple-m2",
    "epyc-9655", "h200",
}  # fmt: skip
CORES = {"name", "count", "threads", "mhz", "l1d", "l2", "l2_shared_by", "from"}


def proven(part: dict[str, Any]) -> None:
    proof = part["proof"]
    assert set(proof) == {"level", "date", "command"}
    assert proof["level"] in PROOFS and type(proof["date"]) is datetime.date
    assert proof["command"].startswith(("edgeformer ", "python -m "))


def figures(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Every row that holds figures."""
    cpu, gpu = data.get("cpu", {}), data.get("gpu", {})
    found = [*cpu.get("cores", []), cpu.get("l3"), gpu.get("units"), gpu.get("l2"), data["memory"]]
    return [row for row in found if row is not None]


@pytest.mark.parametrize("entry", FILES, ids=lambda entry: entry.name.removesuffix(".yaml"))
def test_a_profile_is_whole_and_every_figure_has_its_source(entry: Any) -> None:
    data = parse_target_file(entry)
    assert set(data) <= {"name", "device", "cpu", "gpu", "memory", "backends", "sources"}
    assert entry.name == f"{data['name']}.yaml" and data["device"]
    assert ("cpu" in data) or ("gpu" in data)
    used = set()
    for row in figures(data):
        assert row["from"], row
        used |= set(row["from"])
        assert all(
            type(v) is int and v > 0 for k, v in row.items() if k not in ("from", "name", "of", "type")
        )
    assert used == set(data["sources"])
    assert all(url.startswith("https://") for url in data["sources"].values())
    assert set(data["memory"]) <= {"type", "bits", "bytes_per_second", "bytes", "from"}
    assert data["backends"][-1] == "torch" and set(data["backends"]) <= set(BACKENDS)
    if "cpu" in data:
        proven(data["cpu"])
        assert set(data["cpu"]) <= {"target", "mcpu", "proof", "cores", "l3"}
        assert data["cpu"]["target"] in known_targets() and "tvm_llvm" in data["backends"]
        for cores in data["cpu"]["cores"]:
            assert set(cores) == CORES and cores["threads"] in (cores["count"], 2 * cores["count"])
            assert cores["l1d"] >= 8192
            assert cores["l1d"] < cores["l2"] <= 64 << 20
            assert cores["count"] % cores["l2_shared_by"] == 0 and 1000 <= cores["mhz"] <= 6500
        speeds = [cores["mhz"] for cores in data["cpu"]["cores"]]
        assert speeds == sorted(speeds, reverse=True)  # the big ones first
    if "gpu" in data:
        proven(data["gpu"])
        assert set(data["gpu"]) <= {"name", "arch", "proof", "units", "l2"}


@pytest.mark.parametrize("entry", FILES, ids=lambda entry: entry.name.removesuffix(".yaml"))
def test_bandwidth_is_what_the_memory_gives(entry: Any) -> None:
    """Where the type names its rate: bits / 8 times transfers a second, as published to 5%."""
    memory = parse_target_file(entry)["memory"]
    rate = memory["type"].rpartition("-")[2]
    if rate.isdigit():
        peak = memory["bits"] / 8 * int(rate) * 1e6
        assert memory["bytes_per_second"] == pytest.approx(peak, rel=0.05)
    assert 5e9 < memory["bytes_per_second"] < 10e12


def test_the_devices_that_we_promise_are_there() -> None:
    assert {device.name for device in known_devices()} >= WANTED


@pytest.mark.parametrize("device", known_devices(), ids=lambda device: device.name)
def test_a_name_is_a_target_where_there_is_a_cpu(device: Any) -> None:
    if device.cpu is None:
        with pytest.raises(TargetError, match=r"is a GPU.*edgeformer targets"):
            Target.parse(device.name)
        return
    target, base = Target.parse(device.name), Target.parse(device.cpu.target)
    assert target.name == device.name and target.features == base.features and target.isa == base.isa
    if device.name not in known_targets():
        assert target.cores == sum(cores.count for cores in device.cpu.cores)
        assert target.l1d == device.cpu.cores[0].l1d and target.proof == device.cpu.proof.level
    order = list(PROOFS)
    assert order.index(device.cpu.proof.level) >= order.index(base.proof)  # no more than its code was shown


def test_llvm_knows_the_cpus_of_devices() -> None:
    import tvm
    from tvm.target import codegen

    for device in known_devices():
        target = device.target()
        if target is not None:
            llvm = tvm.target.Target({"kind": "llvm", "mtriple": f"{target.arch}-linux-gnu"})
            assert target.mcpu in {str(name) for name in codegen.llvm_get_cpu_archlist(llvm)}, device.name


def test_a_misspelt_device_is_refused_with_close_names() -> None:
    with pytest.raises(TargetError, match="Did you mean.*ryzen-7-7840u"):
        Target.parse("ryzen-7-7840")


def test_the_table_in_the_docs_is_what_the_profiles_say() -> None:
    path = readme_devices.ROOT / "docs" / "devices.md"
    text = path.read_text(encoding="utf-8")
    assert readme_devices.replaced(text, readme_devices.section(known_devices())) == text, (
        "run python -m edgeformer.bench.readme_devices --file docs/devices.md"
    )


def test_the_readme_table_has_every_device_once() -> None:
    made = readme_devices.section(known_devices())
    assert len(made.splitlines()) == 2 + len(known_devices())
    assert all(made.count(f"(`{device.name}`)") == 1 for device in known_devices())
    text = f"before\n{readme_devices.BEGIN}\nold\n{readme_devices.END}\nafter\n"
    assert readme_devices.replaced(text, made).splitlines()[3] == made.splitlines()[0]
    with pytest.raises(FormatError, match="no markers"):
        readme_devices.replaced("nothing", made)
