"""The compiled step's cache, as transformers' loops ask for one: length, crop, reorder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import Cache

from ...runtime.kv_cache import KVCache, select_rows

if TYPE_CHECKING:
    from .whole import CompiledModel

_FIRST_CAPACITY = 256


class StepCache(Cache):
    """Keys and values of the whole decoder; grows by doubling up to the context."""

    is_compileable = False  # pyright: ignore
    is_croppable = True  # pyright: ignore
    is_initialized = True  # pyright: ignore

    def __init__(self, compiled: CompiledModel) -> None:
        super().__init__(layers=[])
        self.compiled = compiled
        self.store: KVCache | None = None
        self.length = 0

    def run(self, ids: Tensor, lengths: Tensor | None, keep: int) -> Tensor:
        """Run tokens [B, T] behind what is held; logits of the last `keep` (0: of all)."""
        end = self.length + ids.shape[1]
        if self.store is None or end > self.store.capacity:
            self._grow(ids.shape[0], end)
        assert self.store is not None
        self.store.length = self.length
        logits = self.compiled.feed(ids, self.store, self.length, lengths, keep)
        self.length = end
        return logits

    def _grow(self, rows: int, tokens: int) -> None:
        assert self.compiled.decoder is not None
        old, limit = self.store, self.compiled.decoder.context
        wanted = max(tokens, _FIRST_CAPACITY if old is None else 2 * old.capacity)
        new = self.compiled.new_cache(rows, max(tokens, min(wanted, limit)))
        if old is not None:
            new.take_tokens(old)
        self.store = new

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens held."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: it grows."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return -1: it grows."""
        return -1

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Return how many keys a step sees, and the first one's position."""
        positions = isinstance(query_length, Tensor) and query_length.dim() > 0
        count = query_length.shape[0] if positions else query_length
        return self.length + int(count), 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -n tokens; of a positive n (older transformers), keep the first n."""
        n = int(tokens_to_remove)
        self.length = max(0, self.length + n) if n <= 0 else min(self.length, n)

    def reset(self) -> None:
        """Forget the tokens."""
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Bring the rows into the order `beam_idx`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in this order."""
        if self.store is not None:
            self.store = select_rows(self.store, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.store is not None:
            import torch

            self.store = select_rows(self.store, torch.arange(self.store.batch).repeat_interleave(repeats))
