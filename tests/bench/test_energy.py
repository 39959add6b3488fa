"""Energy counters: wrap-around, missing, forbidden; and never zero for what is not known."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import pytest

from edgeformer.bench.energy import Clock, Counter, Meter, energy_of


def domain(root: Path, name: str, kind: str, energy: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{kind}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text("1000000000\n")
    return folder


def test_packages_and_memory_are_added_and_wrap(tmp_path: Path):
    package = domain(tmp_path, "intel-rapl:0", "package-0", 999_000_000)
    domain(tmp_path, "intel-rapl:0:0", "core", 5)
    memory = domain(tmp_path, "intel-rapl:0:1", "dram", 1_000_000)
    meter = Meter(tmp_path)
    assert (meter.status, meter.source) == ("measured", "RAPL package-0, RAPL dram")
    clock = Clock(meter)
    with clock:
        (package / "energy_uj").write_text("2000000")
        (memory / "energy_uj").write_text("1500000")
    assert clock.joules == pytest.approx(3.0 + 0.5)
    assert clock.seconds > 0


def test_no_counter_says_so(tmp_path: Path):
    meter = Meter(tmp_path / "nothing")
    assert meter.status == "unavailable"
    assert "no energy counter" in meter.source
    with Clock(meter) as clock:
        pass
    assert clock.joules is None


def test_no_permission_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    domain(tmp_path, "intel-rapl:0", "package-0", 1)

    def refuse(self: Counter) -> int:
        raise PermissionError(13, "Permission denied", str(self.path))

    monkeypatch.setattr(Counter, "read", refuse)
    meter = Meter(tmp_path)
    assert meter.status == "unavailable"
    assert "no permission to read" in meter.source and "energy_uj" in meter.source


def test_a_damaged_counter_is_unavailable(tmp_path: Path):
    (domain(tmp_path, "intel-rapl:0", "package-0", 1) / "max_energy_range_uj").write_text("?")
    assert Meter(tmp_path).status == "unavailable"


def intel_card(root: Path, energy: int) -> Path:
    folder = root / "card0" / "device" / "hwmon" / "hwmon3"
    folder.mkdir(parents=True)
    (folder / "name").write_text("xe\n")
    (folder / "energy1_input").write_text(f"{energy}\n")
    return folder / "energy1_input"


def test_an_intel_gpu_counts_with_its_host(tmp_path: Path):
    package = domain(tmp_path / "powercap", "intel-rapl:0", "package-0", 1_000_000)
    card = intel_card(tmp_path / "drm", 5_000_000)
    meter = Meter(tmp_path / "powercap", "Intel(R) Arc(TM) B580 Graphics", tmp_path / "drm")
    assert meter.source == "xe of Intel(R) Arc(TM) B580 Graphics, RAPL package-0"
    with Clock(meter) as clock:
        card.write_text("9000000")
        (package / "energy_uj").write_text("1500000")
    assert clock.joules == pytest.approx(4.0 + 0.5)


@pytest.mark.parametrize(
    ("gpu", "told"),
    [
        ("NVIDIA GeForce RTX 4090", "NVML lists no GPU of that name"),
        ("Intel(R) UHD Graphics 770", "energy1_input"),
        ("AMD Radeon 780M", "none that is known here"),
    ],
)
def test_work_on_a_gpu_without_a_counter_is_not_its_hosts(
    gpu: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "pynvml", nvml({}))
    domain(tmp_path / "powercap", "intel-rapl:0", "package-0", 1)
    meter = Meter(tmp_path / "powercap", gpu, tmp_path / "drm")
    assert (meter.status, meter.read()) == ("unavailable", None)
    assert gpu in meter.source and told in meter.source


def test_without_nvml_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'edgeformer[energy]'" in Meter(tmp_path, "NVIDIA L4").source


def nvml(cards: dict[str, int | None]) -> types.ModuleType:
    """NVML's Python module on GPUs of these names and millijoules (None: it has no counter)."""
    module = types.ModuleType("pynvml")
    module.__spec__ = importlib.machinery.ModuleSpec("pynvml", None)
    error = type("NVMLError", (Exception,), {})

    def energy(name: str) -> int:
        if (found := cards[name]) is None:
            raise error("Not Supported")
        return found

    vars(module).update(
        NVMLError=error, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: len(cards),
        nvmlDeviceGetHandleByIndex=lambda i: list(cards)[i], nvmlDeviceGetName=lambda handle: handle,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )  # fmt: skip
    return module


def test_an_nvidia_gpu_is_read_through_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cards: dict[str, int | None] = {"NVIDIA L4": 10, "NVIDIA H200": 20_000, "NVIDIA T4": None}
    monkeypatch.setitem(sys.modules, "pynvml", nvml(cards))
    meter = Meter(tmp_path, "NVIDIA H200")
    assert (meter.status, meter.source) == ("measured", "NVML of NVIDIA H200")
    with Clock(meter) as clock:
        cards |= {"NVIDIA H200": 27_500, "NVIDIA L4": 99_999}
    assert clock.joules == pytest.approx(7.5)
    assert "Not Supported" in Meter(tmp_path, "NVIDIA T4").source


def test_a_row_tells_measured_estimated_or_unavailable():
    measured = energy_of([2.0, 4.0, None, 3.0], [1.0], 10, "RAPL package-0", 65.0)
    assert measured == {"status": "measured", "source": "RAPL package-0", "joules_per_token": 0.3}
    estimated = energy_of([None], [2.0], 10, "none", 65.0)
    assert (estimated["status"], estimated["joules_per_token"]) == ("estimated", 13.0)
    unknown = energy_of([None], [2.0], 10, "no permission", None)
    assert unknown == {"status": "unavailable", "source": "no permission", "joules_per_token": None}
