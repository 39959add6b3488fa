"""EdgeFormer as an engine of the bench: the child process, and its side of the parent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .child import ChildEngine, EngineKind, Patience, Shape, serve
from .device import versions
from .energy import Clock
from .work import Test, work_of_model

if TYPE_CHECKING:
    from ..compiler.target import Target

EDGEFORMER = EngineKind(
    name="edgeformer", module=__name__, package="edgeformer", install="pip install edgeformer",
    imports=("torch",), packages=("edgeformer", "torch"),
)  # fmt: skip


class EdgeFormerEngine(ChildEngine):
    """EdgeFormer in a child of its own; `options` are those of `edgeformer.load`."""

    def __init__(self, path: Path, shape: Shape, patience: Patience | None = None, **options: Any) -> None:
        super().__init__(EDGEFORMER, path, shape, patience, **options)

    def reference(self, windows: Sequence[Sequence[int]], out: Path) -> None:
        """Write the fp32 reference's logits [tokens, vocabulary] of each window to `out`/reference-N.npy."""
        self.ask({"do": "reference", "windows": [list(w) for w in windows], "out": str(out)}, patience=900)

    def tokens(self, text: str, count: int) -> list[int]:
        """Return the first `count` token ids of a text."""
        return self.ask({"do": "tokens", "text": text, "count": count})["ids"]

    def layers(self) -> list[dict[str, Any]]:
        """Return what runs each layer and where its configuration came from (see `model.report`)."""
        return self.ask({"do": "layers"})["rows"]


class EdgeFormerRunner:
    """The loaded model."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.model: Any = None
        self.threads = 1

    def load(self, threads: int, context: int, batch: int, **options: Any) -> dict[str, Any]:
        from ..model.loading import load

        self.threads = threads
        self.model = load(self.path, context=context, threads=threads, **options)
        declined = self.model.whole_step_declined
        gpu = _gpu_of(self.model.target)
        return {
            "version": versions().get("edgeformer", "source"),
            "target": self.model.target.name,
            "proof": "run",
            "whole_step": not declined,
            "whole_step_declined": declined,
            "work": asdict(work_of_model(self.model)),
            "fixed": {**options, "whole_step": not declined},
            **({"gpu": gpu} if gpu else {}),
        }

    def time(self, test: Test, setting: Any, clock: Clock) -> None:
        self._begin()
        ids = _random_ids(self.model, test.batch, test.length)
        tokens = [ids[:, i].contiguous() for i in range(test.depth, test.length)]
        if test.depth:
            self.model.prefill(ids[:, : test.depth])
        if test.kind == "pp":
            prompt = ids[:, test.depth :].contiguous()
            with clock:
                self.model.prefill(prompt)
            return
        with clock:
            for token in tokens:
                self.model.decode(token)

    def query(self, prompt: int, generate: int, batch: int, setting: Any) -> tuple[float, float]:
        from ..runtime import ops

        self._begin()
        ids = _random_ids(self.model, batch, prompt)
        start = time.perf_counter()
        token = ops.sample(self.model.prefill(ids))
        first = time.perf_counter() - start
        for _ in range(generate - 1):
            token = ops.sample(self.model.decode(token))
        return first, time.perf_counter() - start

    def logits(self, ids: Sequence[int], out: Path, setting: Any) -> None:
        import numpy as np
        import torch

        from ..model.evaluate import model_logits

        np.save(out, model_logits(self.model, torch.tensor(ids)).float().numpy())

    def reference(self, windows: list[list[int]], out: str) -> None:
        import numpy as np
        import torch

        from ..model.evaluate import capped, reference_hidden

        hidden = reference_hidden(self.model.decoder, [torch.tensor(w) for w in windows])
        head = self.model.decoder.head.weight.unpack().dequantize()
        for i, rows in enumerate(hidden):
            logits = capped(rows @ head.T, self.model.config.logit_softcap)
            np.save(Path(out) / f"reference-{i}.npy", logits.numpy())

    def tokens(self, text: str, count: int) -> dict[str, Any]:
        return {"ids": self.model.tokenizer.encode(text)[:count]}

    def layers(self) -> dict[str, Any]:
        return {"rows": self.model.report()}

    def _begin(self) -> None:
        from ..runtime.threads import set_threads

        set_threads(self.threads)
        self.model.reset()


def _gpu_of(target: Target) -> str:
    """Return the name of the GPU that a target is, as its driver tells it, or ""."""
    if target.arch != "opencl":
        return ""
    from ..compiler.backends.opencl_device import select

    _, limits = select(target.name)
    return "" if "CPU" in limits.kind else limits.name


def _random_ids(model: Any, batch: int, count: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, model.config.vocab_size, (batch, count), generator=generator)


if __name__ == "__main__":
    serve(EdgeFormerRunner)
