"""Caches under our attention: ours, dynamic, static; batches, beams, assistants; sliding windows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import edgeformer
from edgeformer.compiler.errors import UnsupportedError
from edgeformer.model.dropin.cache import EdgeFormerCache

from .conftest import CAUSAL, relative, skip_in_transformers_5_0


@pytest.fixture(scope="module", params=["llama-tied", "gemma3"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model and its optimised copy (exact, so that tokens agree)."""
    model = CAUSAL[request.param]()
    ours = copy.deepcopy(model)
    edgeformer.optimize(ours, "exact", policy="all")
    return model, ours


def steps(model: Any, ids: torch.Tensor, cache: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a prefill of 9, of a chunk of 3 and of a token over one cache."""
    out, start = [], 0
    with torch.no_grad():
        for length in (9, 3, 1):
            end = start + length
            options = {} if mask is None else {"attention_mask": mask[:, :end]}
            out.append(model(ids[:, start:end], past_key_values=cache, use_cache=True, **options).logits)
            start = end
    return torch.cat(out, 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["edgeformer", "dynamic", "static"])
def test_every_cache_gives_the_same(pair: Any, ids: torch.Tensor, kind: str, padded: bool) -> None:
    model, ours = pair
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    caches = {
        "edgeformer": lambda: EdgeFormerCache(ours.config),
        "dynamic": lambda: DynamicCache(config=ours.config),
        "static": lambda: StaticCache(config=ours.config, max_cache_len=16),
    }
    want = steps(model, ids, DynamicCache(config=model.config), mask)
    got = steps(ours, ids, caches[kind](), mask)
    assert relative(got[mask.bool()], want[mask.bool()]) < 2e-4


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_narrow_caches(pair: Any, ids: torch.Tensor, dtype: str) -> None:
    model, ours = pair
    want = steps(model, ids, DynamicCache(config=model.config))
    got = steps(ours, ids, EdgeFormerCache(ours.config, dtype))
    assert 1e-6 < relative(got, want) < 0.05


def test_our_cache_under_another_attention(pair: Any, ids: torch.Tensor) -> None:
    model = pair[0]
    assert (
        relative(steps(model, ids, EdgeFormerCache(model.config)), steps(model, ids, DynamicCache())) < 1e-5
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_generate(pair: Any, ids: torch.Tensor, options: dict[str, Any]) -> None:
    if "prompt_lookup_num_tokens" in options:
        skip_in_transformers_5_0("looks prompts up with an end token alone")
        ids = ids[:1]
    common = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    want, got = (m.generate(ids, **common) for m in pair)
    assert torch.equal(got, want)


def test_an_assistant(pair: Any, ids: torch.Tensor) -> None:
    model, ours = pair
    common = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    if getattr(model.config, "sliding_window", None):
        skip_in_transformers_5_0("cannot take tokens back from a sliding window")
    assert torch.equal(
        ours.generate(ids[:1], assistant_model=ours, **common), model.generate(ids[:1], **common)
    )


def test_generate_makes_our_cache(ids: torch.Tensor) -> None:
    model = CAUSAL["llama"]()
    report = edgeformer.optimize(model, "exact", policy="all")
    out = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0)
    cache = out.past_key_values
    assert isinstance(cache, EdgeFormerCache) and cache.get_seq_length() == 15 and cache.nbytes > 0
    mine = DynamicCache(config=model.config)
    out = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, past_key_values=mine)
    assert out.past_key_values is mine
    report.undo()
    out = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0)
    assert type(out.past_key_values) is DynamicCache


def test_rows_tokens_and_copies_of_a_cache(pair: Any, ids: torch.Tensor) -> None:
    ours = pair[1]
    cache = EdgeFormerCache(ours.config)
    steps(ours, ids, cache)
    keys, values = cache.layers[0].dense()
    cache.reorder_cache(torch.tensor([1, 0]))  # pyright: ignore[reportArgumentType]
    assert torch.equal(cache.layers[0].dense()[0], keys[[1, 0]])
    cache.batch_repeat_interleave(2)
    assert cache.layers[1].dense()[0].shape[0] == 4
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(cache.layers[0].dense()[1], values)
    cache.crop(-4)
    assert cache.get_seq_length() == 9 and cache.get_mask_sizes(2, 0) == (11, 0)
    again = copy.deepcopy(cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and again.get_seq_length() == 9
    assert torch.equal(again.layers[0].dense()[0], keys[:, :, :9])


def test_a_cache_grows(pair: Any) -> None:
    ours = pair[1]
    cache = EdgeFormerCache(ours.config)
    k, v = torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    for start in range(0, 300, 50):
        for layer in range(2):
            cache.update(k[:, :, start : start + 50], v[:, :, start : start + 50], layer)
    for got, want in zip(cache.layers[1].dense(), (k, v), strict=True):
        assert torch.equal(got, want)


def test_an_encoder_decoder_is_refused() -> None:
    from transformers import T5Config

    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        EdgeFormerCache(T5Config(num_layers=1))
