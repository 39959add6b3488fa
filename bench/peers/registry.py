"""The peers that can be measured beside EdgeFormer."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from ...compiler.errors import UnsupportedError
from ..child import ChildEngine, Patience, Shape

PEERS = {
    "llama.cpp": ("llama_cpp", "LlamaCppEngine"),
    "openvino": ("openvino", "OpenVinoEngine"),
    "onnxruntime": ("onnxruntime", "OnnxRuntimeEngine"),
    "torch": ("torch_eager", "TorchEngine"),
    "torch-compile": ("torch_compile", "TorchCompileEngine"),
}


def check_peers(names: Sequence[str]) -> None:
    """Raise UnsupportedError for a name that no peer has."""
    for name in names:
        if name not in PEERS:
            raise UnsupportedError(f"unknown peer {name!r}; peers: {', '.join(PEERS)}")


def open_peer(
    name: str, path: Path, shape: Shape, patience: Patience | None = None, target: str = "auto"
) -> ChildEngine:
    """Load a model in a peer. Raises UnsupportedError (not installed, unfit build) or EngineError.

    `target` is what EdgeFormer compiles for: a peer that is built for one instruction set has to use it.
    """
    check_peers([name])
    module, engine = PEERS[name]
    found = importlib.import_module(f"..peers.{module}", __package__)
    options = {"target": target} if name == "llama.cpp" else {}
    return getattr(found, engine)(path, shape, patience, **options)
