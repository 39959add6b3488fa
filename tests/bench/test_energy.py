"""Energy counters: wrap-around, missing, forbidden; and never zero for what is not known."""

from __future__ import annotations

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
    assert (meter.status, meter.source) == ("measured", "RAPL package-0, dram")
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
        raise PermissionError(13, "Permission denied", str(self.path / "energy_uj"))

    monkeypatch.setattr(Counter, "read", refuse)
    meter = Meter(tmp_path)
    assert meter.status == "unavailable"
    assert "no permission to read" in meter.source and "energy_uj" in meter.source


def test_a_damaged_counter_is_unavailable(tmp_path: Path):
    (domain(tmp_path, "intel-rapl:0", "package-0", 1) / "max_energy_range_uj").write_text("?")
    assert Meter(tmp_path).status == "unavailable"


def test_a_row_tells_measured_estimated_or_unavailable():
    measured = energy_of([2.0, 4.0, None, 3.0], [1.0], 10, "RAPL package-0", 65.0)
    assert measured == {"status": "measured", "source": "RAPL package-0", "joules_per_token": 0.3}
    estimated = energy_of([None], [2.0], 10, "none", 65.0)
    assert (estimated["status"], estimated["joules_per_token"]) == ("estimated", 13.0)
    unknown = energy_of([None], [2.0], 10, "no permission", None)
    assert unknown == {"status": "unavailable", "source": "no permission", "joules_per_token": None}
