"""torch.compile (Inductor) over the model of transformers, with a static cache; int8 by torchao."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

from ..child import ChildEngine, EngineKind, Patience, Shape, serve
from .torch_eager import TorchRunner

KIND = EngineKind(
    name="torch-compile", module=__name__, package="torchao", install="pip install transformers gguf torchao",
    imports=("torch", "transformers", "gguf"), packages=("torch", "transformers", "torchao"),
)  # fmt: skip
PLAIN = {"dtype": "bfloat16", "weights": "bfloat16"}
INT8 = {"dtype": "bfloat16", "weights": "int8"}


class TorchCompileEngine(ChildEngine):
    """A child process that holds the compiled model."""

    def __init__(self, path: Path, shape: Shape, patience: Patience | None = None, **options: Any) -> None:
        super().__init__(KIND, path, shape, patience, **options)


class TorchCompileRunner(TorchRunner):
    """The model compiled once for prompts and once for steps, weights in bf16 or torchao's int8."""

    settings = (INT8, PLAIN) if importlib.util.find_spec("torchao") else (PLAIN,)
    static_cache = True

    def load(self, threads: int, context: int, batch: int, **options: Any) -> dict[str, Any]:
        about = super().load(threads, context, batch, **options)
        if importlib.util.find_spec("torchao"):
            about["torchao"] = importlib.metadata.version("torchao")
        return about

    def prepare(self, model: Any, setting: dict[str, Any]) -> Any:
        import torch

        if setting["weights"] == "int8":
            quantization: Any = importlib.import_module("torchao.quantization")
            quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        model.forward = torch.compile(model.forward, dynamic=False)
        return model


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(TorchCompileRunner)
