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
    name="torch-compile", module=__name__, package="torchao",
    install="pip install 'edgeformer[hf]' gguf accelerate torchao",
    imports=("torch", "transformers", "gguf", "accelerate"), packages=("torch", "transformers", "torchao"),
)  # fmt: skip
PLAIN = {"dtype": "bfloat16", "weights": "bfloat16"}
INT8 = {"dtype": "bfloat16", "weights": "int8", "activations": "int8"}


class TorchCompileEngine(ChildEngine):
    """A child process that holds the compiled model."""

    def __init__(self, path: Path, shape: Shape, patience: Patience | None = None, **options: Any) -> None:
        super().__init__(KIND, path, shape, patience, **options)


class TorchCompileRunner(TorchRunner):
    """The model compiled once for prompts and once for steps, weights in bf16 or torchao's int8."""

    settings = (INT8, PLAIN) if importlib.util.find_spec("torchao") else (PLAIN,)

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.caches: dict[tuple[int, int], Any] = {}

    def load(self, threads: int, context: int, batch: int, **options: Any) -> dict[str, Any]:
        about = super().load(threads, context, batch, **options)
        if importlib.util.find_spec("torchao"):
            about["torchao"] = importlib.metadata.version("torchao")
        return about

    def prepare(self, model: Any, setting: dict[str, Any]) -> Any:
        import torch

        if setting["weights"] == "int8":
            quantization: Any = importlib.import_module("torchao.quantization")
            quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
        model.plain_forward = model.forward
        model.forward = torch.compile(model.forward, dynamic=False)
        return model

    def plain(self, model: Any) -> Any:
        return model.plain_forward

    def cache(self, model: Any, batch: int) -> Any:
        """Return an empty static cache: the same one every time, or the compiled steps would not fit it."""
        import torch

        transformers: Any = importlib.import_module("transformers")
        c, key = model.config, (id(model), batch)
        if key not in self.caches:
            self.caches[key] = transformers.StaticCache(config=c, max_cache_len=self.shape[0])
            size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
            self.caches[key].early_initialization(
                batch, c.num_key_value_heads, size, torch.bfloat16, torch.device("cpu")
            )
        self.caches[key].reset()
        return self.caches[key]


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(TorchCompileRunner)
