"""A loaded model: prompts in, text out, and the numbers of the last run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compiler.errors import CapacityError, UnsupportedError
from ..compiler.target import Target
from ..runtime.kv_cache import KVCache
from .batch import Prompt, Rows, RunStats, Sampling, as_batch, pad_left, token_ids
from .decoder import Decoder
from .layers import PackedModule
from .load.chat import render_chat
from .load.tokenizer import ModelTokenizer
from .plan import PREFILL_CHUNK, MemoryPlan
from .streaming import TextStream


class LanguageModel:
    """A decoder with its tokenizer, cache and options; what ``edgeformer.load`` returns."""

    def __init__(
        self, decoder: Decoder, path: Path, metadata: dict[str, Any], plan: MemoryPlan, *,
        target: Target, threads: int, kv: str, chunk: int = PREFILL_CHUNK,
        tokenizer: Callable[[], ModelTokenizer] | None = None,
    ) -> None:  # fmt: skip
        self.decoder = decoder
        self.step: Callable[..., Tensor] = decoder  # runs a chunk; a compiled program may take its place
        self.whole_step_declined = "not asked for"  # why decode runs op by op; "" when it does not
        self.types: list[dict[str, Any]] = []  # how each type of tensor of the file is held
        self.config = decoder.config
        self.context = decoder.context
        self.path = path
        self.metadata = metadata
        self._make_tokenizer = tokenizer
        self.plan = plan
        self.target = target
        self.threads = threads
        self.kv = kv
        self.chunk = chunk
        self.position = 0
        self.last_run: RunStats | None = None
        self._cache: KVCache | None = None
        self._rows = 0
        self._padding: Tensor | None = None  # int32 [B]: leading slots of each ragged row that hold nothing
        self._cached_ids: list[int] = []  # what the cache of a single row holds, for the next chat turn

    @cached_property
    def tokenizer(self) -> ModelTokenizer:
        """The file's own tokenizer; FormatError or UnsupportedError if it has no usable one."""
        if self._make_tokenizer is not None:
            return self._make_tokenizer()
        return ModelTokenizer(self.metadata, self.path)

    @property
    def chat_template(self) -> str | None:
        """The file's chat template, if it has one."""
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) and template.strip() else None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self.tokenizer.stop_ids if self.has_tokenizer else frozenset(self.config.eos_token_ids)

    @property
    def has_tokenizer(self) -> bool:
        """Whether prompts may be texts."""
        return self._make_tokenizer is not None or bool(self.metadata.get("tokenizer.ggml.tokens"))

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_tokens: int = 256,
        stream: Callable[[str], None] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> Any:
        """Continue a prompt as it is (no chat template).

        Args:
            prompt: a text, token ids, or a list of either (a batch, which may be ragged).
            max_tokens: at most so many new tokens a row; the context may end a row earlier.
            stream: called with pieces of text as they come (one prompt only).
            seed: of the random draws; None takes a fresh one, which ``last_run.seed`` tells.
            stop: strings that end the text and are cut off.
            ignore_eos: go on after an end token (for measuring).
            **sampling: temperature, top_k, top_p, min_p, repetition_penalty; default greedy.

        Returns:
            The new text for a text, the new ids for ids; a list of them for a batch.

        Raises:
            CapacityError: a prompt does not fit the context.
            UnsupportedError: an option that makes no sense.
        """
        prompts, batched = as_batch(prompt)
        rows = [self.tokenizer.encode(p) if isinstance(p, str) else token_ids(p) for p in prompts]
        stops = [stop] if isinstance(stop, str) else list(stop)
        new, texts = self._run(
            rows, max_tokens, stream, seed, stops, ignore_eos, Sampling(**sampling), reuse=False
        )
        out = [text if isinstance(p, str) else ids for p, ids, text in zip(prompts, new, texts, strict=True)]
        return out if batched else out[0]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int = 256,
        stream: Callable[[str], None] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> str:
        """Answer a conversation by the model's chat template; options as in ``generate``.

        What the cache already holds of the conversation is not computed again.
        """
        ids = self.chat_ids(messages)
        stops = [stop] if isinstance(stop, str) else list(stop)
        return self._run([ids], max_tokens, stream, seed, stops, False, Sampling(**sampling), reuse=True)[1][
            0
        ]

    def chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The token ids of a conversation; UnsupportedError where the file has no chat template."""
        if self.chat_template is None:
            raise UnsupportedError(f"{self.path} has no chat template; use generate() for a raw completion")
        names = self.tokenizer.tokens
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        text = render_chat(
            self.chat_template,
            messages,
            bos_token="" if bos is None else names[bos],
            eos_token="" if eos is None else names[eos],
        )
        return self.tokenizer.encode(text)

    def prefill(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Run tokens [T] or [B, T] after what the cache holds, in chunks; logits [B, V] of the last one."""
        tokens = torch.as_tensor(ids, dtype=torch.int64)
        tokens = tokens.view(1, -1) if tokens.dim() == 1 else tokens
        if not tokens.numel():
            raise UnsupportedError("an empty prompt: give at least one token")
        self._require_known(tokens)
        self._require_room(self.position + tokens.shape[1])
        return self._feed(tokens, self._cache_for(tokens.shape[0], self.context))

    def decode(self, token: int | Tensor) -> Tensor:
        """Run one token a row after what the cache holds; its logits [B, V]."""
        ids = token.view(-1, 1) if isinstance(token, Tensor) else torch.tensor([[token]])
        self._require_known(ids)
        return self._feed(ids, self._cache_for(ids.shape[0], self.context))

    def reset(self) -> None:
        """Forget what the cache holds; its memory stays."""
        self.position, self._padding, self._cached_ids = 0, None, []
        if self._cache is not None:
            self._cache.trim(0)

    def memory(self) -> dict[str, int]:
        """Bytes held now: packed weights, KV cache, and scratch space at its widest."""
        layers = [m for m in self.decoder.modules() if isinstance(m, PackedModule)]
        weights = {id(layer.weight): layer.weight.nbytes for layer in layers}
        kept = sum(p.nbytes for p in self.decoder.parameters())
        kept += sum(b.nbytes for name, b in self.decoder.named_buffers() if name.endswith("bias"))
        kv = self.plan.kv if self._cache is None else self._cache.nbytes
        return {"weights": sum(weights.values()) + kept, "kv": kv, "workspace": self.plan.workspace}

    def report(self) -> list[dict[str, Any]]:
        """One row a layer: its name and weight, and what runs it with which configuration and why."""
        from .report import layer_report

        return layer_report(self.decoder)

    def _run(
        self, rows: list[list[int]], max_tokens: int, stream: Callable[[str], None] | None, seed: int | None,
        stops: list[str], ignore_eos: bool, sampling: Sampling, reuse: bool,
    ) -> tuple[list[list[int]], list[str]]:  # fmt: skip
        if stream is not None and len(rows) > 1:
            raise UnsupportedError("stream takes a single prompt, not a batch")
        if max_tokens < 1 or not all(rows):
            raise UnsupportedError(
                "generation needs a prompt of at least one token and max_tokens of at least 1"
            )
        seed = random.randrange(1 << 31) if seed is None else seed
        start = time.perf_counter()
        reused = self._begin(rows, reuse)
        padded = pad_left(rows)
        self._require_known(padded)
        cache = self._cache_for(len(rows), padded.shape[1] + max_tokens)
        logits = self._feed(padded[:, reused:], cache)
        prefilled = time.perf_counter()
        batch = Rows(
            len(rows),
            self._text_streams(len(rows), stops, stream),
            frozenset() if ignore_eos else self.stop_ids,
        )
        history = padded
        for step in range(max_tokens):
            token = self._draw(sampling, logits, history, seed, step)
            batch.take(token.tolist())
            if batch.done or step + 1 == max_tokens:
                break
            if self.position == self.context:
                batch.finish("context")
                break
            if sampling.repetition_penalty != 1.0:
                history = torch.cat([history, token.view(-1, 1)], dim=1)
            logits = self._feed(token.view(-1, 1), cache)
        batch.finish("length")
        texts = [stream.close() for stream in batch.streams]
        ended = time.perf_counter()
        if len(rows) == 1:
            self._cached_ids = (rows[0] + batch.drawn[0])[: self.position]
        self.last_run = RunStats(
            prompt_tokens=sum(map(len, rows)),
            reused_tokens=reused,
            new_tokens=sum(map(len, batch.drawn)),
            prefill_seconds=prefilled - start,
            decode_seconds=ended - prefilled,
            stop_reasons=tuple(reason or "length" for reason in batch.reasons),
            seed=seed,
        )
        return batch.kept, texts

    def _draw(self, sampling: Sampling, logits: Any, history: Tensor, seed: int, step: int) -> Tensor:
        """A token int64 [B] for each row of what ``_feed`` returned."""
        return sampling.draw(logits, history, seed, step)

    def _begin(self, rows: list[list[int]], reuse: bool) -> int:
        """Make room for a run; returns how many leading tokens of a single row the cache keeps."""
        longest = max(map(len, rows))
        self._require_room(longest)
        if reuse and self._cache is not None and self._rows == 1:
            cached, new = self._cached_ids, rows[0]
            same = next(
                (i for i, (a, b) in enumerate(zip(cached, new, strict=False)) if a != b),
                min(len(cached), len(new)),
            )
            keep = min(same, len(new) - 1)
            self.position, self._cached_ids = keep, cached[:keep]
            self._cache.trim(keep)
            return keep
        self.reset()
        if any(len(row) != longest for row in rows):
            self._padding = torch.tensor([longest - len(row) for row in rows], dtype=torch.int32)
        return 0

    def _require_known(self, tokens: Tensor) -> None:
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise UnsupportedError(f"token ids must lie between 0 and {self.config.vocab_size - 1}")

    def _require_room(self, tokens: int) -> None:
        if tokens > self.context:
            raise CapacityError(
                f"the prompt needs {tokens} tokens, the context holds {self.context}; "
                "shorten it or load the model with a larger context"
            )

    @torch.inference_mode()
    def _feed(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Run tokens [B, T] in chunks; logits [B, V] of the last."""
        logits = None
        for part in tokens.split(self.chunk, dim=1):
            end = self.position + part.shape[1]
            logits = self.step(part, cache, self.position, self._valid(end))
            self.position = end
        assert logits is not None
        return logits[:, -1]

    def _valid(self, end: int) -> Tensor | None:
        """int32 [B]: tokens among the first ``end`` slots of each ragged row; None where all are."""
        return None if self._padding is None else (end - self._padding).clamp_(min=0)

    def _cache_for(self, rows: int, tokens: int) -> KVCache:
        """The cache for so many rows and tokens; a single row's always has the whole context."""
        if self.position and rows != self._rows:
            raise UnsupportedError(f"the cache holds {self._rows} rows, not {rows}; call reset() first")
        if (
            self._cache is not None
            and rows == self._rows
            and (self.position or self._cache.capacity >= tokens)
        ):
            return self._cache
        self._cache = None  # free the old one first
        self._cache = self.new_cache(rows, self.context if rows == 1 else min(tokens, self.context))
        self._rows = rows
        return self._cache

    def new_cache(self, rows: int, tokens: int) -> KVCache:
        """An empty cache for so many rows of so many tokens, of the model's type."""
        c = self.config
        return KVCache(c.num_layers, rows, c.num_kv_heads, c.head_dim, tokens, dtype=self.kv)

    def _text_streams(
        self, rows: int, stops: list[str], write: Callable[[str], None] | None
    ) -> list[TextStream]:
        to_bytes = self.tokenizer.token_bytes if self.has_tokenizer else lambda _: b""
        return [TextStream(to_bytes, stops, write) for _ in range(rows)]
