"""Tests on an OpenCL device (PoCL in CI); without one they are skipped, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeformer.compiler.backends import opencl_device
from edgeformer.compiler.target import Target


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The session of the first OpenCL device."""
    if reason := opencl_device.missing():
        pytest.skip(reason)
    from edgeformer.runtime.opencl import session

    return session("opencl")


@pytest.fixture
def target(device: Any) -> Target:
    """The first device's target."""
    return opencl_device.target()


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, so that a device is verified anew; where its marks will be."""
    monkeypatch.setenv("EDGEFORMER_CACHE_DIR", str(tmp_path))
    return tmp_path / "opencl-devices.json"
