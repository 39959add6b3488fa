"""A decoder that ONNX Runtime runs, behind the same calls as one of our kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..compiler.errors import CapacityError, UnsupportedError
from ..runtime.kv_cache import KVCache
from ..runtime.onnx_session import Buffers, DecoderSession
from .config import ModelConfig
from .generate import LanguageModel
from .onnx_decoder import IDS, LOGITS, POSITIONS, ROWS, SEQLENS, TOTAL, cache_names

# A chunk from so many tokens on takes fp32 activations: dequantising a weight once for all of them and then
# multiplying floats is faster than the CPU provider's int8 product (at 512 tokens 1.4 times).
LONG = 256


class OnnxCache:
    """One memory of keys and values a row, which ONNX Runtime updates in place."""

    def __init__(self, rows: list[Buffers]) -> None:
        self.rows = rows
        self.capacity = rows[0].capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(row.nbytes for row in self.rows)

    def trim(self, tokens: int) -> None:
        """Forget what follows the first tokens of every row."""
        for row in self.rows:
            row.tokens = min(row.tokens, tokens)


class OnnxDecoder:
    """Calls like a Decoder: (ids, cache, position, lengths=None, last_only=True) -> logits.

    Rows of a batch run one after the other, each from its own first token, so padding is never computed.
    """

    def __init__(self, session: DecoderSession, config: ModelConfig, context: int) -> None:
        self.session, self.config, self.context = session, config, context

    def new_cache(self, rows: int) -> OnnxCache:
        """An empty cache; every row has the context that the graph was made for."""
        pairs = [pair for i in range(self.config.num_layers) for pair in zip(*cache_names(i))]
        return OnnxCache([self.session.buffers(pairs) for _ in range(rows)])

    def __call__(
        self, ids: Tensor, cache: Any, position: int, lengths: Tensor | None = None, last_only: bool = True
    ) -> Tensor:
        """Logits fp32 [B, 1 or T, vocab] of tokens int64 [B, T]; a padding slot's are zeros."""
        if ids.is_floating_point():
            raise UnsupportedError("an ONNX model takes token ids, not embeddings")
        batch, tokens = ids.shape
        if position + tokens > min(self.context, cache.capacity):
            raise CapacityError(
                f"{position + tokens} tokens do not fit the context of {min(self.context, cache.capacity)}; "
                "shorten the prompt or compile the model with a larger context"
            )
        wanted = 1 if last_only else tokens
        out = torch.zeros(batch, wanted, self.config.vocab_size)
        for b, row in enumerate(cache.rows):
            end = position + tokens if lengths is None else int(lengths[b])
            start = position if lengths is None else max(0, end - tokens)
            if end > start:
                part = ids[b, tokens - (end - start) :].numpy()
                logits = self._run(row, part, start, min(wanted, end - start))
                out[b, wanted - len(logits) :] = torch.from_numpy(logits)
            row.tokens = end
        return out

    def _run(self, row: Buffers, ids: np.ndarray, start: int, wanted: int) -> np.ndarray:
        """Logits [wanted, V] of a chunk's last tokens."""
        if self.session.whole_prompts and start and len(ids) > 1:
            found = [self._chunk(row, ids[i : i + 1], start + i, 1) for i in range(len(ids))]
            return np.concatenate(found[-wanted:])
        return self._chunk(row, ids, start, wanted)

    def _chunk(self, row: Buffers, ids: np.ndarray, start: int, wanted: int) -> np.ndarray:
        end = start + len(ids)
        arrays = {
            IDS: np.ascontiguousarray(ids[None]), POSITIONS: np.arange(start, end)[None],
            SEQLENS: np.array([end - 1], np.int32), TOTAL: np.array([end], np.int32),
            ROWS: np.arange(len(ids) - wanted, len(ids)),
        }  # fmt: skip
        shape = [1, wanted, self.config.vocab_size]
        return self.session.run(row, arrays, LOGITS, shape, long=len(ids) >= LONG)[0]


class OnnxModel(LanguageModel):
    """What ``edgeformer.load`` returns for a folder that was compiled for DirectML."""

    def __init__(self, decoder: OnnxDecoder, *arguments: Any, declined: list[str], **options: Any) -> None:
        super().__init__(decoder, *arguments, **options)  # pyright: ignore[reportArgumentType]
        self.session, self.graph, self.declined = decoder.session, decoder, declined
        self.whole_step_declined = ""
        if decoder.session.whole_prompts:
            self.chunk = self.context

    def new_cache(self, rows: int, tokens: int) -> KVCache:
        """An empty cache; every row has the whole context."""
        return self.graph.new_cache(rows)  # pyright: ignore[reportReturnType]

    def memory(self) -> dict[str, int]:
        """Bytes held now, as planned: ONNX Runtime packs weights anew and does not tell how much it holds."""
        kv = self.plan.kv if self._cache is None else self._cache.nbytes
        return {"weights": self.plan.weights, "kv": kv, "workspace": self.plan.workspace}

    def report(self) -> list[dict[str, Any]]:
        """One row an operator of the graph: how many nodes, who runs them, and which ones DirectML lacks."""
        rows = []
        for operator, count in self.session.operators().most_common():
            without = [text for text in self.declined if f"({operator})" in text]
            rows.append(
                {"layer": f"{count} nodes", "weight": "", "operator": operator, "form": "onnx",
                 "backend": self.session.provider, "declined": [("directml", text) for text in without]}
            )  # fmt: skip
        return rows

    def _begin(self, rows: list[list[int]], reuse: bool) -> int:
        return super()._begin(rows, reuse and not self.session.whole_prompts)
