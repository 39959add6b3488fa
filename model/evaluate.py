"""How much a loaded model loses against fp32 PyTorch with the same dequantised weights, on a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compiler.errors import FormatError, UnsupportedError
from .decoder import Block, Decoder
from .generate import LanguageModel
from .layers import PackedModule, RMSNorm

BUILT_IN = "the GNU General Public License 3, which ships with EdgeFormer"
ROWS = 128  # tokens whose logits are compared at once: two tables of ROWS x vocabulary in memory


@dataclass(frozen=True)
class Evaluation:
    """Means over ``tokens`` predicted tokens; perplexities are of the next token, KL is in nats."""

    tokens: int
    perplexity: float
    reference_perplexity: float
    mean_kl: float
    top1_agreement: float

    @property
    def perplexity_change(self) -> float:
        """Relative change of the perplexity against the reference."""
        return self.perplexity / self.reference_perplexity - 1


def read_text(path: str | Path | None) -> tuple[str, str]:
    """(name, text) of a UTF-8 file, or of the text that ships with EdgeFormer; FormatError if unreadable."""
    if path is None:
        return BUILT_IN, (resources.files(__package__ or "") / "texts" / "gpl-3.0.txt").read_text()
    try:
        return str(path), Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def evaluate_file(model: LanguageModel, path: str | Path | None, **options: Any) -> Evaluation:
    """``evaluate`` on a UTF-8 text file, or on the text that ships with EdgeFormer."""
    return evaluate(model, read_text(path)[1], **options)


def evaluate(
    model: LanguageModel, text: str, *, window: int = 512, max_tokens: int = 4096,
    reference: Decoder | None = None,
) -> Evaluation:  # fmt: skip
    """Compare a loaded model with fp32 PyTorch on the same dequantised weights, or on ``reference``'s.

    The text is cut into windows, each read from an empty cache; every token but a window's first is
    predicted by both. The reference runs layer by layer, so one dequantised layer is in memory.

    Raises UnsupportedError for a text of fewer than two tokens, a window that the context cannot hold, or
    a reference with another vocabulary.
    """
    reference = reference or model.decoder
    if not isinstance(reference, Decoder):
        raise UnsupportedError(
            f"{model.path} holds a graph, no weights to compare with; name its model with --against"
        )
    if reference.config.vocab_size != model.config.vocab_size:
        raise UnsupportedError(
            f"the models have {model.config.vocab_size} and {reference.config.vocab_size} tokens; "
            "only models of one vocabulary can be compared"
        )
    if not 2 <= window <= model.context:
        raise UnsupportedError(f"window {window} is not between 2 and the model's context {model.context}")
    ids = torch.tensor(model.tokenizer.encode(text)[:max_tokens])
    windows = [part for part in ids.split(window) if len(part) > 1]
    if not windows:
        raise UnsupportedError("the text has fewer than two tokens; nothing to evaluate")
    hidden = reference_hidden(reference, windows)
    head = reference.head.weight.unpack().dequantize()
    cap = reference.config.logit_softcap
    sums = torch.zeros(4, dtype=torch.float64)
    for part, expected in zip(windows, hidden, strict=True):
        got = model_logits(model, part)
        for start in range(0, len(part) - 1, ROWS):
            rows = slice(start, min(start + ROWS, len(part) - 1))
            following = part[rows.start + 1 : rows.stop + 1]
            sums += compare_logits(got[rows], capped(expected[rows] @ head.T, cap), following)
    count = sum(len(part) - 1 for part in windows)
    loss, reference_loss, kl, same = (sums / count).tolist()
    return Evaluation(count, math.exp(loss), math.exp(reference_loss), kl, same)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits under the model's soft cap, if it has one."""
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.inference_mode()
def model_logits(model: LanguageModel, ids: Tensor) -> Tensor:
    """Logits [T, V] of one window, by the loaded model in its own prefill chunks."""
    cache = model.new_cache(1, len(ids))
    parts = []
    for start in range(0, len(ids), model.chunk):
        chunk = ids[None, start : start + model.chunk]
        parts.append(model.step(chunk, cache, start, last_only=False)[0])
    return torch.cat(parts)


def compare_logits(got: Tensor, expected: Tensor, following: Tensor) -> Tensor:
    """Sums over rows: loss, reference loss, KL(reference || model), equal first choices."""
    log_p, log_q = F.log_softmax(expected.float(), -1), F.log_softmax(got.float(), -1)
    picked = following[:, None]
    return torch.stack(
        [
            -log_q.gather(1, picked).double().sum(),
            -log_p.gather(1, picked).double().sum(),
            (log_p.exp() * (log_p - log_q)).sum(-1).double().sum(),
            (got.argmax(-1) == expected.argmax(-1)).double().sum(),
        ]
    )


@torch.inference_mode()
def reference_hidden(
    decoder: Decoder, windows: list[Tensor], progress: Callable[[int], None] | None = None
) -> list[Tensor]:
    """The decoder in plain fp32 PyTorch, weights dequantised: ids [T] -> hidden [T, D] of each window."""
    table = decoder.embed.weight.unpack().dequantize()
    hidden = [F.embedding(part, table) * decoder.config.embedding_scale for part in windows]
    del table
    cos, sin = decoder.rope_rows(0, max(len(part) for part in windows), None)
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Block)
        run = _reference_block(layer)
        hidden = [run(x, cos[layer.rope_kind, : len(x)], sin[layer.rope_kind, : len(x)]) for x in hidden]
        if progress is not None:
            progress(i + 1)
    return [_reference_norm(decoder.norm, x) for x in hidden]


def _reference_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def _reference_block(block: Block) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    c = block.config

    def values(layer: PackedModule) -> Tensor:
        return layer.weight.unpack().dequantize()

    o, gate_up, down = (values(layer) for layer in (block.o, block.gate_up, block.down))
    heads_of = [block.qkv] if block.values is None else [block.qkv, block.values]
    qkv = torch.cat([values(layer) for layer in heads_of])
    biases = [layer.bias for layer in heads_of if layer.bias is not None]
    qkv_bias = torch.cat(biases) if biases else None
    gated = F.silu if c.activation == "silu" else partial(F.gelu, approximate="tanh")

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        low, high, rest = x.split([c.rotary // 2, c.rotary // 2, c.head_dim - c.rotary], dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)

    def added(x: Tensor, y: Tensor, post_norm: RMSNorm | None) -> Tensor:
        return x + (y if post_norm is None else _reference_norm(post_norm, y))

    def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = _reference_norm(block.attn_norm, x)
        heads = F.linear(normed, qkv, qkv_bias).view(len(x), -1, c.head_dim).transpose(0, 1)
        q, k, v = heads.split([c.num_heads, c.num_kv_heads, c.num_kv_heads])
        if block.q_norm is not None and block.k_norm is not None:
            q, k = _reference_norm(block.q_norm, q), _reference_norm(block.k_norm, k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = _reference_attention(q, k, v, c.scale, c.attention_softcap, block.window)
        out = F.linear(out.transpose(0, 1).reshape(len(x), -1), o, block.o.bias)
        x = added(x, out, block.attn_post_norm)
        gate, up = F.linear(_reference_norm(block.mlp_norm, x), gate_up, block.gate_up.bias).chunk(2, dim=-1)
        return added(x, F.linear(gated(gate) * up, down, block.down.bias), block.mlp_post_norm)

    return run


def _reference_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, window: int
) -> Tensor:
    """q [Hq, T, D], k and v [Hkv, T, D] -> [Hq, T, D]."""
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    hidden = (behind < 0) | (behind >= window) if window else behind < 0
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
