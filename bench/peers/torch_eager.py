"""PyTorch as its users run it: transformers in eager mode.

transformers reads a GGUF file by dequantising it. bf16 and fp32 weights are tried, and the faster ones count.
They are the nearest accuracy classes that plain PyTorch has.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..child import ChildEngine, EngineKind, Patience, Shape, serve
from ..energy import Clock
from ..work import Test, Work, work_of_file
from .sampling import random_ids

EAGER = EngineKind(
    name="torch", module=__name__, package="transformers",
    install="pip install 'edgeformer[hf]' gguf accelerate",
    imports=("torch", "transformers", "gguf", "accelerate"), packages=("torch", "transformers"),
)  # fmt: skip


class TorchEngine(ChildEngine):
    """A child process that holds the model in transformers, in eager mode."""

    def __init__(self, path: Path, shape: Shape, patience: Patience | None = None, **options: Any) -> None:
        super().__init__(EAGER, path, shape, patience, **options)


class TorchRunner:
    """The model in eager mode, once a dtype."""

    settings: tuple[dict[str, Any], ...] = ({"dtype": "bfloat16"}, {"dtype": "float32"})

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.models: dict[str, Any] = {}
        self.shape = (1, 1)

    def load(self, threads: int, context: int, batch: int, **options: Any) -> dict[str, Any]:
        import torch

        torch.set_num_threads(threads)
        self.shape = (context, batch)
        self._model(self.settings[0])
        return {
            "version": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "settings": list(self.settings),
            "fixed": {"attention": "sdpa", "kv": "as the weights"},
            "work": asdict(self._work()),
        }

    def _work(self) -> Work:
        """Bytes that a step reads: all parameters but an untied embedding."""
        base = work_of_file(self.path, kv_element_bytes=2)
        model = self._model(self.settings[0])
        read = sum(p.numel() * p.element_size() for p in model.parameters())
        return Work(read, base.kv_bytes, base.linear_weights, base.head_weights, base.num_layers,
                    base.attention_width)  # fmt: skip

    def _model(self, setting: dict[str, Any]) -> Any:
        key = str(sorted(setting.items()))
        if key not in self.models:
            self.models[key] = self.prepare(self._read(setting["dtype"]), setting)
        return self.models[key]

    def _read(self, dtype: str) -> Any:
        import torch

        transformers: Any = importlib.import_module("transformers")
        where = {"pretrained_model_name_or_path": str(self.path)}
        if self.path.suffix == ".gguf":
            folder, name = str(self.path.resolve().parent), self.path.resolve().name
            where = {"pretrained_model_name_or_path": folder, "gguf_file": name}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **where, dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True
        )
        return model.eval()

    def prepare(self, model: Any, setting: dict[str, Any]) -> Any:
        """Return the model as it is called; a place for compilers."""
        return model

    def plain(self, model: Any) -> Any:
        """Return the model as it is called for logits of a whole text, where speed does not count."""
        return model

    def cache(self, model: Any, batch: int) -> Any:
        """Return an empty cache."""
        transformers: Any = importlib.import_module("transformers")
        return transformers.DynamicCache(config=model.config)

    def _step(self, model: Any, cache: Any, ids: Any, position: int) -> Any:
        import torch

        positions = torch.arange(position, position + ids.shape[1])
        found = model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1,
            position_ids=positions[None].expand(ids.shape[0], -1),
        )  # fmt: skip
        return found.logits

    def time(self, test: Test, setting: Any, clock: Clock) -> None:
        import torch

        model = self._model(setting)
        with torch.inference_mode():
            cache = self.cache(model, test.batch)
            ids = torch.from_numpy(random_ids(model.config.vocab_size, test.batch, test.length))
            if test.depth:
                self._step(model, cache, ids[:, : test.depth], 0)
            with clock:
                if test.kind == "pp":
                    self._step(model, cache, ids[:, test.depth :], test.depth)
                else:
                    for i in range(test.depth, test.length):
                        self._step(model, cache, ids[:, i : i + 1], i)

    def query(self, prompt: int, generate: int, batch: int, setting: Any) -> tuple[float, float]:
        import time

        import torch

        model = self._model(setting)
        with torch.inference_mode():
            cache = self.cache(model, batch)
            ids = torch.from_numpy(random_ids(model.config.vocab_size, batch, prompt))
            start = time.perf_counter()
            tokens = self._step(model, cache, ids, 0)[:, -1].argmax(-1)
            first = time.perf_counter() - start
            for i in range(generate - 1):
                tokens = self._step(model, cache, tokens[:, None], prompt + i)[:, -1].argmax(-1)
            return first, time.perf_counter() - start

    def logits(self, ids: Sequence[int], out: Path, setting: Any) -> None:
        import numpy as np
        import torch

        model = self._model(setting)
        with torch.inference_mode():
            found = self.plain(model)(input_ids=torch.tensor([ids]), use_cache=False).logits
        np.save(out, found[0].float().numpy())


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(TorchRunner)
