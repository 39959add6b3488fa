"""Every family against transformers with the same random weights: prefill, steps, ragged batches."""

from __future__ import annotations

import pytest
import torch

from edgeformer.model.decoder import Decoder
from edgeformer.model.evaluate import reference_hidden
from edgeformer.runtime.dispatch import use_target
from edgeformer.runtime.kv_cache import KVCache

from .families import FAMILIES, Family, checkpoint, hugging_face

TOLERANCE = 2e-5  # relative error of logits


@pytest.fixture(autouse=True)
def _plain_forms(plain):
    use_target(plain)
    yield
    use_target(None)


def build(model, **options) -> Decoder:
    return Decoder.from_checkpoint(checkpoint(model), activation="float", **options)


def new_cache(decoder: Decoder, batch: int = 1) -> KVCache:
    c = decoder.config
    return KVCache(c.num_layers, batch, c.num_kv_heads, c.head_dim, decoder.context, dtype="fp32")


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 200, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_prefill_and_steps(family: Family) -> None:
    """A prompt longer than any window, then chunks and single tokens over the cache."""
    model = hugging_face(family)
    decoder = build(model)
    ids = tokens(1, 61)
    expected = model(ids).logits
    got = decoder(ids, new_cache(decoder), 0, last_only=False)
    assert error(got, expected) < TOLERANCE
    cache = new_cache(decoder)
    for start, end in [(0, 17), (17, 57), *((i, i + 1) for i in range(57, 61))]:
        got = decoder(ids[:, start:end], cache, start)
        assert error(got[:, 0], expected[:, end - 1]) < TOLERANCE, start


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_left_padding(family: Family) -> None:
    """Ragged rows against transformers run row by row, and its own decoding of them."""
    model = hugging_face(family)
    decoder = build(model)
    lengths = [48, 12, 1]
    if family.name == "phi3-longrope":
        lengths = [48, 43, 46]  # transformers takes the short factors for short rows
    rows = [tokens(n + 2, seed=n) for n in lengths]
    longest = max(lengths)
    padded = torch.zeros(len(rows), longest, dtype=torch.int64)
    for b, n in enumerate(lengths):
        padded[b, longest - n :] = rows[b][:n]
    valid, cache = torch.tensor(lengths, dtype=torch.int32), new_cache(decoder, len(rows))
    got = [decoder(padded, cache, 0, lengths=valid)]
    for step in range(2):
        token = torch.stack([row[n + step] for row, n in zip(rows, lengths)])[:, None]
        got.append(decoder(token, cache, longest + step, lengths=valid + step + 1))
    for b, n in enumerate(lengths):
        expected = model(rows[b][None]).logits[0, n - 1 :]
        assert error(torch.cat([g[b] for g in got]), expected) < TOLERANCE, b


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-biased", "qwen3-yarn", "gemma2", "gemma3"])
def test_the_reference_of_eval(name: str) -> None:
    model = hugging_face(next(f for f in FAMILIES if f.name == name))
    decoder = build(model)
    ids = tokens(45)
    logits = reference_hidden(decoder, [ids])[0] @ decoder.head.weight.unpack().dequantize().T
    cap = decoder.config.logit_softcap
    assert error(cap * torch.tanh(logits / cap) if cap else logits, model(ids[None]).logits[0]) < TOLERANCE


@torch.no_grad()
def test_longrope_takes_its_short_factors_for_a_short_context() -> None:
    model = hugging_face(next(f for f in FAMILIES if f.name == "phi3-longrope"))
    decoder = build(model, context=40)
    ids = tokens(1, 40)
    assert error(decoder(ids, new_cache(decoder), 0, last_only=False), model(ids).logits) < TOLERANCE
